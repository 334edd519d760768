"""Distillations side by side, judged without a download: `make distill-table`.

Trains MDLM and DUO on the documentation strings of Python's standard library, distils
MDLM by SDTT and by DiMO and DUO by DCD, and draws samples of each model with several
numbers of steps. The judge is a 5-gram model of the training data.

    python benchmarks/distill_table.py [KEY=VALUE ...]

What is finished stays in --folder, and the same command goes on from there. KEY=VALUE
is given to every command of the table.
"""

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.runs import folder_of, run, table_parser  # noqa: E402
from data.tokenizers import get_tokenizer  # noqa: E402
from dataloader import DataModule  # noqa: E402
from metrics.ngrams import NGramModel  # noqa: E402
from metrics.samples import mean_and_error, sample_entropy  # noqa: E402
from report import style  # noqa: E402
from utils import register_resolvers  # noqa: E402

STEPS = (1, 2, 4, 8, 16, 64)
LEAST = 0.15  # nats that a student's entropy may lie below that of held-out text
ORDER = 5  # of the judge


class Sweep(NamedTuple):
    """Samples of a model in one process."""

    steps: tuple[int, ...]
    overrides: list[str]


def listed(numbers: Iterable[int]) -> str:
    """As Hydra wants the values of a sweep."""
    return ",".join(map(str, numbers))


def by_steps(parent: Path | None) -> list[Sweep]:
    """Every number of steps by the model itself."""
    return [Sweep(STEPS, [f"sampling.steps={listed(STEPS)}"])]


def by_refinement(parent: Path | None) -> list[Sweep]:
    """One step of the generator, the others by its teacher."""
    one, more = "sampling.predictor=one_step", STEPS[1:]
    refined = f"sampling.refine_steps={listed(n - 1 for n in more)}"
    return [
        Sweep((1,), [one]),
        Sweep(more, [one, refined, f"sampling.refine_path={parent}"]),
    ]


class Model(NamedTuple):
    """A model of the table."""

    label: str
    training: tuple[str, ...] = ()  # overrides
    sampling: tuple[str, ...] = ()  # overrides
    weights: str | None = None  # the model whose they are; None: it is trained
    parent: str | None = None
    target: int | None = None  # steps in which it is to be better than its parent
    sweeps: Callable[[Path | None], list[Sweep]] = by_steps


NO_TAIL = "sampling.noise_removal=ancestral"
MODELS = {
    "mdlm": Model(
        "MDLM",
        ("experiment=demo", "algo=mdlm", "trainer.max_steps=3000"),
        ("algo=mdlm", NO_TAIL),
    ),
    "sdtt": Model(
        "MDLM, SDTT",
        ("experiment=demo_sdtt",),
        ("algo=sdtt", NO_TAIL),
        None,
        "mdlm",
        4,
    ),
    "dimo": Model(
        "MDLM, DI[M]O",
        ("experiment=demo_dimo",),
        ("algo=dimo", NO_TAIL),
        None,
        "mdlm",
        1,
        by_refinement,
    ),
    "duo": Model("DUO", ("experiment=demo_duo",)),
    "dcd": Model("DUO, DCD", ("experiment=demo_distill",), (), None, "duo", 8),
    # The same two without the greedy tail of the above.
    "duo_drawn": Model("DUO, no tail", (), (NO_TAIL,), "duo"),
    "dcd_drawn": Model("DUO, DCD, no tail", (), (NO_TAIL,), "dcd", "duo_drawn", 8),
}


class Result(NamedTuple):
    """Samples of a model with some number of steps; numbers with standard errors."""

    model: str
    steps: int
    evaluations: float  # of networks, a sample
    ppl: float
    ppl_error: float
    entropy: float  # nats
    entropy_error: float


class HeldOut(NamedTuple):
    """Text that no model has seen, under the same judge."""

    ppl: float
    entropy: float  # nats


# ---------------------------------------------------------------- commands


