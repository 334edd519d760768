"""Reports of functions: every schedule, and the operator of DUO."""

import csv
from collections import defaultdict

import numpy as np
from matplotlib import image

from integral.picture import operator
from models.noise import SCHEDULES
from report.curves import schedules
from report.mode import OF_NOTHING, report
from utils import ADDED, choices_of, imported


def points(folder, label: str) -> dict[str, list[tuple[float, float]]]:
    """Of each curve of a panel."""
    found = defaultdict(list)
    with open(folder / "report.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["y"].startswith(label):
                point = float(row["value of x"]), float(row["value of y"])
                found[row["curve"]].append(point)
    return found


def test_every_schedule_with_its_rate(compose, tmp_path, capsys):
    folder = tmp_path / "new"
    words = ("report.table=schedules", f"report.path={folder}")
    count = report(compose("mode=report", *words))["curves"]
    names = {path.name for path in folder.iterdir()}
    assert names == {f"report.{x}" for x in ("md", "csv", "tex", "png", "pdf")}
    assert image.imread(folder / "report.png").shape[1] == 960
    assert "report.png" in capsys.readouterr().out
    alphas, rates = points(folder, "alpha_t"), points(folder, "-d alpha_t")
    assert set(alphas) == set(rates) == set(choices_of("noise")) >= set(SCHEDULES)
    assert count == len(alphas)
    for name, curve in alphas.items():
        t, alpha = np.array(curve).T
        rate = np.array(rates[name])[:, 1]
        assert alpha[0] > 0.99
        area = np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(t))
        np.testing.assert_allclose(alpha[0] - area, alpha[1:], atol=1e-3)
        assert name in (folder / "report.md").read_text()


def test_the_chosen_schedule_has_the_settings_of_the_command(compose):
    shown = schedules(compose("noise=geometric", "noise.sigma_max=1"))
    by_name = {line[0]: line[1:] for line in shown.lines}
    assert by_name["geometric"][4] == f"{np.exp(-1):.4g}"
    assert by_name["log-linear"][4] == "0.001"


def test_a_schedule_of_a_plug_in_is_drawn_too(compose, monkeypatch):
    monkeypatch.setitem(ADDED, "noise", {"mine": {"type": "cosine", "eps": 0.25}})
    shown = schedules(compose("mode=report"))
    assert "mine" in shown.panels[0].curves


def test_the_operator_of_each_vocabulary(compose):
    shown = operator(compose("algo=duo"))
    assert imported(OF_NOTHING["operator"]) is operator
    by_signal, by_gamma = (panel.curves for panel in shown.panels)
    assert len(shown.lines) == len(by_signal) == len(by_gamma) == 4
    for name, (x, alpha) in by_signal.items():
        assert (np.diff(x) < 0).all()
        assert (np.diff(alpha) <= 1e-12).all()
        assert 0 <= min(alpha) < max(alpha) <= 1 + 1e-12
        assert by_gamma[name][1] == alpha
    line = ["GPT-2", "50258", "-3.647", "-1.654", "0.9283", "0.0383"]
    assert shown.lines[-1] == line


def test_other_algorithms_have_no_range(compose):
    assert len(operator(compose("algo=mdlm")).lines[0]) == 4
