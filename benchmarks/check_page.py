"""The page that `check_gpu.py` writes: what failed, then what was measured."""

from typing import Any

from benchmarks.parts import Outcome, Row

# By column: the unit or the form of a number.
FORMS = {
    "tokens_per_s": "{:,.0f}",
    "ms": "{:.1f}",
    "peak_gb": "{:.2f}",
    "mfu": "{:.0%}",
    "seconds": "{:.2f}",
    "nll": "{:.3f}",
}
TITLES = {
    "train": "Train step",
    "evaluation": "Evaluation",
    "sampling": "Samples",
    "too_large": "What ran out of memory; that is no failure of the plain way",
    "compile": "Compiled train step",
    "runs": "Runs of the command line",
}
NOTES = """\
`plain` is the dense, eager code of `plain.py` and its neighbours, `ours` the library
without compilation. `mfu` is the arithmetic that a step needs over what the machine
could do in that time. `peak_gb` is of all tensors at that batch: weights, optimiser
state and EMA, too. `largest_batch` was tried. `seconds` are of a whole batch of
samples, of a step with its compilation, of a run."""


def markdown(environment: Row, outcomes: list[Outcome], seconds: float) -> str:
    """The page: what failed, then a table of each kind of rows."""
    said = ", ".join(f"{key} {value}" for key, value in environment.items())
    failed = sum(x.failure is not None for x in outcomes)
    lines = ["# Check of a GPU", "", said + ".", ""]
    lines += [f"{len(outcomes)} parts in {seconds:.0f} s, {failed} of them failed.", ""]
    lines += table(
        [
            {
                "part": x.name,
                "result": x.failure or "fine",
                "seconds": f"{x.seconds:.0f}",
            }
            for x in outcomes
        ]
    )
    lines += ["", NOTES]
    for name, title in TITLES.items():
        if rows := merged([r for x in outcomes for r in x.rows.get(name, [])]):
            lines += ["", f"## {title}", "", *table(rows)]
    return "\n".join(lines) + "\n"


def merged(rows: list[Row]) -> list[Row]:
    """Rows of the same algorithm and variant that were measured one after the other."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(v for v in row.values() if isinstance(v, str | bool))
        found.setdefault(key, {}).update(row)
    return list(found.values())


def table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(key, row.get(key)) for key in columns] for row in rows]
    rule = ["---"] * len(columns)
    return ["| " + " | ".join(row) + " |" for row in [columns, rule, *cells]]


def cell(column: str, value: Any) -> str:
    form = "{}" if isinstance(value, str) else FORMS.get(column, "{}")
    return "-" if value is None else form.format(value)
