"""Draws docs/figures/demo.png from the table of the demo in README.md.

    python benchmarks/plot_demo.py

The numbers stand in README.md alone, so the picture cannot differ from the table. Run
the script again after the table has changed.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "demo.png"


class Curve(NamedTuple):
    """One row of the table: perplexities of samples, with their standard errors."""

    label: str
    steps: list[int]
    perplexities: list[float]
    errors: list[float]


def read_curves(readme: str) -> list[Curve]:
    """The rows of README's table of the demo, in its order.

    Args:
        readme: Text of README.md. The head of the table names the numbers of steps,
            `| ... | 8 steps | 64 steps |`; a cell is `133.5 ± 5.1`.
    """
    head = re.search(r"^\|.*\d+ steps.*$", readme, re.M)
    steps = [int(number) for number in re.findall(r"(\d+) steps", head[0])]
    curves = []
    for row in readme[head.end() :].strip().splitlines()[1:]:
        cells = re.findall(r"([\d.]+) ± ([\d.]+)", row)
        if not row.startswith("|") or not cells:
            break
        values, errors = zip(*((float(v), float(e)) for v, e in cells), strict=True)
        label = row.split("|")[1].strip()
        curves.append(Curve(label, steps, list(values), list(errors)))
    return curves


def read_held_out(readme: str) -> float:
    """Perplexity of held-out text under the same judge, as README.md states it."""
    found = re.search(
        r"held-out text has a perplexity of (\d+\.\d+)", " ".join(readme.split())
    )
    return float(found[1])


def draw(curves: list[Curve], held_out: float, path: Path) -> None:
    """Writes the picture.

    Args:
        curves: One line each, with bars of one standard error.
        held_out: Drawn as a horizontal line.
        path: Of the PNG file.
    """
    figure, axes = plt.subplots(figsize=(5.5, 3.4), constrained_layout=True)
    for curve, marker in zip(curves, "os^D", strict=False):
        axes.errorbar(
            curve.steps,
            curve.perplexities,
            curve.errors,
            label=curve.label,
            marker=marker,
            capsize=3,
        )
    axes.axhline(held_out, color="gray", linestyle="--", label="held-out text")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = curves[0].steps
    axes.set_xticks(ticks, labels=list(map(str, ticks)))
    shown = (4, 10, 20, 50, 100)
    axes.set_yticks(shown, labels=list(map(str, shown)))
    axes.minorticks_off()
    axes.set_xlabel("sampling steps")
    axes.set_ylabel("perplexity of samples")
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.32))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draws the figure of README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=FIGURE, help="where to write")
    args = parser.parse_args()
    readme = (ROOT / "README.md").read_text()
    draw(read_curves(readme), read_held_out(readme), args.path)


if __name__ == "__main__":
    main()
