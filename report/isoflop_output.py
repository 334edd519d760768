"""What `report.table=isoflop` leaves: a table of optima, one of power laws, one of
runs, and a picture; .md, .csv, .tex, .png and .pdf.
"""

import csv
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from metrics.numbers import measured
from report import style
from report.formats import (
    latex,
    markdown,
    print_files,
    print_notes,
    print_table,
    screen,
)
from report.isoflop import Family, Law, Optimum
from utils import whole_file

TITLE = "the best size for a budget"
RULE = (
    "Of each budget a parabola in the logarithm of the size is fitted to the losses by "
    "least squares; N* is where it is lowest, D* the tokens of a run of that size. "
    "Nothing is said beyond the sizes of the runs."
)
ERRORS = (
    "In brackets, and ±: one standard error, of log N* to first order, from the "
    "scatter of the losses around the parabolas, pooled over the budgets of a curve: "
    "what seeds and the shape of the curve do. What all runs share, as the choice of "
    "validation rows, is not in it. "
    "Exponents have the errors of the optima propagated; of few budgets they are rough."
)
STROKE = "upright stroke: lowest point of a parabola"
MILLION = 1e6


def save(families: Sequence[Family], stem: str) -> None:
    """Prints the tables, and writes STEM.md, .csv, .tex, .png and .pdf.

    Args:
        families: From `report.isoflop.isoflop`.
        stem: Local or fsspec.
    """
    tables = [optima(families), laws(families)]
    notes = [about(families), RULE, ERRORS]
    console = screen()
    print_table(console, TITLE, *tables[0])
    if tables[1][1]:
        print_table(console, "power laws", *tables[1])
    print_notes(console, notes)
    name = stem.rpartition("/")[2]
    parts = [f"# Iso-FLOP: {TITLE}", f"![what the tables say]({name}.png)"]
    parts += [markdown(*tables[0])]
    parts += [markdown(*tables[1])] if tables[1][1] else []
    parts += [*notes, "## Runs", markdown(*runs(families))]
    with whole_file(f"{stem}.md", "w") as file:
        file.write("\n\n".join(parts) + "\n")
    with whole_file(f"{stem}.csv", "w") as file:
        rows = records(families)
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(f"{stem}.tex", "w") as file:
        file.write(latex(TITLE, *tables[0]) + "\n")
    files = [f"{stem}.{end}" for end in ("md", "csv", "tex")] + draw(families, stem)
    print_files(console, "isoflop", files)


# ---------------------------------------------------------------- tables


