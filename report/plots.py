"""The picture of a report: for each table a few panels, as `report.style` has them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from report import style
from report.style import Look

Records = Sequence[Mapping[str, Any]]  # of `report.verdicts.Row.record`
STEPPED = ("gen_ppl", "distillation", "fid")  # tables whose numbers are against steps
LABELS = {
    "ppl": "perplexity (a token)",
    "bpd": "bits per dimension",
    "gen_ppl": "generative perplexity (a token)",
    "ngram_ppl": "n-gram perplexity (a token)",
    "entropy": "entropy of samples (nats a token)",
    "fid": "FID",
    "inception_score": "Inception Score",
}
FEW = 3  # names that a title has room for


def draw(records: Records, titles: Mapping[str, str], stem: str) -> list[str]:
    """Writes STEM.png and STEM.pdf.

    Perplexities: a panel for each data set, measured beside the paper's. Samples: a
    panel for each metric, against steps.

    Args:
        records: Of all tables.
        titles: Of the tables, by name, from top to bottom.
        stem: Local or fsspec.

    Returns:
        The two paths.
    """
    parts = {name: _panels(records, name) for name in titles}
    names = [_looks_of(x, records) for x in records]
    looks = style.looks(names)
    heights = [_height(name, panels) for name, panels in parts.items()]
    with style.drawing() as pyplot:
        size = (style.WIDTH, sum(heights))
        figure = pyplot.figure(figsize=size, layout="constrained")
        grid = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
        for part, (name, some) in zip(grid[:, 0], parts.items(), strict=True):
            shown = [x for panel in some.values() for x in panel]
            by_line = {_line(x): looks[_looks_of(x, records)] for x in shown}
            notes = [style.PAPER] if any(x["paper"] is not None for x in shown) else []
            for axes, (label, panel) in zip(
                style.panels(part, len(some)), some.items(), strict=True
            ):
                kept = _comparable(panel)
                notes += [] if all(kept) else [style.HOLLOW]
                draw_panel = _curves if name in STEPPED else _dots
                draw_panel(axes, panel, kept, _by_line(panel), by_line)
                if name in STEPPED:
                    axes.set_ylabel(label.replace("; ", "\n"))
                else:
                    axes.set_title(label)
            if any(x["stderr"] for x in shown):
                notes.append(style.BARS)
            style.title(part, *_title(titles[name], shown))
            of = by_line if name in STEPPED else {}
            style.legend(part, of, dict.fromkeys(notes))
        return style.save(figure, stem)


def _title(title: str, records: Records) -> list[str]:
    """What is shown; models, data and judge, where a line has room for them."""
    measured = [x for x in records if x["measured"] is not None] or records
    models = list(dict.fromkeys(x["model"] for x in measured))
    data = list(dict.fromkeys(x["dataset"] for x in measured))
    judges = list(dict.fromkeys(x["judge"] for x in measured if x["judge"]))
    parts = [
        " / ".join(some) if len(some) <= FEW else f"{len(some)} {what}"
        for some, what in ((models, "models"), (data, "data sets"))
    ]
    parts += [f"judge: {' / '.join(judges)}"] if judges else []
    return [title, "; ".join(parts)]


def label_of(table: str, metric: str) -> str:
    """A metric in words, with its unit."""
    is_judged = metric == "ppl" and table in STEPPED
    return LABELS["gen_ppl" if is_judged else metric]


def _height(table: str, panels: Mapping[str, Records]) -> float:
    """Of a table's part of the picture, in inches."""
    rows = style.rows(len(panels))
    models = max(len({x["model"] for x in panel}) for panel in panels.values())
    lines = max(
        len({(x["model"], x["round"]) for x in some}) for some in panels.values()
    )
    if table in STEPPED:
        return 1.2 + 2.7 * rows + 0.1 * lines
    return 1.2 + rows * (0.9 + 0.3 * models)


def _panels(records: Records, table: str) -> dict[str, list[Mapping[str, Any]]]:
    """Records of a table by panel; models of which nothing is measured are left out."""
    own = [x for x in records if x["table"] == table]
    models = {x["model"] for x in own if x["measured"] is not None}
    own = [x for x in own if x["model"] in models] or own
    is_stepped = table in STEPPED
    of_several = len({x["dataset"] for x in own}) > 1
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for record in own:
        name = record["dataset"]
        if is_stepped:
            label = label_of(table, record["metric"])
            name = label + (f"; {name}" if of_several else "")
        panels.setdefault(style.clean(name), []).append(record)
    order = list(LABELS.values()) if is_stepped else list(panels)
    return dict(
        sorted(panels.items(), key=lambda x: order.index(x[0].partition(";")[0]))
    )


