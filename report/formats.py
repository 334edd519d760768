"""Numbers and tables as text: one style on the screen, in Markdown and in LaTeX."""

import itertools
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from utils import printable

# ---------------------------------------------------------------- numbers


def difference(value: float, paper: str) -> str:
    """With its sign and the digits of the paper."""
    text = f"{value - float(paper):+.{len(paper.partition('.')[2])}f}"
    return f"+{text[1:]}" if float(text) == 0 else text


# ---------------------------------------------------------------- names


def short_paths(values: Sequence[str | None]) -> list[str | None]:
    """Paths without the folders in front and behind that all of them share."""
    paths = [value for value in values if value is not None and "/" in value]
    if len(paths) < len(values):
        return list(values)
    parts = [path.split("/") for path in paths]
    front = _num_shared(parts)
    back = _num_shared([part[front:][::-1] for part in parts])
    return ["/".join(part[front : len(part) - back]) or "." for part in parts]


def _num_shared(rows: list[list[str]]) -> int:
    """How many entries at their beginnings all rows have in common."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, same))


# ---------------------------------------------------------------- tables


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    rows = [header, ["---"] * len(header), *lines]
    clean = ([x.replace("|", "\\|").replace("\n", " ") for x in row] for row in rows)
    clean = ([printable(x, keep="") for x in row] for row in clean)
    return "\n".join(f"| {' | '.join(row)} |" for row in clean)


# Letters that mean something to LaTeX, or that it has only in its mathematics.
_LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": "$\\pm$",
        "†": "$\\dagger$",
    }
)


def latex(caption: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table that needs no package; the first column is of texts."""
    body = [" & ".join(map(_for_latex, line)) + r" \\" for line in (header, *lines)]
    return "\n".join(
        (
            *(r"\begin{table}", r"\centering", rf"\caption{{{_for_latex(caption)}}}"),
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            *(r"\hline", body[0], r"\hline", *body[1:], r"\hline"),
            *(r"\end{tabular}", r"\end{table}"),
        )
    )


def _for_latex(text: str) -> str:
    return printable(text, keep="").translate(_LATEX)


# ---------------------------------------------------------------- the screen


def screen() -> Console:
    """A terminal as wide as it is; what goes to a file or a pipe is never cut."""
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=100_000, emoji=False)


def cell(value: object) -> str:
    """What stands in a table: no markup, and nothing that a screen would obey."""
    return escape(printable(value))


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Sentences below a table, as they are."""
    for note in notes:
        console.print(printable(note), markup=False, highlight=False)


def print_files(console: Console, what: str, paths: Iterable[object]) -> None:
    """Where files are, on one line."""
    console.print(f"{what}:", *map(cell, paths), soft_wrap=True, highlight=False)


def print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    keys: int = 1,
) -> None:
    """A table; where it is too wide its columns go on in further ones below.

    Args:
        console: Of `screen`.
        title: Above the first.
        header, lines: Texts.
        keys: How many of the first columns say which line it is, in every part.
    """
    widths = [
        3 + max((len(x) for text in column for x in text.split("\n")), default=0)
        for column in zip(header, *lines, strict=True)
    ]
    parts: list[list[int]] = [[]]
    taken = start = 1 + sum(widths[:keys])
    for index in range(keys, len(header)):
        if parts[-1] and taken + widths[index] > console.width:
            parts.append([])
            taken = start
        parts[-1].append(index)
        taken += widths[index]
    for count, part in enumerate(parts):
        table = Table(title=cell(title) if count == 0 else None)
        shown = [*range(keys), *part]
        for index in shown:
            table.add_column(cell(header[index]), overflow="fold")
        for line in lines:
            table.add_row(*(cell(line[index]) for index in shown))
        console.print(table)