def optima(families: Sequence[Family]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the optimum of each budget, or why there is none."""
    header = ["curve", "budget (FLOP)", "runs", "N*", "D* (tokens)", "loss there"]
    lines = []
    for family in families:
        for one in family.optima:
            line = [family.name, f"{one.budget:.3g}", str(len(one.runs))]
            if one.parameters is None:
                line += [f"none: {one.why}", "-", "-"]
            else:
                line += [size_of(one), f"{one.tokens:.3g}", measured(one.nll)]
            lines.append(line)
    return header, lines


def size_of(one: Optimum) -> str:
    """N*, and from where to where it is within one standard error of its logarithm."""
    if one.parameters is None:
        return "-"
    if one.log_error is None:
        return f"{one.parameters:.3g}"
    least, most = ends(one, 1)
    return f"{one.parameters:.3g} ({least:.3g} to {most:.3g})"


def ends(one: Optimum, errors: float) -> tuple[float, float]:
    """N* less and more some standard errors, of which the logarithm has them."""
    size, factor = one.parameters or math.nan, math.exp(errors * (one.log_error or 0))
    return size / factor, size * factor


def laws(families: Sequence[Family]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: exponents of curves with optima of two budgets or more."""
    header = ["curve", "budgets", "N* ~ C^a: a", "D* ~ C^b: b"]
    lines = []
    for family in families:
        if family.of_size is not None and family.of_tokens is not None:
            count = sum(x.parameters is not None for x in family.optima)
            exponents = (family.of_size, family.of_tokens)
            told = (measured(law.exponent, law.error) for law in exponents)
            lines.append([family.name, str(count), *told])
    return header, lines


def about(families: Sequence[Family]) -> str:
    """What the losses are of."""
    shared = families[0].optima[0].runs[0].settings
    return (
        f"Loss: val/nll of {shared['data']}, nats a token, {shared['weights']} "
        f"weights, tokenizer {shared['tokenizer']}, rows of {shared['length']} tokens, "
        f"{shared['global_batch_size']} a step. N: parameters without embedding and "
        "head. FLOP: of matrix products in training (docs/scaling.md)."
    )


def runs(families: Sequence[Family]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of all runs."""
    header = ["curve", "budget (FLOP)", "N", "tokens", "seed", "loss"]
    lines = [
        [
            family.name,
            f"{one.budget:.3g}",
            f"{run.parameters:.0f}",
            f"{run.tokens:.0f}",
            str(run.settings["seed"]),
            measured(run.nll, run.nll_error),
        ]
        for family in families
        for one in family.optima
        for run in one.runs
    ]
    return header, lines


def records(families: Sequence[Family]) -> list[dict[str, Any]]:
    """The lines of the CSV: runs, optima, and exponents."""
    names = (
        *("row", "curve", "budget", "parameters", "log_parameters_stderr", "tokens"),
        *("nll", "nll_stderr", "exponent", "exponent_stderr", "reason", "file"),
    )
    rows: list[dict[str, Any]] = []
    for family in families:
        for one in family.optima:
            head = {"curve": family.name, "budget": one.budget}
            rows += [
                {"row": "run", **head, "parameters": x.parameters, "tokens": x.tokens}
                | {"nll": x.nll, "nll_stderr": x.nll_error, "file": x.path}
                for x in one.runs
            ]
            found = {"parameters": one.parameters, "tokens": one.tokens, "nll": one.nll}
            found["log_parameters_stderr"] = one.log_error
            rows.append({"row": "optimum", **head, **found, "reason": one.why})
        for name, law in (("size", family.of_size), ("tokens", family.of_tokens)):
            if law is not None:
                found = {"exponent": law.exponent, "exponent_stderr": law.error}
                rows.append({"row": f"law of {name}", "curve": family.name, **found})
    return [dict.fromkeys(names) | row for row in rows]


# ---------------------------------------------------------------- the picture


def draw(families: Sequence[Family], stem: str) -> list[str]:
    """Writes STEM.png and STEM.pdf: loss against size, a panel for each curve and a
    colour for each budget; where there are power laws, sizes against budgets.

    Returns:
        The two paths.
    """
    budgets = sorted({x.budget for family in families for x in family.optima})
    looks = style.looks(f"{budget:.3g} FLOP" for budget in budgets)
    by_law = [family for family in families if family.of_size is not None]
    of_laws = style.looks([*looks, *(family.name for family in by_law)])
    shared = families[0].optima[0].runs[0].settings
    count = len(families) + bool(by_law)
    with style.drawing() as pyplot:
        height = 1.5 + 3.0 * style.rows(count) + 0.12 * len(of_laws)
        figure = pyplot.figure(figsize=(style.WIDTH, height), layout="constrained")
        grid = style.panels(figure, count)
        for axes, family in zip(grid, families, strict=False):
            for one in family.optima:
                _draw_budget(axes, one, looks[f"{one.budget:.3g} FLOP"])
            axes.set_title(family.name)
            axes.set_xlabel("non-embedding parameters (millions)")
            axes.set_ylabel("validation loss (nats a token)")
            every = [x.parameters for one in family.optima for x in one.runs]
            style.numbers_axis(axes, "x", [x / MILLION for x in every])
        for family in by_law:
            _draw_law(grid[-1], family, of_laws[family.name])
        if by_law:
            _label_laws(grid[-1], by_law)
        told = f"{shared['data']}, tokenizer {shared['tokenizer']}"
        style.title(figure, "loss at fixed budgets of FLOP against size", told)
        has_errors = any(x.log_error for family in by_law for x in family.optima)
        bars = [style.BARS] if has_errors else []
        shown = looks | {family.name: of_laws[family.name] for family in by_law}
        style.legend(figure, shown, [STROKE, *bars])
        return style.save(figure, stem)


def _draw_budget(axes: Any, one: Optimum, look: style.Look) -> None:
    """The runs of a budget, their parabola, and its lowest point."""
    sizes = [x.parameters for x in one.runs]
    shown = [x / MILLION for x in sizes]
    style.points(axes, shown, [x.nll for x in one.runs], look, joined=False)
    if one.coefficients:
        line = np.geomspace(sizes[0], sizes[-1], 100)
        losses = [one.at(x) for x in line]
        axes.plot(line / MILLION, losses, color=look.color, linewidth=1)
    if one.parameters is not None:
        place = [one.parameters / MILLION], [one.nll]
        axes.plot(*place, "|", color=look.color, markersize=22, markeredgewidth=1.5)


def _draw_law(axes: Any, family: Family, look: style.Look) -> None:
    known = [x for x in family.optima if x.parameters is not None]
    budgets = [x.budget for x in known]
    sizes = [(x.parameters or math.nan) / MILLION for x in known]
    style.points(axes, budgets, sizes, look, joined=False)
    bars = [[x / MILLION for x in ends(one, style.ERRORS)] for one in known]
    axes.vlines(budgets, *zip(*bars, strict=True), color=look.color, linewidth=1)
    law = family.of_size
    if isinstance(law, Law):
        line = np.geomspace(budgets[0], budgets[-1], 50)
        fitted = [law.at(x) / MILLION for x in line]
        axes.plot(line, fitted, color=look.color, linewidth=1)


def _label_laws(axes: Any, families: Sequence[Family]) -> None:
    known = [
        x for family in families for x in family.optima if x.parameters is not None
    ]
    axes.set_title("optima")
    axes.set_xlabel("budget (FLOP)")
    axes.set_ylabel("best size (millions)")
    budgets = sorted({x.budget for x in known})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{x:.3g}" for x in budgets])
    axes.set_xticks([], minor=True)
    sizes = [x / MILLION for one in known for x in ends(one, style.ERRORS)]
    style.numbers_axis(axes, "y", sizes)
