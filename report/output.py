"""What a report leaves: tables on the screen, and report.md, .csv, .tex, .png, .pdf."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metrics.numbers import measured
from report.formats import (
    difference,
    latex,
    markdown,
    print_files,
    print_notes,
    print_table,
    screen,
)
from report.plots import draw, label_of
from report.tables import TABLES
from report.verdicts import RULE, UNPUBLISHED, Row, other_rows
from utils import whole_file

COLUMNS = (
    *("table", "model", "dataset", "steps", "round", "metric"),
    *("paper", "source", "note", "measured", "stderr", "difference", "verdict"),
    *("reason", "file"),
)
PLUS_MINUS = "±: one standard error; bars in the picture are two."
APART = "†: not comparable; the table below says why."
ABOUT = (  # of a file
    *("checkpoint", "step", "weights", "distilled", "estimator", "precision"),
    *("tokenizer", "length", "wrap", "judge", "ngram_order", "draws", "samples"),
    *("seed", "rows", "tokens", "sha256"),
)
_SAID_ONCE = ("dataset", "round", "metric", "source", "verdict")
NAMES = ("model", "dataset", "steps", "round", "metric")  # of the lines of a table


def save(rows: Sequence[Row], drawn: Sequence[Row], folder: str) -> None:
    """Prints tables, and writes the files of a report.

    Args:
        rows: Of the report.
        drawn: Further ones for the picture.
        folder: Local or fsspec.
    """
    with whole_file(f"{folder}/report.csv", "w") as file:
        writer = csv.DictWriter(
            file, COLUMNS, extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(row.record() for row in rows)
    tables = {name: [row for row in rows if row.table == name] for name in TABLES}
    tables = {name: some for name, some in tables.items() if some}
    notes = [*other_rows(rows), PLUS_MINUS, RULE]
    console, latexes = screen(), []
    # On the page of the picture no path is needed.
    parts = ["# Measured beside published", "![what the tables say](report.png)"]
    for name, some in tables.items():
        header, cells, reasons = layout(some)
        title = f"{name}: {TABLES[name].title}"
        narrowed, shown, lines, keys = narrow(title, header, cells)
        print_table(console, narrowed, shown, lines, keys)
        print_notes(console, reasons)
        parts += [f"## {title}"]
        for metric, heads, grid in grids(some):
            label = label_of(name, metric)
            parts += [f"Measured (paper), {label}:", markdown(heads, grid)]
            latexes.append(latex(f"{TABLES[name].title}: {label}", heads, grid))
            marked = any("†" in text for line in grid for text in line)
            parts += [APART] if marked else []
        parts += [markdown(header, cells), *reasons]
    print_notes(console, notes)
    files = [f"{folder}/report.{end}" for end in ("md", "csv", "tex")]
    with whole_file(files[0], "w") as file:
        file.write("\n\n".join([*parts, *notes, "## Files", files_of(rows)]) + "\n")
    with whole_file(files[2], "w") as file:
        file.write("\n\n".join(latexes) + "\n")
    titles = {name: TABLES[name].title for name in tables}
    files += draw([row.record() for row in (*rows, *drawn)], titles, f"{folder}/report")
    print_files(console, "report", files)


# ---------------------------------------------------------------- lines


def layout(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Header and lines of a table, without columns that say nothing, and the reasons
    that its verdicts give as numbers."""
    reasons: dict[str, int] = {}
    lines = [_line(row, reasons) for row in rows]
    kept = [name for name in lines[0] if any(line[name] for line in lines)]
    if all(line["metric"] == "ppl" for line in lines):
        kept.remove("metric")
    told = [f"({number}) {reason}." for reason, number in reasons.items()]
    return kept, [[line[name] for name in kept] for line in lines], told


def _line(row: Row, reasons: dict[str, int]) -> dict[str, str]:
    """A row as text, by column; its reason is a number, which is noted."""
    record = row.record()
    line = {name: record[name] for name in COLUMNS[1:] if name not in _WORKED_IN}
    if row.measured:
        line["measured"] = measured(*row.measured)
        if row.published:
            line["difference"] = difference(row.measured[0], row.published.value)
    says_more = row.verdict != "unpublished" or not row.reason.startswith(UNPUBLISHED)
    if row.reason and says_more:
        line["verdict"] += f" ({reasons.setdefault(row.reason, len(reasons) + 1)})"
    line["note"] = line.pop("note")  # last
    return {name: text or "" for name, text in line.items()}


