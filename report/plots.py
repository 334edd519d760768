"""The picture of a report: a row of panels for each table."""

from collections.abc import Mapping, Sequence
from typing import Any

STEPPED = ("gen_ppl", "distillation", "fid")  # tables whose numbers are against steps
LABELS = {
    "ppl": "perplexity",
    "bpd": "bits per dimension",
    "entropy": "entropy (nats)",
    "fid": "FID",
    "inception_score": "Inception Score",
}


def draw(
    records: Sequence[Mapping[str, Any]], titles: Mapping[str, str], file: Any
) -> None:
    """Writes a PNG.

    Perplexities: a panel for each data set, measured with two standard errors beside
    the paper's. Samples: a panel for perplexity and one for entropy, against steps.

    Args:
        records: Of `report.Row.record`.
        titles: Of the tables, by name, from top to bottom.
        file: Open for bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {name: _panels(records, name) for name in titles}
    width = max(map(len, panels.values()))
    tallest = max(len(_lines(x)) for some in panels.values() for x in some.values())
    size = (max(8, 2.6 * width), len(panels) * max(3.6, 0.3 * tallest))
    figure = pyplot.figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for part, (name, some) in zip(parts, panels.items(), strict=True):
        part.suptitle(titles[name])
        grid = part.subplots(1, len(some), squeeze=False)[0]
        for axes, (label, of_panel) in zip(grid, some.items(), strict=True):
            (_curves if name in STEPPED else _dots)(axes, of_panel)
            axes.set_title(label, fontsize="small")
    figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)


def _panels(records: Sequence[Mapping[str, Any]], table: str) -> dict[str, list]:
    """Records of a table by panel; models of which nothing is measured are left out."""
    key = "metric" if table in STEPPED else "dataset"
    own = [x for x in records if x["table"] == table]
    models = {x["model"] for x in own if x["measured"] is not None}
    own = [x for x in own if x["model"] in models] or own
    panels: dict[str, list] = {}
    for record in own:
        name = LABELS.get(record[key], record[key])
        panels.setdefault(name, []).append(record)
    return panels


def _lines(records: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Records by what is one line of a panel."""
    lines: dict[str, list] = {}
    for record in records:
        names = [record["model"]]
        names += [f"round {record['round']}"] if record["round"] else []
        lines.setdefault(", ".join(names), []).append(record)
    return lines


def _measured(records: Sequence[Mapping[str, Any]]) -> dict[tuple, tuple]:
    """(file, steps) -> (value, error), each file once however many sources."""
    return {
        (x["file"], x["steps"]): (x["measured"], 2 * (x["stderr"] or 0))
        for x in records
        if x["measured"] is not None
    }


def _dots(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Models from top to bottom, perplexity to the right."""
    lines = _lines(records)
    for height, line in enumerate(lines.values()):
        paper = [float(x["paper"]) for x in line if x["paper"] is not None]
        axes.plot(paper, [height + 0.15] * len(paper), "D", color="C1", ms=5)
        for value, error in _measured(line).values():
            axes.errorbar(value, height - 0.15, xerr=error, fmt="o", color="C0", ms=5)
    axes.set_yticks(range(len(lines)), lines, fontsize="small")
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(LABELS[records[0]["metric"]])
    axes.plot([], [], "o", color="C0", label="measured")
    axes.plot([], [], "D", color="C1", label="paper")
    axes.legend(fontsize="x-small")


def _curves(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Paper dashed, measured solid; both axes logarithmic but for entropy."""
    stepped = [x for x in records if x["steps"]]
    for index, (name, line) in enumerate(_lines(stepped).items()):
        look = {"color": f"C{index % 10}", "ms": 4}
        paper = {
            int(x["steps"]): float(x["paper"])
            for x in reversed(line)  # of several sources the first one stays
            if x["paper"] is not None
        }
        axes.plot(sorted(paper), [paper[key] for key in sorted(paper)], "x--", **look)
        found = sorted((int(key[1]), *x) for key, x in _measured(line).items())
        if found:
            steps, values, errors = zip(*found, strict=True)
            axes.errorbar(steps, values, yerr=errors, fmt="o-", label=name, **look)
    axes.plot([], [], "kx--", ms=4, label="paper")
    axes.set(xscale="log", xlabel="steps")
    ticks = sorted({int(x["steps"]) for x in stepped})
    axes.set_xticks(ticks, map(str, ticks), fontsize="small")
    axes.set_xticks([], minor=True)
    if records[0]["metric"] == "ppl":
        axes.set_yscale("log", subs=[2, 5])
        for which in ("major", "minor"):
            getattr(axes.yaxis, f"set_{which}_formatter")("{x:g}")
    axes.legend(fontsize="x-small")