def checkpoint(folder: Path, name: str) -> Path:
    trained = MODELS[name].weights or name
    return folder / trained / "checkpoints" / "last.ckpt"


def train(folder: Path, name: str, overrides: list[str]) -> None:
    """A model, from its parent if it has one; nothing if its weights are another's."""
    model, own = MODELS[name], [f"hydra.run.dir={folder / name}"]
    if model.weights:
        return
    if model.parent:
        own += [f"training.finetune_path={checkpoint(folder, model.parent)}"]
    run(folder / name, *model.training, *own, *overrides)


def sample(folder: Path, name: str, overrides: list[str]) -> list[Result]:
    """A model with every number of steps."""
    model, results = MODELS[name], []
    parent = checkpoint(folder, model.parent) if model.parent else None
    for index, sweep in enumerate(model.sweeps(parent)):
        place = folder / "samples" / f"{name}-{index}"
        asked = ["-m", f"hydra.sweep.dir={place}", "experiment=demo_samples"]
        asked += [f"eval.checkpoint_path={checkpoint(folder, name)}", *model.sampling]
        run(place, *asked, *sweep.overrides, *overrides)
        with open(place / "summary.csv") as file:
            rows = list(csv.DictReader(file))
        keys = ("evaluations", "ngram_ppl", "ngram_ppl_stderr")
        keys += ("entropy", "entropy_stderr")
        results += [
            Result(name, steps, *(float(row[key]) for key in keys))
            for steps, row in zip(sweep.steps, rows, strict=True)
        ]
    return results


def held_out(overrides: list[str]) -> HeldOut:
    """The judge's perplexity of validation rows, and their entropy."""
    register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = hydra.compose("config", ["experiment=demo_samples", *overrides])
    tokenizer = get_tokenizer(config)
    data = DataModule(config, tokenizer, None)  # a mask is of no matter here
    train, valid = data.load("train").ids, data.load("valid").ids
    nll = NGramModel(train, ORDER, len(tokenizer)).nll(valid).mean()
    entropy, _ = mean_and_error(
        sample_entropy(torch.from_numpy(np.asarray(valid))).tolist()
    )
    return HeldOut(float(torch.tensor(nll).exp()), entropy)


# ---------------------------------------------------------------- the report


def verdict(results: list[Result], text: HeldOut, name: str) -> str:
    """Whether a student is better than its teacher where it is meant to be."""
    model = MODELS[name]
    by = {(x.model, x.steps): x for x in results}
    ours, theirs = by[name, model.target], by[model.parent, model.target]
    gain, error = theirs.ppl - ours.ppl, math.hypot(ours.ppl_error, theirs.ppl_error)
    is_better = "better" if gain > 0 else "not better"
    is_seen = "" if abs(gain) > 2 * error else ", within two standard errors"
    is_allowed = "is" if ours.entropy >= text.entropy - LEAST else "is not"
    return (
        f"- {model.label}, {steps_of(model.target)}: perplexity {ours.ppl:.1f}, its "
        f"teacher's {theirs.ppl:.1f} ({is_better}{is_seen}); entropy "
        f"{ours.entropy:.2f} nats, which {is_allowed} above that of held-out text less "
        f"{LEAST}."
    )


def steps_of(number: int) -> str:
    return f"{number} step{'s' if number > 1 else ''}"


def table(results: list[Result], value: Callable[[Result], str]) -> list[str]:
    """In markdown: a row for every model, a column for every number of steps."""
    by = {(x.model, x.steps): x for x in results}
    lines = [
        "| model | " + " | ".join(map(steps_of, STEPS)) + " |",
        "| --- " * (len(STEPS) + 1) + "|",
    ]
    for name, model in MODELS.items():
        cells = (value(by[name, steps]) for steps in STEPS)
        lines.append(f"| {model.label} | " + " | ".join(cells) + " |")
    return lines


