"""How every picture of the project looks, whatever it shows.

A model has one colour and one marker in all panels and figures. Filled points that a
line joins compare with each other; hollow ones, which no line joins, do not. Dashes and
crosses are numbers of papers. The colours differ for colour-blind eyes, the markers in
grey; legends stand below the data, and every picture is a PNG and a PDF.
"""

import io
import logging
import math
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from utils import printable, whole_file

WIDTH = 8.0  # inches; the letters are still read where 80 columns of text have room
PANELS = 2  # in a row
DPI = 120
COLOURS_OF_A_FILE = 128
ERRORS = 2  # standard errors that a bar is long, to either side
BARS = f"bar: ± {ERRORS} standard errors"
PAPER = "paper"
PLAIN = "plain PyTorch"  # of benchmarks, which draw it as the numbers of papers
HOLLOW = "hollow: does not compare with the others"
GREY = "#555555"

# Of Okabe and Ito, without the yellow, which is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", ">", "*", "<", "X", "P")
# Of names that are known: the numbers of a colour and of a marker. Forms of one model
# share its colour; what often stands in one figure differs in its marker as well.
KNOWN = {
    "duo": (0, 0),
    "duo, greedy tail": (0, 8),
    "mdlm": (1, 1),
    "mdlm, greedy tail": (1, 9),
    "ar": (6, 2),
    "sedd absorb": (2, 3),
    "sedd uniform": (2, 4),
    "d3pm absorb": (3, 4),
    "duo+dcd": (4, 5),
    "duo+dcd, greedy tail": (4, 3),
    "mdlm+sdtt": (5, 6),
    "mdlm+dimo": (3, 7),
}
# Of samplers in figures of their own; those that choose the order share a colour.
SAMPLERS = {
    "ar": KNOWN["ar"],
    "duo, ancestral": (0, 0),
    "duo, psi": (4, 4),
    "duo, ancestral + gibbs": (2, 3),
    "mdlm, ancestral": (1, 1),
    "mdlm, psi": (5, 5),
    "mdlm, confidence": (3, 6),
    "mdlm, entropy_bound": (3, 8),
}
ALIASES = {
    "duo_base": "duo",
    "sedd": "sedd absorb",
    "d3pm": "d3pm absorb",
    **dict.fromkeys(("distillation", "dcd", "duo, dcd", "duo, distilled"), "duo+dcd"),
    **dict.fromkeys(("sdtt", "mdlm, sdtt"), "mdlm+sdtt"),
    **dict.fromkeys(("dimo", "mdlm, di[m]o"), "mdlm+dimo"),
    **{
        f"duo_base, {x}": f"duo, {x}" for x in ("ancestral", "psi", "ancestral + gibbs")
    },
}
SETTINGS: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "errorbar.capsize": 3,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "pdf.fonttype": 42,  # letters that can be searched and edited
    "text.parse_math": False,  # names of runs may hold dollar signs
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


class Look(NamedTuple):
    """Of a model."""

    color: str
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """One look for each name, which depends on the others as little as can be.

    Known models have looks of their own. Another name begins with one that its letters
    give, and goes on to the next while its colour or its marker is taken, as long as
    there are others.
    """
    names, unknown = list(dict.fromkeys(names)), []
    found: dict[str, Look] = {}
    for name in names:
        key = name.casefold()
        key = ALIASES.get(key, key)
        numbers = KNOWN.get(key) or SAMPLERS.get(key)
        look = numbers and Look(COLOURS[numbers[0]], MARKERS[numbers[1]])
        if look is None or look in found.values():
            unknown.append(name)
        else:
            found[name] = look
    for name in sorted(unknown):
        start = zlib.crc32(name.encode())
        numbers_on = range(start, start + len(COLOURS) * len(MARKERS))
        every = [
            Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
            for i in numbers_on
        ]
        colours = {look.color for look in found.values()}
        markers = {look.marker for look in found.values()}
        free = [x for x in every if x.color not in colours and x.marker not in markers]
        free += [x for x in every if x.color not in colours]
        free += [x for x in every if x not in found.values()]
        found[name] = (free or every)[0]
    return {name: found[name] for name in names}


