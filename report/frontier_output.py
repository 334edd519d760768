"""What `report.table=frontier` and a sweep of samples leave: a table of samplers at the
same entropy, one of their runs, and a picture; .md, .csv, .tex, .png and .pdf.
"""

import csv
import math
from collections.abc import Sequence
from typing import Any

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
from report.frontier import Frontier, Matched, Sampler, matched
from utils import whole_file

NO_TEXT = (
    "Nothing says at which entropy to compare: eval.held_out=True has mode=sample_eval "
    "measure held-out text, and report.entropy=NUMBER (nats) gives one."
)
RULE = (
    "±: one standard error. Between the two runs that are nearest in entropy the "
    "logarithm of perplexity is taken as linear in entropy; errors of both are "
    "propagated as independent. Beyond a sampler's runs nothing is said."
)
FEW = 4  # curves of which points are labelled, or values in a title


def save(shown: Frontier, stem: str) -> None:
    """Prints the table of samplers, and writes STEM.md, .csv, .tex, .png and .pdf.

    Args:
        shown: From `report.frontier.frontier`.
        stem: Local or fsspec.
    """
    samplers = _sorted(shown)
    header, lines = table(shown, samplers)
    title = "samplers at the same entropy"
    if shown.text:
        title += f", {measured(shown.text.entropy, shown.text.entropy_error)} nats"
    notes = [*notes_of(shown), RULE]
    console = screen()
    print_table(console, title, header, lines)
    print_notes(console, notes)
    name = stem.rpartition("/")[2]
    parts = [f"# {title}", f"![what the tables say]({name}.png)"]
    parts += [
        markdown(header, lines),
        *notes,
        "## Runs",
        markdown(*runs(shown, samplers)),
    ]
    with whole_file(f"{stem}.md", "w") as file:
        file.write("\n\n".join(parts) + "\n")
    with whole_file(f"{stem}.csv", "w") as file:
        rows = records(shown, samplers)
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(f"{stem}.tex", "w") as file:
        file.write(latex(title, header, lines) + "\n")
    files = [f"{stem}.{end}" for end in ("md", "csv", "tex")] + draw(shown, stem)
    print_files(console, "frontier", files)


# ---------------------------------------------------------------- tables


def at_text(shown: Frontier, sampler: Sampler) -> Matched:
    """A sampler at the entropy of held-out text."""
    if shown.text is None:
        return Matched(None, None, "no entropy to compare at")
    if sampler.differs:
        return Matched(None, None, sampler.differs)
    return matched(sampler.points, shown.text.entropy)


def _sorted(shown: Frontier) -> list[Sampler]:
    """By network evaluations, then by what the table is about; without it the last."""

    def key(sampler: Sampler) -> tuple[Any, ...]:
        ppl = at_text(shown, sampler).ppl
        panel = _panel_of(sampler, _budgets(shown))
        return (panel or 0, ppl is None, ppl or 0, sampler.name)

    return sorted(shown.samplers, key=key)


