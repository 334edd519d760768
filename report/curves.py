"""Reports of functions, which need no run: `report.table=schedules`, and what others of
the kind are made of.
"""

import csv
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf

from models.noise import build_noise
from report import style
from report.formats import (
    latex,
    markdown,
    print_files,
    print_notes,
    print_table,
    screen,
)
from utils import ADDED, CONFIGS, choices_of, whole_file

POINTS = 401  # of a curve
MARKERS = 8  # on a curve


class Panel(NamedTuple):
    """One of several beside each other: curves over the same quantity."""

    x_label: str  # with its unit
    y_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]  # by name: x and y


class Curves(NamedTuple):
    """What a report of functions shows."""

    title: str
    of: str  # in a second line of the picture
    panels: Sequence[Panel]
    header: Sequence[str]  # of a table of a few values
    lines: Sequence[Sequence[str]]
    notes: Sequence[str]


def save_curves(shown: Curves, folder: str) -> None:
    """Prints the table, and writes report.md, .csv, .tex, .png and .pdf.

    Args:
        shown: The functions.
        folder: Local or fsspec.
    """
    files = [f"{folder}/report.{end}" for end in ("md", "csv", "tex")]
    console = screen()
    print_table(console, shown.title, shown.header, shown.lines)
    print_notes(console, shown.notes)
    parts = [f"# {shown.title}", f"![{shown.of}](report.png)"]
    parts += [markdown(shown.header, shown.lines), *shown.notes]
    with whole_file(files[0], "w") as file:
        file.write("\n\n".join(parts) + "\n")
    with whole_file(files[1], "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["curve", "x", "y", "value of x", "value of y"])
        for panel in shown.panels:
            for name, (x, y) in panel.curves.items():
                head = name, panel.x_label, panel.y_label
                writer.writerows(
                    [*head, *map(float, p)] for p in zip(x, y, strict=True)
                )
    with whole_file(files[2], "w") as file:
        file.write(latex(shown.title, shown.header, shown.lines) + "\n")
    files += draw_curves(shown, f"{folder}/report")
    print_files(console, "report", files)


def draw_curves(shown: Curves, stem: str) -> list[str]:
    """Writes STEM.png and STEM.pdf; a curve has one look in all panels."""
    looks = style.looks(name for panel in shown.panels for name in panel.curves)
    with style.drawing() as pyplot:
        height = 1.2 + 2.9 * style.rows(len(shown.panels)) + 0.1 * len(looks)
        figure = pyplot.figure(figsize=(style.WIDTH, height), layout="constrained")
        grid = style.panels(figure, len(shown.panels))
        for axes, panel in zip(grid, shown.panels, strict=True):
            for name, (x, y) in panel.curves.items():
                every = max(1, len(x) // MARKERS)
                style.points(axes, x, y, looks[name], every=every)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        style.title(figure, shown.title, shown.of)
        style.legend(figure, looks)
        return style.save(figure, stem)


# ---------------------------------------------------------------- noise schedules

SHOWN_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


def schedules(config: DictConfig) -> Curves:
    """alpha_t and its rate for every schedule with the settings of its file; the one
    that `noise=` chooses with those of the command.

    Args:
        config: The run's config.
    """
    t = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    levels: dict[str, tuple[list[float], list[float]]] = {}
    lines = []
    for name in choices_of("noise"):
        settings = _settings(name)
        is_chosen = settings.get("type") == config.noise.type
        noise = build_noise(config.noise if is_chosen else settings)
        alpha_t, dalpha_t = noise(t)
        levels[name] = alpha_t.tolist(), (-dalpha_t).tolist()
        few = noise(torch.tensor(SHOWN_TIMES, dtype=torch.float64)).alpha_t.tolist()
        half = float(noise.inverse(torch.tensor(0.5, dtype=torch.float64)))
        fastest = float(-dalpha_t.min())
        lines.append([name, *(f"{x:.4g}" for x in (*few, half, fastest))])
    times = t.tolist()
    alphas = {name: (times, alpha) for name, (alpha, _) in levels.items()}
    rates = {name: (times, rate) for name, (_, rate) in levels.items()}
    x_label = "time t (0: clean, 1: noise)"
    return Curves(
        "noise schedules",
        "settings of configs/noise; of the chosen one those of the command",
        [
            Panel(x_label, "alpha_t (probability of a clean token)", alphas),
            Panel(x_label, "-d alpha_t / dt (per unit of time)", rates),
        ],
        ["schedule", *(f"alpha at {x:g}" for x in SHOWN_TIMES), "t at 1/2", "max rate"],
        lines,
        [
            "alpha_t: the probability that a token is still clean at time t; rate: "
            "-d alpha_t / dt, the share of tokens that become noise per unit of time."
        ],
    )


def _settings(name: str) -> DictConfig:
    """The node that `noise=NAME` chooses, of ours or of a plug-in."""
    if name in ADDED.get("noise", {}):
        return OmegaConf.create(ADDED["noise"][name])
    return cast(DictConfig, OmegaConf.load(CONFIGS / "noise" / f"{name}.yaml"))