# ---------------------------------------------------------------- figures


@contextmanager
def drawing() -> Iterator[Any]:
    """pyplot, for as long as a picture is made, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of each glyph
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield pyplot


def rows(count: int) -> int:
    """How many rows of `PANELS` a number of panels takes."""
    return math.ceil(count / PANELS)


def panels(part: Any, count: int) -> list[Any]:
    """Axes in rows of `PANELS`.

    Args:
        part: A figure, or a part of one.
        count: How many.
    """
    across = min(count, PANELS)
    grid = part.subplots(rows(count), across, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.remove()
    return list(grid[:count])


def save(figure: Any, stem: str) -> list[str]:
    """Writes STEM.png and STEM.pdf, local or on fsspec, and closes the figure.

    Returns:
        The two paths.
    """
    from matplotlib import pyplot
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    paths = [f"{stem}.png", f"{stem}.pdf"]
    with whole_file(paths[0]) as file:  # of few colours it takes a third of the room
        few = Image.open(drawn).convert("RGB").quantize(COLOURS_OF_A_FILE)
        few.save(file, format="png", optimize=True)
    with whole_file(paths[1]) as file:
        figure.savefig(file, format="pdf")
    pyplot.close(figure)
    return paths


def title(part: Any, *lines: str) -> None:
    """What is shown, and of what: model, data, judge; long lines are folded, at
    semicolons if that is enough."""
    width = int(12 * part.bbox.width / part.dpi)
    folded = [x for line in lines for x in folds(clean(line), width)]
    part.suptitle("\n".join(folded), fontsize=11)


def folds(line: str, width: int) -> list[str]:
    """A line as lines of `width` letters at most; words that are longer are cut."""
    lines: list[str] = []
    for text in line.split("; "):
        if lines and len(lines[-1]) + len(text) + 2 <= width:
            lines[-1] += f"; {text}"
        else:
            lines.append(text)
    return [x for text in lines for x in textwrap.wrap(text, width)]


def clean(text: str) -> str:
    """A text of anybody's as one line."""
    return printable(text, keep="")


# ---------------------------------------------------------------- points


def points(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    look: Look,
    *,
    x_errors: Sequence[float | None] | None = None,
    y_errors: Sequence[float | None] | None = None,
    hollow: bool = False,
    joined: bool = True,
    every: int = 1,
) -> None:
    """Measured numbers; bars where standard errors are known, a marker on each
    `every`-th of them."""
    if not len(x):
        return
    bars = [
        [ERRORS * (one or 0) for one in some]
        if some is not None and any(some)
        else None
        for some in (x_errors, y_errors)
    ]
    axes.errorbar(
        *(x, y),
        xerr=bars[0],
        yerr=bars[1],
        color=look.color,
        marker=look.marker,
        markersize=_size(look),
        markerfacecolor="white" if hollow else look.color,
        markeredgecolor=look.color if hollow else "white",  # apart from its bar
        markeredgewidth=1.2 if hollow else 0.6,
        linestyle="-" if joined and not hollow else "none",
        elinewidth=1,
        markevery=every,
    )


def _size(look: Look) -> int:
    """Points of a marker; those of a star make it look smaller."""
    return 11 if look.marker == "*" else 8


def published(axes: Any, x: Sequence[float], y: Sequence[float], look: Look) -> None:
    """Numbers of a paper."""
    axes.plot(x, y, "x--", color=look.color, markersize=5, linewidth=1)


