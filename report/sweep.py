"""One summary of a Hydra multirun: a table, a CSV and a plot of what its runs returned.

`python main.py -m mode=sample_eval sampling.steps=8,16,32 ...` runs the jobs; each
leaves its numbers in its folder, and the last one is followed by the summary, whatever
launcher ran them.
"""

import csv
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metrics.numbers import measured
from utils import printable

if TYPE_CHECKING:
    from hydra.conf import HydraConf

ROW = "numbers.json"  # in every job's folder
REFUSED = "refused"  # among a job's numbers: why it could not run
# Numbers in the table; the CSV has all.
SHOWN = (
    *("generative_ppl", "ngram_ppl", "mauve", "entropy", "evaluations"),
    *("samples_per_second", "nll", "ppl", "fid", "inception_score"),
    *("step", "rows", "weights", REFUSED),
)
JUDGED = {"generative_ppl": "generative perplexity", "ngram_ppl": "n-gram perplexity"}


def is_sweep(hydra: "DictConfig | HydraConf") -> bool:
    """Whether a job is one of a multirun, by its `hydra` config."""
    return "MULTIRUN" in str(hydra.mode)


class Summary(Callback):
    """Hydra calls it at the end of every job and of the multirun."""

    def on_job_end(
        self, config: DictConfig, job_return: JobReturn, **kwargs: Any
    ) -> None:
        hydra = config.hydra
        if not is_sweep(hydra) or job_return.status != JobStatus.COMPLETED:
            return
        row = {
            "job": hydra.job.num,
            "overrides": _overrides(hydra),
            "numbers": job_return.return_value or {},
        }
        (Path(hydra.runtime.output_dir) / ROW).write_text(json.dumps(row))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = [json.loads(path.read_text()) for path in folder.glob(f"**/{ROW}")]
        rows.sort(key=lambda row: row["job"])
        if rows:
            write_summary(rows, folder)
        if any(REFUSED in row["numbers"] for row in rows):
            sys.exit(2)


def _overrides(hydra: DictConfig) -> dict[str, str]:
    """key=value of the job's command line."""
    # Texts, which are not resolved; OmegaConf's types do not say so.
    words = cast(list[str], OmegaConf.to_container(hydra.overrides.task))
    pairs = (word.split("=", 1) for word in words)
    return {key.lstrip("+~"): value for key, *rest in pairs for value in rest}


def write_summary(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Prints a table of jobs and writes summary.csv and summary.png.

    Args:
        jobs: job, overrides and numbers of each.
        folder: Where the files go.
    """
    overrides = [job["overrides"] for job in jobs]
    keys = dict.fromkeys(key for row in overrides for key in row)
    swept = [key for key in keys if len({row.get(key) for row in overrides}) > 1]
    rows = [{"job": job["job"], **job["overrides"], **job["numbers"]} for job in jobs]
    names = dict.fromkeys(key for job in jobs for key in job["numbers"])
    numbers = [key for key in names if any(row.get(key) is not None for row in rows)]
    columns = ["job", *swept, *numbers]
    with open(folder / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    shown = ["job", *swept, *(key for key in numbers if key in SHOWN)]
    table = Table(*(key.split(".")[-1] for key in shown), title=f"{len(rows)} runs")
    short = {key: _short([row.get(key) for row in rows]) for key in swept}
    for index, row in enumerate(rows):
        cells = row | {key: values[index] for key, values in short.items()}
        table.add_row(*(_cell(cells, key) for key in shown))
    console = Console(emoji=False)
    console.print(table)
    files = [folder / "summary.csv", *plot(rows, folder)]
    paths = (escape(printable(path.resolve())) for path in files)
    console.print("summary:", *paths, soft_wrap=True, highlight=False)


def _short(values: list[str | None]) -> list[str | None]:
    """Paths without the folders in front and behind that all of them share."""
    paths = [value for value in values if value is not None and "/" in value]
    if len(paths) < len(values):
        return values
    parts = [path.split("/") for path in paths]
    front = _num_shared(parts)
    back = _num_shared([part[front:][::-1] for part in parts])
    return ["/".join(part[front : len(part) - back]) or "." for part in parts]


def _num_shared(rows: list[list[str]]) -> int:
    """How many entries at their beginnings all rows have in common."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, same))


def _cell(row: dict[str, Any], key: str) -> str:
    value, error = row.get(key), row.get(f"{key}_stderr")
    if not isinstance(value, float):
        return "-" if value is None else escape(printable(value))
    return measured(value, error)


def plot(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A perplexity of the samples against entropy and against steps; no judge: entropy.

    Returns:
        The file, or nothing if the runs drew no samples.
    """
    rows = [row for row in rows if row.get("entropy") is not None]
    if not rows:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    judges = [name for name in JUDGED if any(row.get(name) is not None for row in rows)]
    quality = judges[0] if judges else "entropy"
    judged = [row for row in rows if judges and row.get(quality) is not None]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4))
    label = JUDGED.get(quality, "entropy (nats)")
    for index, (name, line) in enumerate(_lines(judged or rows).items()):
        for row in line if judged else ():
            _point(left, row, "entropy", quality, f"C{index}")
            steps = row.get("sampling.steps", row["job"])
            left.annotate(str(steps), (row["entropy"], row[quality]))
        stepped = [row for row in line if "sampling.steps" in row]
        stepped.sort(key=lambda row: int(row["sampling.steps"]))
        if stepped:
            right.errorbar(
                [int(row["sampling.steps"]) for row in stepped],
                [row[quality] for row in stepped],
                yerr=[row.get(f"{quality}_stderr") or 0 for row in stepped],
                fmt="o-",
                capsize=3,
                color=f"C{index}",
                label=name,
            )
    left.set(xlabel="entropy (nats)", ylabel=label)
    right.set(xlabel="steps", ylabel=label, xscale="log")
    if steps := sorted({int(row.get("sampling.steps", 0)) for row in rows} - {0}):
        right.set_xticks(steps, map(str, steps))
        right.set_xticks([], minor=True)
        right.legend()
    figure.tight_layout()
    figure.savefig(folder / "summary.png", dpi=150)
    pyplot.close(figure)
    return [folder / "summary.png"]


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in steps alone, by what else was asked for."""
    overrides = [{k: v for k, v in row.items() if "." in k} for row in rows]
    asked = dict.fromkeys(key for row in overrides for key in row)
    keys = [k for k in asked if len({row.get(k) for row in overrides}) > 1]
    short = {k: _short([row.get(k) for row in rows]) for k in keys}
    short.pop("sampling.steps", None)
    lines: dict[str, list[dict[str, Any]]] = {}
    for index, row in enumerate(rows):
        parts = (f"{k.split('.')[-1]}={values[index]}" for k, values in short.items())
        lines.setdefault(", ".join(parts) or "samples", []).append(row)
    return lines


def _point(axes: Any, row: dict[str, Any], x: str, y: str, color: str) -> None:
    axes.errorbar(
        row[x],
        row[y],
        xerr=row.get(f"{x}_stderr") or 0,
        yerr=row.get(f"{y}_stderr") or 0,
        fmt="o",
        color=color,
        capsize=3,
    )