_WORKED_IN = ("stderr", "reason", "file")  # into other columns, or shown elsewhere


def narrow(
    title: str, header: Sequence[str], cells: Sequence[Sequence[str]]
) -> tuple[str, list[str], list[list[str]], int]:
    """For the screen: what is the same in every line is said once, in the title.

    Returns:
        Title, header and lines, and how many columns say which line it is.
    """
    columns = list(zip(header, zip(*cells, strict=True), strict=True))
    same = [
        (name, column)
        for name, column in columns
        if name in _SAID_ONCE and len(cells) > 1
        if len(set(column)) == 1
    ]
    said = ", ".join(f"{name} {column[0]}" for name, column in same)
    shown = [pair for pair in columns if pair not in same]
    # What matters most comes first, where a terminal has no room for all.
    order = [*NAMES, "paper", "measured", "verdict"]
    shown.sort(key=lambda x: order.index(x[0]) if x[0] in order else len(order))
    names = [name for name, _ in shown]
    lines = [list(line) for line in zip(*(column for _, column in shown), strict=True)]
    keys = sum(name in NAMES for name in names)
    return (f"{title}; {said}" if said else title), names, lines, keys


# ---------------------------------------------------------------- grids


def grids(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """As in the papers, a grid a metric: (metric, header, lines).

    Models by data sets, or by steps where there are some; what was measured has the
    paper's number behind it in brackets, and a dagger if the two do not compare.
    """
    found = []
    for metric in dict.fromkeys(row.cell[-1] for row in rows):
        some = [row for row in rows if row.cell[-1] == metric]
        if any(row.evaluation for row in some):
            found.append((metric, *_grid(some)))
    return found


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    is_stepped = any(row.cell[2] for row in rows)
    several = len({row.cell[1] for row in rows}) > 1
    cells: dict[tuple[str, str], Row] = {}
    for row in rows:
        model, dataset, steps, number, _ = row.cell
        name = model + (f", round {number}" if number else "")
        name += f"; {dataset}" if is_stepped and several else ""
        place = (name, steps if is_stepped else dataset)
        before = cells.get(place)
        # Of several sources the first; what was measured and compares goes before.
        if before is None or _worth(row) > _worth(before):
            cells[place] = row
    names = list(dict.fromkeys(name for name, _ in cells))
    heads = list(dict.fromkeys(head for _, head in cells if head))
    if is_stepped:
        heads.sort(key=int)
    else:
        order = list(TABLES[rows[0].table].columns)
        heads.sort(key=lambda head: order.index(head) if head in order else len(order))
    compare = any(row.fits or row.published for row in cells.values())
    mark = "†" if compare else ""  # nothing is marked where all would be
    lines = [
        [name, *(_cell(cells.get((name, head)), mark) for head in heads)]
        for name in names
    ]
    return ["model, steps" if is_stepped else "model", *heads], lines


def _worth(row: Row) -> tuple[bool, bool]:
    return row.evaluation is not None, row.fits


def _cell(row: Row | None, mark: str) -> str:
    if row is None:
        return "-"
    paper = f"({row.published.value})" if row.published else ""
    if not row.measured:
        return paper
    text = measured(*row.measured) + ("" if row.fits else mark)
    return f"{text} {paper}".rstrip()


# ---------------------------------------------------------------- files


def files_of(rows: Iterable[Row]) -> str:
    """A table of the evaluations and of what their numbers are, in Markdown; columns
    that are empty are left out."""
    seen = {row.evaluation.path: row.evaluation for row in rows if row.evaluation}
    every = [one.settings for one in seen.values()]
    names = [name for name in ABOUT if any(x.get(name) is not None for x in every)]
    lines = []
    for path, one in seen.items():
        values = (part_of(one.settings, name) for name in names)
        lines.append([path, *("-" if x is None else str(x) for x in values)])
    return markdown(["file", *names], lines)


def part_of(settings: Mapping[str, Any], name: str) -> Any:
    """A setting; of rows and tokens also how many of them were measured."""
    value, rows = settings.get(name), settings.get("rows")
    measured = settings.get("measured_rows")
    if name not in ("rows", "tokens") or measured in (None, rows):
        return value
    return f"{settings[f'measured_{name}']} of {value}"
