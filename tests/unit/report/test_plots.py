"""The picture of a report: what is drawn of each record, and how it looks."""

import pytest
from evaluated import likelihood, read, samples

from report import plots
from report.tables import TABLES, read_published
from report.verdicts import compare, curves

PUBLISHED = read_published()


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(evaluations, asked): the figure, before it is closed."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)

    def draw(evaluations, asked=None):
        rows = compare(evaluations, PUBLISHED, asked)
        titles = {row.table: TABLES[row.table].title for row in rows}
        records = [row.record() for row in (*rows, *curves(rows, PUBLISHED))]
        plots.draw(records, titles, str(tmp_path / "report"))
        (figure,) = figures
        return figure

    yield draw
    monkeypatch.undo()
    pyplot.close("all")


def panels(figure) -> dict:
    """Axes by what they show."""
    return {axes.get_ylabel() or axes.get_title(): axes for axes in figure.axes}


def looks_of(axes) -> set:
    """(colour, marker) of what is measured."""
    return {
        (x.lines[0].get_color(), x.lines[0].get_marker())
        for x in axes.containers
        if len(x.lines[0].get_xdata())
    }


PPL, ENTROPY = plots.LABELS["gen_ppl"], plots.LABELS["entropy"]
METHODS = {
    "own": [("My method", {}), ("Another", {})],
    "published": [("MDLM", {}), ("Duo", {})],
    "mixed": [("Duo", {}), ("My method", {})],
    "of their own scale": [
        ("x", {"settings/model": {"length": 8}}),
        ("y", {"settings/model": {"length": 8}}),
    ],
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("unjudged", [0, 1])
def test_one_model_has_one_look_in_all_panels(drawn, kind, unjudged):
    """Also where it is missing in one of them, as without a judge."""
    evaluations = [
        read(samples(steps, None if i == unjudged else 90.0, **other), name)._replace(
            path=f"{name}{steps}"
        )
        for i, (name, other) in enumerate(METHODS[kind])
        for steps in (8, 16)
    ]
    shown = panels(drawn(evaluations))
    assert len(looks_of(shown[ENTROPY])) == 2
    assert len(looks_of(shown[PPL])) == 1
    assert looks_of(shown[PPL]) < looks_of(shown[ENTROPY])


def test_one_model_has_one_look_in_all_tables(drawn):
    evaluations = [
        read(samples(32, 90.0), "Duo"),
        read(samples(32, 90.0, trained_as="distillation")),
        read(samples(8, 90.0, trained_as="distillation"))._replace(path="b"),
        read(samples(64, 80.0), "Mine")._replace(path="c"),
        read(samples(64, 80.0), "Mine+DCD")._replace(path="d"),
        read(likelihood(), "Mine")._replace(path="e"),
    ]
    figure = drawn(evaluations)
    found: dict[str, set] = {}
    for part in figure.subfigs:
        for legend in part.legends:
            for handle, text in zip(
                legend.legend_handles, legend.get_texts(), strict=True
            ):
                look = handle.get_color(), handle.get_marker()
                found.setdefault(text.get_text(), set()).add(look)
    assert {"Duo", "Mine", "Mine+DCD"} <= {
        name.partition(", round")[0] for name in found
    }
    assert all(len(some) == 1 for some in found.values())


def test_what_does_not_compare_is_hollow_and_not_joined(drawn):
    float32 = {"settings/sampling/use_float64": False}
    evaluations = [
        read(samples(steps, 90.0, **(float32 if steps == 32 else {})))._replace(
            path=str(steps)
        )
        for steps in (8, 16, 32, 64)
    ]
    figure = drawn(evaluations)
    axes = panels(figure)[PPL]
    filled, hollow = (x.lines[0] for x in axes.containers)
    assert filled.get_xdata().tolist() == [8, 16, 64]
    assert (filled.get_linestyle(), filled.get_markerfacecolor()) == (
        "-",
        filled.get_color(),
    )
    assert hollow.get_xdata().tolist() == [32]
    assert (hollow.get_linestyle(), hollow.get_markerfacecolor()) == ("None", "white")
    assert filled.get_color() == hollow.get_color()
    texts = [t.get_text() for t in figure.subfigs[0].legends[0].get_texts()]
    assert plots.style.HOLLOW in texts
    assert plots.style.PAPER in texts
    assert plots.style.BARS in texts


def test_own_measurements_compare_with_one_another_where_no_paper_is(drawn):
    """With most of them; one with another n-gram model is hollow."""
    evaluations = []
    for index, order in enumerate((5, 5, 5, 3)):
        own = {"settings/model": {"length": 8}, "settings/eval.ngram_order": order}
        content = samples(8 << index, None, **own) | {"ngram_ppl": 9.0}
        evaluations.append(read(content)._replace(path=str(index)))
    shown = panels(drawn(evaluations))
    filled, hollow = (x.lines[0] for x in shown[plots.LABELS["ngram_ppl"]].containers)
    assert filled.get_xdata().tolist() == [8, 16, 32]
    assert hollow.get_xdata().tolist() == [64]
    (only,) = (x.lines[0] for x in shown[ENTROPY].containers)
    assert only.get_xdata().tolist() == [8, 16, 32, 64]


def test_the_title_says_model_data_and_judge(drawn):
    title = drawn([read(samples())]).subfigs[0]._suptitle.get_text()
    for part in ("generative perplexity", "Duo", "OWT", "judge: gpt2-large"):
        assert part in title


def test_axes_have_units(drawn):
    shown = panels(drawn([read(samples())]))
    assert list(shown) == [PPL, ENTROPY]
    assert "nats a token" in ENTROPY
    assert {axes.get_xlabel() for axes in shown.values()} == {"sampling steps"}
    assert "a token" in PPL


def test_perplexities_are_a_panel_for_each_data_set(drawn):
    evaluations = [
        read(likelihood(valid, ppl, algo))._replace(path=f"{valid}{algo}")
        for valid, ppl in (("ptb", 90.0), ("lambada", 50.0), ("ag_news", 60.0))
        for algo in ("duo_base", "mdlm")
    ]
    shown = panels(drawn(evaluations))
    assert list(shown) == ["PTB", "Lambada", "AG News"]
    for axes in shown.values():
        names = [text.get_text() for text in axes.get_yticklabels()]
        assert set(names) == {"Duo", "MDLM"}
        assert len(looks_of(axes)) == 2