def table(
    shown: Frontier, samplers: Sequence[Sampler]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a sampler, its cost, where its curve is, and its number."""
    header = ["sampler", "evaluations", "runs", "entropy", "perplexity"]
    header += ["perplexity at that entropy"] if shown.text else []
    lines = []
    for sampler in samplers:
        found = at_text(shown, sampler)
        line = [
            sampler.name,
            "-" if sampler.evaluations is None else f"{sampler.evaluations:.1f}",
            str(len(sampler.points)),
            _range([x.entropy for x in sampler.points], ".2f"),
            _range([x.ppl for x in sampler.points], ".3g"),
        ]
        if shown.text:
            ppl, why = measured(found.ppl, found.error), found.why
            line.append(f"none: {why}" if found.ppl is None else ppl)
        lines.append(line)
    return header, lines


def _range(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(f"{x:{form}}" for x in (min(values), max(values)))
    return " to ".join(ends)


def notes_of(shown: Frontier) -> list[str]:
    """What the numbers are, in sentences."""
    notes = [
        f"Perplexity a token under {shown.judge}; entropy of a sample's own tokens, "
        f"nats; tokenizer {shown.tokenizer}, {shown.length} tokens; evaluations of the "
        "network for a sample, a mean over the runs."
    ]
    if shown.along:
        notes.append(f"The runs of a sampler differ in {shown.along}.")
    if shown.text is None:
        notes.append(NO_TEXT)
    elif shown.text.ppl is not None:
        entropy = measured(shown.text.entropy, shown.text.entropy_error)
        ppl = measured(shown.text.ppl, shown.text.ppl_error)
        notes.append(f"Held-out text: entropy {entropy}, perplexity {ppl}.")
    if shown.left_out:
        notes.append(
            f"{shown.left_out} files without this perplexity or entropy are left out."
        )
    return notes


def runs(
    shown: Frontier, samplers: Sequence[Sampler]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of all runs."""
    header = ["sampler", shown.along or "run", "evaluations", "samples"]
    header += ["entropy", "perplexity"]
    lines = [
        [
            sampler.name,
            x.beside or "-",
            "-" if x.evaluations is None else f"{x.evaluations:.1f}",
            str(x.samples),
            measured(x.entropy, x.entropy_error),
            measured(x.ppl, x.ppl_error),
        ]
        for sampler in samplers
        for x in sampler.points
    ]
    return header, lines


def records(shown: Frontier, samplers: Sequence[Sampler]) -> list[dict[str, Any]]:
    """The lines of the CSV: runs, and each sampler at the entropy of held-out text."""
    rows: list[dict[str, Any]] = []
    for sampler in samplers:
        head = {"sampler": sampler.name, "judge": shown.judge}
        rows += [
            head
            | {"row": "run", "along": shown.along, "value": x.beside}
            | {"evaluations": x.evaluations, "samples": x.samples}
            | {"entropy": x.entropy, "entropy_stderr": x.entropy_error}
            | {"ppl": x.ppl, "ppl_stderr": x.ppl_error}
            | {"files": " ".join(x.files), "reason": sampler.differs}
            for x in sampler.points
        ]
        if shown.text:
            found = at_text(shown, sampler)
            rows.append(
                dict.fromkeys(rows[-1])
                | head
                | {"row": "at matched entropy", "evaluations": sampler.evaluations}
                | {"entropy": shown.text.entropy}
                | {"entropy_stderr": shown.text.entropy_error}
                | {"ppl": found.ppl, "ppl_stderr": found.error, "reason": found.why}
            )
    return rows


# ---------------------------------------------------------------- the picture


def _budgets(shown: Frontier) -> list[int]:
    return sorted({x.budget for x in shown.samplers if x.budget is not None})


def _panel_of(sampler: Sampler, budgets: Sequence[int]) -> int | None:
    """The budget of the panel that shows a sampler, the nearest; None: any panel."""
    if sampler.budget is not None or sampler.is_for_all or not budgets:
        return sampler.budget
    own = sampler.evaluations
    if not own:
        return None
    return min(budgets, key=lambda budget: abs(math.log(budget / own)))


def _is_in(sampler: Sampler, panel: int, budgets: Sequence[int]) -> bool:
    return _panel_of(sampler, budgets) in (panel, None)


def draw(shown: Frontier, stem: str) -> list[str]:
    """Writes STEM.png and STEM.pdf: perplexity against entropy, a curve a sampler.

    Samplers of as many network evaluations share a panel.

    Returns:
        The two paths.
    """
    budgets = _budgets(shown)
    panels: list[int | None] = list(budgets) if len(budgets) > 1 else [None]
    by_panel = [
        [x for x in shown.samplers if panel is None or _is_in(x, panel, budgets)]
        for panel in panels
    ]
    # Within a panel costs are the same.
    names = [x.line if len(panels) > 1 else x.name for x in shown.samplers]
    looks = style.looks(names)
    by_sampler = dict(zip((x.name for x in shown.samplers), names, strict=True))
    kind = "n-gram" if "-gram" in shown.judge else "generative"
    has_labels = max(map(len, by_panel)) <= FEW
    with style.drawing() as pyplot:
        height = 1.5 + 3.0 * style.rows(len(panels)) + 0.12 * len(looks)
        figure = pyplot.figure(figsize=(style.WIDTH, height), layout="constrained")
        grid = style.panels(figure, len(panels))
        for axes, panel, some in zip(grid, panels, by_panel, strict=True):
            for sampler in some:
                points = sampler.points
                style.points(
                    axes,
                    [x.entropy for x in points],
                    [x.ppl for x in points],
                    looks[by_sampler[sampler.name]],
                    x_errors=[x.entropy_error for x in points],
                    y_errors=[x.ppl_error for x in points],
                    hollow=bool(sampler.differs),
                )
            if shown.text is not None:
                axes.axvline(shown.text.entropy, color=style.GREY, linewidth=1)
            if panel is not None:
                axes.set_title(f"about {panel} network evaluations")
            axes.set_xlabel("entropy of samples (nats a token)")
            axes.set_ylabel(f"{kind} perplexity (a token)")
            style.numbers_axis(axes, "y", [x.ppl for s in some for x in s.points])
        notes = ["entropy of held-out text"] if shown.text else []
        notes += [style.HOLLOW] if any(x.differs for x in shown.samplers) else []
        if any(x.ppl_error for sampler in shown.samplers for x in sampler.points):
            notes.append(style.BARS)
        of = f"tokenizer {shown.tokenizer}, length {shown.length}; judge: {shown.judge}"
        told = _values(shown, has_labels)
        style.title(figure, "perplexity of samples against their entropy", of, *told)
        style.legend(figure, looks, notes)
        if not has_labels:
            return style.save(figure, stem)
        # At the end, as it settles where everything is.
        for axes, some in zip(grid, by_panel, strict=True):
            points = [x for sampler in some for x in sampler.points if x.beside]
            labels = [(x.beside, x.entropy, x.ppl) for x in points]
            style.label_points(figure, axes, labels)
        return style.save(figure, stem)


def _values(shown: Frontier, has_labels: bool) -> list[str]:
    """A line of the title: what draws the curves, where points are not labelled with
    their values."""
    if not shown.along:
        return []
    if has_labels:
        return [f"beside points: {shown.along}"]
    every = (x.beside for sampler in shown.samplers for x in sampler.points)
    values = list(dict.fromkeys(every))
    told = f" {', '.join(values)}" if len(values) <= FEW else ""
    return [f"along a curve: {shown.along}{told}"]
