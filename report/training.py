"""`report.table=training`: curves of runs, from the CSV files that they have logged."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from omegaconf import OmegaConf

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
from report.runs import files_called
from utils import ConfigError, first_line, open_file, whole_file

LOG = "metrics.csv"
# Panels: columns, of which a run has the first that it has logged, and their label.
PANELS = {
    "validation perplexity (a token)": ("val/ppl",),
    "validation, bits per dimension": ("val/bpd",),
    "training loss (nats a token)": ("train/nll",),
    "objective of distillation": ("train/distillation_loss", "trainer/loss"),
    "generative perplexity of samples (a token)": ("val/gen_ppl",),
    "entropy of samples (nats a token)": ("val/sample_entropy",),
}
# Panels that a run is in only if it is not in the other.
ELSE = {
    "validation, bits per dimension": "validation perplexity (a token)",
    "objective of distillation": "training loss (nats a token)",
}
SHOWN = ("val/ppl", "val/bpd", "train/nll", "val/gen_ppl", "val/sample_entropy")
MARKERS = 8  # on a long line


class Point(NamedTuple):
    updates: int
    value: float
    error: float | None  # standard error


class Run(NamedTuple):
    """What one run has logged."""

    name: str
    algo: str
    data: str
    curves: dict[str, list[Point]]  # by column, in the order of updates


# ---------------------------------------------------------------- reading


def read_logs(runs: Sequence[tuple[str | None, str]]) -> list[Run]:
    """Runs that `report.runs` names: their folders, folders of these, or CSV files.

    Args:
        runs: (what the user calls it, or None; path, local or on fsspec).

    Raises:
        ConfigError: If a path leads to no log, or a log cannot be read.
    """
    found: dict[str, tuple[str | None, list[str]]] = {}
    for name, path in runs:
        by_folder: dict[str, list[str]] = {}
        for file in files_called(LOG, path):
            if file.endswith(".csv"):
                by_folder.setdefault(_folder(file), []).append(file)
        if not by_folder:
            raise ConfigError(f"report.runs={path!r}: no {LOG} of logger=csv is there.")
        for folder, files in by_folder.items():
            label = name
            if name is not None and len(by_folder) > 1:
                label = f"{name}, {PurePosixPath(folder).name}"
            found[folder] = label, files
    folders = list(found)
    short = short_paths(folders) if len(folders) > 1 else [None]
    read: list[Run] = []
    for folder, part in zip(folders, short, strict=True):
        label, files = found[folder]
        algo, data = _about(folder)
        label = label or part or algo or PurePosixPath(folder).name
        same = sum(run.name.partition(" (")[0] == label for run in read)
        label += f" ({same + 1})" if same else ""
        read.append(Run(label, algo, data, _curves(files)))
    return read


def _version(file: str) -> int:
    found = re.fullmatch(r"version_(\d+)", PurePosixPath(file).parent.name)
    return int(found[1]) if found else -1


def _folder(file: str) -> str:
    """Of the run: above csv/version_N/metrics.csv, or where another file is."""
    parts = file.split("/")
    return "/".join(parts[: -3 if _version(file) >= 0 else -1])


def _about(folder: str) -> tuple[str, str]:
    """Algorithm and data of a run, empty where it does not say."""
    try:
        with open_file(f"{folder}/.hydra/config.yaml", "r", encoding="utf-8") as file:
            config = OmegaConf.create(file.read())
        node: Any = OmegaConf.to_container(config)
        values = [node["algo"]["name"], node["data"]["valid"]]
    except Exception:  # of a file that may hold anything, and only names things
        return "", ""
    algo, data = (x if isinstance(x, str) and "${" not in x else "" for x in values)
    return algo, data


def _curves(files: Sequence[str]) -> dict[str, list[Point]]:
    """Of a run, which may have been resumed: a later log replaces an earlier's end."""
    rows: list[dict[str, float]] = []
    for path in sorted(files, key=_version):
        try:
            with open_file(path, "r", encoding="utf-8", newline="") as file:
                new = [_numbers(row) for row in csv.DictReader(file)]
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError(
                f"report.runs: {path} cannot be read ({first_line(error)}). "
                "Leave it out."
            ) from None
        new = [row for row in new if "step" in row]
        if new:
            start = min(row["step"] for row in new)
            rows = [row for row in rows if row["step"] < start] + new
    curves: dict[str, dict[int, Point]] = {}
    for row in rows:
        updates = int(row["step"]) + 1
        for name, value in row.items():
            if name in ("step", "epoch") or name.endswith("_stderr"):
                continue
            point = Point(updates, value, row.get(f"{name}_stderr"))
            curves.setdefault(name, {})[updates] = point
    return {k: sorted(points.values()) for k, points in curves.items()}


