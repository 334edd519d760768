"""The table, the files and the picture of a frontier."""

import csv
import math

import pytest
from evaluated import read, samples

from report.frontier import frontier
from report.frontier_output import NO_TEXT, _panel_of, at_text, save, table

HELD_OUT = {"rows": 9, "entropy": 5.45, "entropy_stderr": 0.002}
NAME = "duo_base, ancestral"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def run(temperature, entropy, ppl, steps=8, **other):
    own = {"settings/sampling/temperature": temperature, "held_out": HELD_OUT}
    return read(samples(steps, ppl, entropy, **own, **other))


def bounded(evaluations, temperature=1.0):
    """A sampler whose evaluations are an outcome."""
    name = "settings/sampling/predictor"
    other = {name: "entropy_bound", "evaluations": evaluations}
    return run(temperature, 5.4, 30.0, **other)


CURVE = [run(0.7, 5.4, 20.0), run(1.0, 5.5, 80.0)]
SHORT = [run(0.7, 5.2, 10.0, steps=16), run(1.0, 5.3, 20.0, steps=16)]


def test_every_sampler_has_its_number_or_the_reason(tmp_path, capsys):
    save(frontier([*CURVE, *SHORT]), str(tmp_path / "frontier"))
    out = capsys.readouterr().out
    text = (tmp_path / "frontier.md").read_text()
    error = 40 * math.hypot(
        *(0.5 * 0.5 / 20, 0.5 * 0.5 / 80, *[0.5 * math.log(4) / 0.1 * 0.005] * 2)
    )
    assert "5.4500 ± 0.0020" in out
    for told in (out, text):
        assert f"40.0 ± {error:.1f}" in told
        assert "none: extrapolation: its highest entropy is 5.300" in told
        assert "nats" in told
        assert "gpt2-large" in told
    assert "](frontier.png)" in text
    assert "## Runs" in text
    assert "$\\pm$" in (tmp_path / "frontier.tex").read_text()
    assert (tmp_path / "frontier.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG\r\n")
    for name in ("md", "csv", "tex", "png", "pdf"):
        assert str(tmp_path / f"frontier.{name}") in out


def test_the_csv_has_runs_and_matched_numbers(tmp_path):
    save(frontier([*CURVE, *SHORT]), str(tmp_path / "frontier"))
    with open(tmp_path / "frontier.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["run", "run", "at matched entropy"] * 2
    assert [row["value"] for row in rows[:2]] == ["0.7", "1"]
    assert float(rows[2]["ppl"]) == pytest.approx(40.0)
    assert float(rows[2]["ppl_stderr"]) > 0
    assert float(rows[2]["entropy"]) == 5.45
    assert rows[5]["ppl"] == ""
    assert "extrapolation" in rows[5]["reason"]


def test_without_an_entropy_there_is_no_such_column(tmp_path, capsys):
    runs = [
        one._replace(settings=one.settings | {"held_out_entropy": None})
        for one in CURVE
    ]
    shown = frontier(runs)
    assert table(shown, shown.samplers)[0][-1] == "perplexity"
    save(shown, str(tmp_path / "frontier"))
    assert NO_TEXT in (tmp_path / "frontier.md").read_text()
    assert "nats)" in capsys.readouterr().out


def test_what_does_not_compare_has_no_number():
    other = run(1.0, 5.4, 30.0, **{"settings/model": {"length": 8}})
    more = run(0.7, 5.5, 30.0, **{"settings/model": {"length": 8}})
    shown = frontier([*CURVE, run(0.85, 5.45, 40.0), other, more])
    first, last = shown.samplers
    assert at_text(shown, first).ppl == pytest.approx(40.0)
    assert at_text(shown, last).why == "length is 8, not 1024"


@pytest.mark.parametrize(
    ("evaluations", "panel"), [(1.5, 8), (11.0, 8), (12.0, 16), (900.0, 16)]
)
def test_samplers_without_steps_stand_with_the_nearest(evaluations, panel):
    shown = frontier([*CURVE, *SHORT, bounded(evaluations)])
    assert _panel_of(shown.samplers[-1], [8, 16]) == panel


def test_points_of_few_curves_are_labelled(tmp_path, monkeypatch):
    """Of more the title has the values; without panels each cost has a look."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    name = {"settings/sampling/predictor": "entropy_bound"}
    for count in (2, 5):
        runs = [
            run(t, 5.4 + t / 10, 30.0 + i, **name, **{"settings/sampling/gamma": i})
            for i in range(count)
            for t in (0.7, 1.0)
        ]
        save(frontier(runs), str(tmp_path / "frontier"))
    monkeypatch.undo()
    pyplot.close("all")
    few, many = figures
    assert {x.get_text() for x in few.axes[0].texts} == {"0.7", "1"}
    assert not many.axes[0].texts
    assert "beside points: temperature" in few.get_suptitle()
    assert "along a curve: temperature 0.7, 1" in many.get_suptitle()
    colours = {x.lines[0].get_color() for x in many.axes[0].containers}
    assert len(colours) == 5


def test_panels_show_what_costs_as_much(tmp_path, monkeypatch):
    """Those left to right in all; a line marks the entropy."""
    from matplotlib import pyplot

    axes = []
    monkeypatch.setattr(pyplot, "close", lambda figure: axes.extend(figure.axes))
    ar = [run(t, 5.4 + t / 10, 30.0, algo="ar") for t in (0.7, 1.0)]
    save(frontier([*CURVE, *SHORT, *ar, bounded(15.0)]), str(tmp_path / "frontier"))
    monkeypatch.undo()
    pyplot.close("all")
    assert [x.get_title() for x in axes] == [
        f"about {n} network evaluations" for n in (8, 16)
    ]
    assert [len(x.containers) for x in axes] == [2, 3]
    for one in axes:
        assert one.get_xlabel() == "entropy of samples (nats a token)"
        assert any(list(line.get_xdata()) == [5.45, 5.45] for line in one.lines)
