"""Perplexity against the size of blocks, from whole rows to single tokens:
`make block-table`.

Trains MDLM and DUO_BASE on the documentation strings of Python's standard library with
blocks of 64 tokens (the row: the plain algorithms), 16, 4 and 1, and an autoregressive
model, each for as many updates.

    python benchmarks/block_table.py [KEY=VALUE ...]

What is finished stays in --folder, and the same command goes on from there. KEY=VALUE
is given to every command.
"""

import csv
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402
from benchmarks.runs import folder_of, run, table_parser  # noqa: E402
from report import style  # noqa: E402
from report.formats import markdown  # noqa: E402

LENGTH = 64
SIZES = (64, 16, 4, 1)
ALGORITHMS = {"mdlm": "MDLM", "duo_base": "DUO_BASE"}
AR = "ar"
# Of every model: the demo's, smaller and shorter.
TRAINING = (
    *("experiment=demo", f"model.length={LENGTH}", "model.hidden_size=64"),
    *("model.cond_dim=64", "model.n_blocks=3", "trainer.max_steps=500"),
    *("trainer.val_check_interval=500", "eval.generate_samples=False"),
)


class Result(NamedTuple):
    """The last validation of a model, with its standard error over rows."""

    ppl: float
    error: float


def runs() -> dict[str, tuple[str, ...]]:
    """Name of a run -> what its model is."""
    found = {
        f"{name}-{size}": (f"algo={name}", f"algo.block_size={size}")
        for size in SIZES
        for name in ALGORITHMS
    }
    return found | {AR: (f"algo={AR}",)}


def result(folder: Path) -> Result:
    """From the log of a run's last validation."""
    path = max(folder.glob("csv/*/metrics.csv"), key=lambda x: x.stat().st_mtime)
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/ppl")]
    return Result(float(rows[-1]["val/ppl"]), float(rows[-1]["val/ppl_stderr"]))


def verdict(name: str, results: dict[str, Result]) -> str:
    """Whether smaller blocks have lower bounds, within two standard errors."""
    own = [(f"L' = {size}", results[f"{name}-{size}"]) for size in SIZES]
    own.append(("AR", results[AR]))
    rises = [
        f"{y} is above {x} by {b.ppl - a.ppl:.2f}"
        for (x, a), (y, b) in pairwise(own)
        if b.ppl - a.ppl > 2 * math.hypot(a.error, b.error)
    ]
    words = "; ".join(rises) if rises else "none rises by more than two standard errors"
    return f"- {ALGORITHMS[name]}, from L' = {SIZES[0]} to 1 and AR: {words}."


def report(results: dict[str, Result], output: Path, overrides: list[str]) -> None:
    """Writes block.md and block.png."""
    commit = measure.environment(torch.device("cpu"))["commit"]
    heads = ["L' = 64 (plain)", *(f"L' = {size}" for size in SIZES[1:]), "AR"]
    lines = [
        "# Perplexity against the size of blocks",
        "",
        f"Made by `make block-table` on {os.cpu_count()} CPU cores with torch "
        f"{torch.__version__}, commit {commit}. Each model is trained by",
        f"`main.py {' '.join([*TRAINING, *overrides])}`",
        "with what the table names. val/ppl of held-out modules with its standard",
        "error over rows, by the bound with one draw of times and noise, with EMA",
        "weights; of AR it is exact, and leaves the first token of a row out.",
        "",
    ]
    rows = []
    for name, label in ALGORITHMS.items():
        cells = [results[f"{name}-{size}"] for size in SIZES] + [results[AR]]
        rows.append([label, *(f"{x.ppl:.2f} ± {x.error:.2f}" for x in cells)])
    lines += [
        markdown(["model", *heads], rows),
        "",
        *(verdict(name, results) for name in ALGORITHMS),
        "",
    ]
    lines += ["![perplexity against the size of blocks](block.png)", ""]
    output.mkdir(parents=True, exist_ok=True)
    (output / "block.md").write_text("\n".join(lines))
    plot(results, output / "block.png")


def plot(results: dict[str, Result], path: Path) -> None:
    """Perplexity against L', with that of the autoregressive model."""
    looks = style.looks(ALGORITHMS.values())
    with style.drawing() as pyplot:
        figure = pyplot.figure(figsize=(style.WIDTH, 4), layout="constrained")
        (axes,) = style.panels(figure, 1)
        for name, label in ALGORITHMS.items():
            own = [results[f"{name}-{size}"] for size in SIZES]
            ppl, errors = [x.ppl for x in own], [x.error for x in own]
            style.points(axes, list(SIZES), ppl, looks[label], y_errors=errors)
        axes.axhline(results[AR].ppl, color=style.GREY)
        style.steps_axis(axes, SIZES)
        axes.set_xlabel("tokens of a block")
        axes.set_ylabel("val/ppl (a token)")
        style.numbers_axis(axes, "y", [x.ppl for x in results.values()])
        style.title(figure, "perplexity against the size of blocks", "docstrings")
        style.legend(figure, looks, ["autoregressive model", style.BARS])
        style.save(figure, str(path.with_suffix("")))


def main() -> None:
    args = table_parser(__doc__, "block-table").parse_args()
    folder = folder_of(args)
    results = {}
    for name, words in tqdm(runs().items(), desc="block-table"):
        place = folder / name
        run(place, *TRAINING, *words, f"hydra.run.dir={place}", *args.overrides)
        results[name] = result(place)
    report(results, args.output, args.overrides)


if __name__ == "__main__":
    main()