def legend(part: Any, of: Mapping[str, Look], notes: Iterable[str] = ()) -> None:
    """Below the panels: models, and what the signs mean.

    Args:
        part: A figure, or a part of one.
        of: The models.
        notes: Of `PAPER`, `PLAIN`, `HOLLOW` and `BARS`, or texts for a grey line.
    """
    from matplotlib.lines import Line2D

    signs: dict[str, dict[str, Any]] = {
        **{key: {"marker": "x", "ls": "--", "ms": 5} for key in (PAPER, PLAIN)},
        HOLLOW: {"marker": "o", "linestyle": "none", "markerfacecolor": "white"},
        BARS: {"marker": "|", "linestyle": "none", "markersize": 11},
    }
    handles = [
        Line2D(
            [], [], color=look.color, marker=look.marker, ms=_size(look), mec="white"
        )
        for look in of.values()
    ]
    # A text that begins with an underline would be left out.
    labels = [f" {clean(name)}"[name[:1] != "_" :] for name in of]
    for note in notes:
        handles.append(Line2D([], [], color=GREY, **signs.get(note, {})))
        labels.append(note)
    if not labels:
        return
    room = 13 * part.bbox.width / part.dpi  # letters
    across = max(1, int(room // (max(map(len, labels)) + 7)))
    part.legend(handles, labels, loc="outside lower center", ncols=across)


def numbers_axis(axes: Any, which: str, values: Iterable[float]) -> None:
    """Plain numbers; logarithmic where they differ by more than a factor of 5.

    Args:
        axes: The panel.
        which: x or y.
        values: That are shown.
    """
    some = [x for x in values if math.isfinite(x)]
    if not some or min(some) <= 0 or max(some) < 5 * min(some):
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    few = max(some) < 300 * min(some)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def steps_axis(axes: Any, steps: Iterable[int], label: str = "sampling steps") -> None:
    """Logarithmic, with a tick at each number of steps that has room for its own."""
    ticks = sorted(set(steps))
    axes.set(xscale="log", xlabel=label)
    box = axes.get_position()
    inches = box.width * axes.figure.bbox.width / axes.figure.dpi
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    kept = ticks[-1:]
    for tick in reversed(ticks[:-1]):
        room = math.log(kept[-1] / tick) / span * inches
        if room > 0.04 * (len(str(tick)) + len(str(kept[-1]))) + 0.06:
            kept.append(tick)
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.set_xticks([], minor=True)


def label_points(figure: Any, axes: Any, texts: Sequence[tuple[str, Any, Any]]) -> None:
    """Small texts beside points where nothing else is; one with no room is left out.

    Args:
        figure: Of which all else is drawn; its layout is settled by this.
        axes: The panel.
        texts: (text, x, y) in the units of the panel.
    """
    figure.canvas.draw()
    figure.set_layout_engine("none")
    box, renderer = axes.get_window_extent(), figure.canvas.get_renderer()
    scale = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for _, x, y in texts]
    around = [4 * scale * sign for sign in (-1, -1, 1, 1)]
    taken = [
        tuple(x + r for x, r in zip((*c, *c), around, strict=True)) for c in centres
    ]
    for container in axes.containers:  # of points with their bars
        for bars in container.lines[2]:
            for ends in map(axes.transData.transform, bars.get_segments()):
                taken.append((*(ends.min(axis=0) - 1), *(ends.max(axis=0) + 1)))
    for text, x, y in texts:
        for reach in (7, 14):
            for right, up in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)):
                note = axes.annotate(
                    text,
                    (x, y),
                    (right * reach, up * reach),
                    textcoords="offset points",
                    ha=("center", "left", "right")[right],
                    va=("center", "bottom", "top")[up],
                    fontsize=8,
                    color=GREY,
                )
                place = note.get_window_extent(renderer).extents
                if _is_within(place, box.extents) and not any(
                    _overlap(place, other) for other in taken
                ):
                    break
                note.remove()
            else:
                continue
            taken.append(place)
            break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _is_within(a: Sequence[float], b: Sequence[float]) -> bool:
    return b[0] <= a[0] and a[2] <= b[2] and b[1] <= a[1] and a[3] <= b[3]
