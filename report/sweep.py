"""One summary of a Hydra multirun: a table, a CSV and a plot of what its runs returned.

`python main.py -m mode=sample_eval sampling.steps=8,16,32 ...` runs the jobs; each
leaves its numbers in its folder, and the last one is followed by the summary, whatever
launcher ran them.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from metrics.numbers import measured
from report import style
from report.formats import (
    latex,
    markdown,
    print_files,
    print_table,
    screen,
    short_paths,
)
from report.frontier import frontier
from report.frontier_output import save
from report.runs import ngram_judge, read_runs
from utils import path_exists

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
JUDGED = ("generative_ppl", "ngram_ppl")
AXES = {
    "generative_ppl": "generative perplexity (a token)",
    "ngram_ppl": "n-gram perplexity (a token)",
    "entropy": "entropy of samples (nats a token)",
    "steps": "sampling steps",
    "job": "job",
}
# What a job is of: the name in a row, and the key of its config.
ABOUT = {
    "algo": "algo.name",
    "data": "data.valid",
    "tokenizer": "data.tokenizer_name_or_path",
    "length": "model.length",
}


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
            "about": _about(config),
            "samples": OmegaConf.select(config, "eval.generated_samples_path"),
        }
        (Path(hydra.runtime.output_dir) / ROW).write_text(json.dumps(row))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = [json.loads(path.read_text()) for path in folder.glob(f"**/{ROW}")]
        rows.sort(key=lambda row: row["job"])
        if rows:
            write_summary(rows, folder)
            write_frontier(rows, folder)
        if any(REFUSED in row["numbers"] for row in rows):
            sys.exit(2)


def _about(config: DictConfig) -> dict[str, Any]:
    """What the job's samples are of, and who judges them."""
    about = {name: OmegaConf.select(config, key) for name, key in ABOUT.items()}
    judge = OmegaConf.select(config, "eval.gen_ppl_eval_model_name_or_path")
    if not OmegaConf.select(config, "eval.compute_generative_perplexity"):
        judge = None
    order = OmegaConf.select(config, "eval.ngram_order")
    if judge is None and order:
        judge = ngram_judge(order)
    return about | {"judge": judge and str(judge).rstrip("/").split("/")[-1]}


def _overrides(hydra: DictConfig) -> dict[str, str]:
    """key=value of the job's command line."""
    # Texts, which are not resolved; OmegaConf's types do not say so.
    words = cast(list[str], OmegaConf.to_container(hydra.overrides.task))
    pairs = (word.split("=", 1) for word in words)
    return {key.lstrip("+~"): value for key, *rest in pairs for value in rest}