def _rounds(record: Mapping[str, Any], records: Records) -> int:
    return len({x["round"] for x in records if x["model"] == record["model"]})


def _line(record: Mapping[str, Any]) -> str:
    """What one line of a panel is called."""
    return record["model"] + (f", round {record['round']}" if record["round"] else "")


def _looks_of(record: Mapping[str, Any], records: Records) -> str:
    """Whose look a record has: that of its model, or of its round if there are more."""
    several = _rounds(record, records) > 1
    return _line(record) if several else record["model"]


def _by_line(panel: Records) -> dict[str, list[int]]:
    """Numbers of the records of each line."""
    lines: dict[str, list[int]] = {}
    for index, record in enumerate(panel):
        lines.setdefault(_line(record), []).append(index)
    return lines


def _comparable(panel: Records) -> list[bool]:
    """Which records compare: with the papers, or if none is there with most others."""
    if any(x["fits"] or x["paper"] is not None for x in panel):
        return [x["fits"] or x["measured"] is None for x in panel]
    counts = Counter(x["setting"] for x in panel)
    usual = counts.most_common(1)[0][0]
    return [x["setting"] == usual for x in panel]


def _measured(panel: Records, kept: Sequence[bool], line: Sequence[int]) -> Any:
    """(comparable, steps, value, error) of a line, each file once for all sources."""
    found: dict[tuple[str, int], tuple[bool, int, float, float | None]] = {}
    for index in line:
        x = panel[index]
        if x["measured"] is not None:
            steps = int(x["steps"] or 0)
            key = (x["file"], steps)
            # One file beside several numbers compares if it does with one of them.
            is_kept = kept[index] or found.get(key, (False,))[0]
            found[key] = (is_kept, steps, x["measured"], x["stderr"])
    return sorted(found.values(), key=lambda entry: entry[1])


def _dots(
    axes: Any,
    panel: Records,
    kept: Sequence[bool],
    lines: Mapping[str, Sequence[int]],
    looks: Mapping[str, Look],
) -> None:
    """Models from top to bottom, the number to the right."""
    every: list[float] = []
    for height, (name, line) in enumerate(lines.items()):
        look = looks[name]
        paper = [float(p) for i in line if (p := panel[i]["paper"]) is not None]
        axes.plot(paper, [height + 0.15] * len(paper), "x", color=look.color, ms=6)
        every += paper
        for is_kept, _, value, error in _measured(panel, kept, line):
            hollow = not is_kept
            place = ([value], [height - 0.15])
            style.points(axes, *place, look, x_errors=[error], hollow=hollow)
            every.append(value)
    axes.set_yticks(range(len(lines)), [style.clean(name) for name in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(LABELS[panel[0]["metric"]])
    style.numbers_axis(axes, "x", every)


def _curves(
    axes: Any,
    panel: Records,
    kept: Sequence[bool],
    lines: Mapping[str, Sequence[int]],
    looks: Mapping[str, Look],
) -> None:
    """Paper dashed, measured solid, against steps."""
    every: list[float] = []
    ticks: list[int] = []
    for name, line in lines.items():
        look = looks[name]
        paper = {
            int(x["steps"]): float(x["paper"])
            for x in (panel[i] for i in reversed(line))  # the first source stays
            if x["paper"] is not None and x["steps"]
        }
        steps = sorted(paper)
        style.published(axes, steps, [paper[key] for key in steps], look)
        found = [entry for entry in _measured(panel, kept, line) if entry[1]]
        for is_kept in (True, False):
            some = [entry[1:] for entry in found if entry[0] == is_kept]
            x, y, errors = zip(*some, strict=True) if some else ((), (), ())
            style.points(axes, x, y, look, y_errors=errors, hollow=not is_kept)
        every += [*paper.values(), *(entry[2] for entry in found)]
        ticks += [*steps, *(entry[1] for entry in found)]
    if ticks:
        style.steps_axis(axes, ticks)
    if panel[0]["metric"] != "entropy":
        style.numbers_axis(axes, "y", every)
