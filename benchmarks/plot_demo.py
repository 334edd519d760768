"""Draws docs/figures/demo.png from the table of the demo in README.md.

    python benchmarks/plot_demo.py

The numbers stand in README.md alone, so the picture cannot differ from the table. Run
the script again after the table has changed.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from report import style  # noqa: E402

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
    """Writes the picture, and a PDF beside it.

    Args:
        curves: One line each, of values with one standard error.
        held_out: Drawn as a horizontal line.
        path: Of the PNG file.
    """
    looks = style.looks(curve.label for curve in curves)
    with style.drawing() as pyplot:
        figure = pyplot.figure(figsize=(6, 4), layout="constrained")
        (axes,) = style.panels(figure, 1)
        for curve in curves:
            x, y = curve.steps, curve.perplexities
            style.points(axes, x, y, looks[curve.label], y_errors=curve.errors)
        axes.axhline(held_out, color=style.GREY, linestyle="-")
        style.steps_axis(axes, curves[0].steps)
        axes.set_ylabel("5-gram perplexity (a character)")
        style.numbers_axis(axes, "y", [held_out, *curves[0].perplexities])
        what = "docstrings; judge: 5-gram model of the training data"
        style.title(figure, "samples of the demo's models", what)
        style.legend(figure, looks, ["held-out text", style.BARS])
        style.save(figure, str(path.with_suffix("")))


def main() -> None:
    """Draws the figure of README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, default=FIGURE, help="where to write")
    args = parser.parse_args()
    readme = (ROOT / "README.md").read_text()
    draw(read_curves(readme), read_held_out(readme), args.path)


if __name__ == "__main__":
    main()