def write_summary(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Prints a table of jobs and writes summary.csv, .md, .tex, .png and .pdf.

    Args:
        jobs: job, overrides and numbers of each, and what it was of.
        folder: Where the files go.
    """
    swept = _swept(jobs)
    rows = [{"job": job["job"], **job["overrides"], **job["numbers"]} for job in jobs]
    names = dict.fromkeys(key for job in jobs for key in job["numbers"])
    numbers = [key for key in names if any(row.get(key) is not None for row in rows)]
    columns = ["job", *swept, *numbers]
    with open(folder / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    shown = [key for key in numbers if key in SHOWN]
    short = {key: short_paths([row.get(key) for row in rows]) for key in swept}
    cells = [row | {key: short[key][i] for key in swept} for i, row in enumerate(rows)]
    header = [key.split(".")[-1] for key in ("job", *swept, *shown)]
    lines = [[_cell(row, key) for key in ("job", *swept, *shown)] for row in cells]
    title, console = f"{len(rows)} runs", screen()
    print_table(console, title, header, lines, keys=1 + len(swept))
    picture = plot(jobs, folder)
    told = ["![what the table says](summary.png)"] if picture else []
    parts = [f"# {title}", *told, markdown(header, lines), "±: one standard error."]
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n")
    (folder / "summary.tex").write_text(latex(title, header, lines) + "\n")
    files = [folder / f"summary.{end}" for end in ("csv", "md", "tex")] + picture
    print_files(console, "summary", (path.resolve() for path in files))


def write_frontier(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Samplers at the same entropy, as frontier.md, .csv, .tex, .png and .pdf.

    Nothing is written of less than two runs that have a perplexity.

    Args:
        jobs: As of `write_summary`, with the paths of their samples.
        folder: Where the files go.
    """
    judged = [
        job for job in jobs if any(job["numbers"].get(x) is not None for x in JUDGED)
    ]
    paths = [path for job in judged if (path := job.get("samples"))]
    shown = frontier(read_runs([(None, path) for path in paths if path_exists(path)]))
    if shown is not None and sum(len(x.points) for x in shown.samplers) > 1:
        save(shown, str(folder / "frontier"))


def _swept(jobs: list[dict[str, Any]]) -> list[str]:
    """Keys of which the jobs have several values."""
    overrides = [job["overrides"] for job in jobs]
    keys = dict.fromkeys(key for row in overrides for key in row)
    return [key for key in keys if len({row.get(key) for row in overrides}) > 1]


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return measured(value, row.get(f"{key}_stderr"))


# ---------------------------------------------------------------- the picture


def plot(jobs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A perplexity of the samples against entropy and steps, and entropy against steps.

    Without a judge entropy alone; without several numbers of steps, by job.

    Returns:
        The files, or nothing if the runs drew no samples.
    """
    jobs = [job for job in jobs if job["numbers"].get("entropy") is not None]
    if not jobs:
        return []
    numbers = [job["numbers"] for job in jobs]
    judges = [
        name for name in JUDGED if any(row.get(name) is not None for row in numbers)
    ]
    lines = _lines(jobs)
    usual = Counter(_setting(job) for job in jobs).most_common(1)[0][0]
    has_steps = any(_steps(job) is not None for job in jobs)
    panels = [("entropy", name) for name in judges[:1]]
    panels += [("steps", name) for name in judges[:1] if has_steps]
    panels += [("steps" if has_steps else "job", "entropy")] if len(panels) != 1 else []
    looks = style.looks(lines)
    with style.drawing() as pyplot:
        height = 1.4 + 3.2 * style.rows(len(panels)) + 0.12 * len(lines)
        figure = pyplot.figure(figsize=(style.WIDTH, height), layout="constrained")
        grid = style.panels(figure, len(panels))
        places = [
            _panel(axes, panel, lines, looks, usual)
            for axes, panel in zip(grid, panels, strict=True)
        ]
        notes = (
            [style.BARS] if any(row.get("entropy_stderr") for row in numbers) else []
        )
        if any(_setting(job) != usual for job in jobs):
            notes.insert(0, style.HOLLOW)
        beside = [
            "beside points: sampling steps" if has_steps else "beside points: job"
        ]
        style.title(figure, *_title(jobs), *(beside if judges else []))
        style.legend(figure, looks, notes)
        # At the end, as it settles where everything is.
        for axes, panel, labels in zip(grid, panels, places, strict=True):
            if panel[0] == "entropy":
                style.label_points(figure, axes, labels)
        return [Path(path) for path in style.save(figure, str(folder / "summary"))]


def _panel(
    axes: Any,
    panel: tuple[str, str],
    lines: dict[str, list[dict[str, Any]]],
    looks: Mapping[str, style.Look],
    usual: tuple[Any, ...],
) -> list[tuple[str, float, float]]:
    """Draws what is measured against what.

    Returns:
        What may be written beside each point: its steps, or the number of the job.
    """
    across, up = panel
    found: list[tuple[str, float, float]] = []
    ticks: list[int] = []
    for name, line in lines.items():
        values = [(job, _value(job, across), _value(job, up)) for job in line]
        known = [(j, x, y) for j, x, y in values if x is not None and y is not None]
        known.sort(key=lambda entry: entry[1] if across != "entropy" else 0)
        for hollow in (False, True):
            some = [x for x in known if (_setting(x[0]) != usual) == hollow]
            style.points(
                axes,
                [x for _, x, _ in some],
                [y for _, _, y in some],
                looks[name],
                x_errors=[job["numbers"].get(f"{across}_stderr") for job, _, _ in some],
                y_errors=[job["numbers"].get(f"{up}_stderr") for job, _, _ in some],
                hollow=hollow,
                joined=across == "steps",
            )
        found += [(str(_steps(j) or j["job"]), x, y) for j, x, y in known]
        ticks += [int(x) for _, x, _ in known]
    axes.set(xlabel=AXES[across], ylabel=AXES[up])
    if across == "steps" and ticks:
        style.steps_axis(axes, ticks)
    if across == "job":
        axes.set_xticks(sorted(set(ticks)))
    if up != "entropy":
        style.numbers_axis(axes, "y", [y for _, _, y in found])
    return found


def _value(job: dict[str, Any], name: str) -> Any:
    own = {"steps": _steps(job), "job": job["job"]}
    return own[name] if name in own else job["numbers"].get(name)


def _steps(job: dict[str, Any]) -> int | None:
    """How many steps the job was asked for, if that was on the command line."""
    text = job["overrides"].get("sampling.steps")
    try:
        return int(text) or None
    except (TypeError, ValueError):
        return None


def _setting(job: dict[str, Any]) -> tuple[Any, ...]:
    """Samples compare where this is the same."""
    about = job.get("about", {})
    return tuple(about.get(key) for key in ("data", "tokenizer", "length", "judge"))


def _title(jobs: list[dict[str, Any]]) -> list[str]:
    """Model, data and judge, where all or a few are the same."""
    found = []
    for key in ("algo", "data", "judge"):
        values = dict.fromkeys(job.get("about", {}).get(key) for job in jobs)
        names = [str(value) for value in values if value]
        if 0 < len(names) <= 3:
            found.append(f"{'judge: ' * (key == 'judge')}{' / '.join(names)}")
    return [f"samples of {len(jobs)} jobs", "; ".join(found)]


# Keys of which the value alone says what a line is.
_TELLING = ("algo", "eval.checkpoint_path", "sampling.predictor")


def _lines(jobs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Jobs that differ in steps alone, by what else was asked for."""
    rows = [job["overrides"] for job in jobs]
    short = {key: short_paths([row.get(key) for row in rows]) for key in _swept(jobs)}
    short.pop("sampling.steps", None)
    is_plain = len(short) == 1 and next(iter(short)) in _TELLING
    lines: dict[str, list[dict[str, Any]]] = {}
    for index, job in enumerate(jobs):
        parts = [
            f"{'' if is_plain else key.split('.')[-1] + '='}{values[index]}"
            for key, values in short.items()
        ]
        name = ", ".join(parts) or job.get("about", {}).get("algo") or "samples"
        lines.setdefault(name, []).append(job)
    return lines