def report(results: list[Result], text: HeldOut, seconds: float, output: Path) -> None:
    """Writes distillation.md, .json and .png."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    lines = [
        "# Distillations side by side",
        "",
        f"Made by `make distill-table` in {seconds / 60:.0f} minutes on "
        f"{os.cpu_count()} CPU cores with torch {torch.__version__}, commit {commit}.",
        "Samples are of 64 characters; their number is that of",
        "`configs/experiment/demo_samples.yaml`.",
        "",
        f"## Perplexity of samples under a {ORDER}-gram model of the training data",
        "",
        *table(results, lambda x: f"{x.ppl:.1f} ± {x.ppl_error:.1f}"),
        "",
        f"Held-out text has {text.ppl:.1f}.",
        "",
        "## Entropy of samples, nats",
        "",
        *table(results, lambda x: f"{x.entropy:.3f} ± {x.entropy_error:.3f}"),
        "",
        f"Held-out text has {text.entropy:.3f}.",
        "",
        "## Evaluations of a network for a sample",
        "",
        *table(results, lambda x: f"{x.evaluations:.1f}"),
        "",
        "## Where each student is meant to be better",
        "",
        *(verdict(results, text, name) for name, x in MODELS.items() if x.parent),
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / "distillation.md").write_text("\n".join(lines) + "\n")
    numbers = {
        "held_out": text._asdict(),
        "seconds": seconds,
        "results": [x._asdict() for x in results],
    }
    (output / "distillation.json").write_text(json.dumps(numbers, indent=1) + "\n")
    plot(results, text, output / "distillation.png")
    print("\n".join(lines))


def plot(results: list[Result], text: HeldOut, path: Path) -> None:
    """Perplexity against steps and against entropy, and entropy against steps."""
    looks = style.looks(model.label for model in MODELS.values())
    with style.drawing() as pyplot:
        figure = pyplot.figure(figsize=(style.WIDTH, 8), layout="constrained")
        left, right, below = style.panels(figure, 3)
        for name, model in MODELS.items():
            own = [x for x in results if x.model == name]
            ppl, ppl_errors = [x.ppl for x in own], [x.ppl_error for x in own]
            entropy = [x.entropy for x in own]
            errors = [x.entropy_error for x in own]
            steps, look = [x.steps for x in own], looks[model.label]
            style.points(left, steps, ppl, look, y_errors=ppl_errors)
            both = {"x_errors": errors, "y_errors": ppl_errors}
            style.points(right, entropy, ppl, look, **both)
            style.points(below, steps, entropy, look, y_errors=errors)
        left.axhline(text.ppl, color=style.GREY)
        below.axhline(text.entropy, color=style.GREY)
        right.axhline(text.ppl, color=style.GREY)
        right.axvline(text.entropy, color=style.GREY)
        for axes in (left, below):
            style.steps_axis(axes, STEPS)
        right.set_xlabel("entropy of samples (nats a token)")
        below.set_ylabel("entropy of samples (nats a token)")
        for axes in (left, right):
            axes.set_ylabel(f"{ORDER}-gram perplexity (a token)")
            style.numbers_axis(axes, "y", [text.ppl, *(x.ppl for x in results)])
        what = f"docstrings; judge: {ORDER}-gram model of the training data"
        style.title(figure, "teachers and students", what)
        style.legend(figure, looks, ["held-out text", style.BARS])
        style.save(figure, str(path.with_suffix("")))


def main() -> None:
    args = table_parser(__doc__, "distill-table").parse_args()
    folder = folder_of(args)
    spent = folder / "seconds"  # of starts before this one
    results: list[Result] = []
    with tqdm(total=2 * len(MODELS), desc="distill-table") as bar:
        for name, model in MODELS.items():
            for what in (train, sample):
                start = time.monotonic()
                bar.set_postfix_str(f"{what.__name__}: {model.label}")
                results += what(folder, name, args.overrides) or []
                before = float(spent.read_text()) if spent.exists() else 0.0
                spent.write_text(str(before + time.monotonic() - start))
                bar.update()
    text = held_out(args.overrides)
    report(results, text, float(spent.read_text()), args.output)


if __name__ == "__main__":
    main()