def _numbers(row: Mapping[Any, Any]) -> dict[str, float]:
    """The finite numbers of a line."""
    found = {k: float(x) for k, x in row.items() if k and x not in (None, "")}
    return {k: x for k, x in found.items() if math.isfinite(x)}


# ---------------------------------------------------------------- output


def save(runs: Sequence[Run], folder: str) -> None:
    """Prints a table of runs, and writes report.md, .csv, .tex, .png and .pdf.

    Args:
        runs: From `read_logs`.
        folder: Local or fsspec.
    """
    files = [f"{folder}/report.{end}" for end in ("md", "csv", "tex")]
    header, lines = table(runs)
    console = screen()
    title = "training: the last and the best of what was logged; ±: one standard error"
    print_table(console, title, header, lines)
    parts = ["# Training", "![curves of the runs](report.png)"]
    with whole_file(files[0], "w") as file:
        file.write("\n\n".join([*parts, title, markdown(header, lines)]) + "\n")
    with whole_file(files[1], "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "algo", "data", "metric", "updates", "value", "stderr"])
        for run in runs:
            for name, points in run.curves.items():
                head = run.name, run.algo, run.data, name
                writer.writerows([*head, *point] for point in points)
    with whole_file(files[2], "w") as file:
        file.write(latex(title, header, lines) + "\n")
    files += draw(runs, f"{folder}/report")
    print_files(console, "report", files)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: last numbers of each run, and its best perplexity."""
    names = [name for name in SHOWN if any(run.curves.get(name) for run in runs)]
    best = [x for x in ("val/ppl", "val/bpd") if x in names][:1]
    header = ["run", "algo", "data", "updates", *names]
    header += [f"best {name} (updates)" for name in best]
    lines = []
    for run in runs:
        updates = max((x[-1].updates for x in run.curves.values()), default=0)
        line = [run.name, run.algo or "-", run.data or "-", str(updates)]
        for name in names:
            points = run.curves.get(name)
            line.append(measured(*points[-1][1:]) if points else "-")
        for name in best:
            points = run.curves.get(name)
            lowest = min(points, key=lambda point: point.value) if points else None
            text = f"{measured(*lowest[1:])} ({lowest.updates})" if lowest else "-"
            line.append(text)
        lines.append(line)
    return header, lines


def draw(runs: Sequence[Run], stem: str) -> list[str]:
    """Writes STEM.png and STEM.pdf: a panel for each quantity, against updates."""
    panels: dict[str, list[tuple[str, list[Point]]]] = {}
    placed: set[tuple[str, str]] = set()
    for label, columns in PANELS.items():
        for run in runs:
            column = next((x for x in columns if run.curves.get(x)), None)
            if column and (run.name, ELSE.get(label, "")) not in placed:
                placed.add((run.name, label))
                panels.setdefault(label, []).append((run.name, run.curves[column]))
    if not panels:
        raise ConfigError(
            "report.table=training: the logs hold neither losses nor perplexities."
        )
    looks = style.looks(run.name for run in runs)
    data = dict.fromkeys(run.data for run in runs if run.data)
    names = [run.name for run in runs]
    what = " / ".join(names) if len(names) <= 3 else f"{len(names)} runs"
    rows = style.rows(len(panels))
    with style.drawing() as pyplot:
        height = 1.3 + 2.7 * rows + 0.1 * len(runs)
        figure = pyplot.figure(figsize=(style.WIDTH, height), layout="constrained")
        has_errors = False
        for axes, (label, lines) in zip(
            style.panels(figure, len(panels)), panels.items(), strict=True
        ):
            for name, points in lines:
                x, y, errors = zip(*points, strict=True)
                has_errors |= any(errors)
                every = max(1, len(points) // MARKERS)
                style.points(axes, x, y, looks[name], y_errors=errors, every=every)
            axes.set(xlabel="updates", ylabel=label)
            values = [point.value for _, points in lines for point in points]
            style.numbers_axis(axes, "y", values)
        style.title(figure, "training", "; ".join([what, *data]))
        style.legend(figure, looks, [style.BARS] if has_errors else [])
        return style.save(figure, stem)
