"""`report.table=isoflop`: parabolas, their optima, power laws, and what is refused."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from evaluated import compute, write
from refusals import refused

from report.isoflop import (
    Trained,
    isoflop,
    law_of,
    parabola,
    read_trained,
    with_minimum,
)
from report.mode import report

SIZES = (1e5, 2e5, 4e5, 8e5, 1.6e6)


def leave(folder, *records) -> str:
    for number, one in enumerate(records):
        write(folder / f"{number}" / "compute.json", json.dumps(one))
    return str(folder)


def curve(budget, best, sizes=SIZES, noise=(), depth=0.1, **other):
    """Runs whose losses are a parabola with its minimum, 2, at `best`."""
    noise = noise or [0.0] * len(sizes)
    return [
        compute(budget, x, 2 + depth * math.log(x / best) ** 2 + e, **other)
        for x, e in zip(sizes, noise, strict=True)
    ]


def test_the_lowest_point_of_a_parabola(tmp_path):
    runs = read_trained([(None, leave(tmp_path, *curve(1e12, 3e5)))])
    found = with_minimum(parabola(1e12, runs), variance=1e-4)
    assert found.parameters == pytest.approx(3e5)
    assert found.nll == pytest.approx(2)
    assert found.tokens == pytest.approx(1e12 / (6 * 3e5), rel=1e-6)
    assert found.at(SIZES[0]) == pytest.approx(runs[0].nll)
    assert found.why == ""


def test_errors_are_those_of_many_studies(generator):
    """The standard error of log N* beside its scatter over 400 draws of the noise."""
    found, errors = [], []
    sigma = 0.01
    noise = torch.randn(400, len(SIZES), generator=generator, dtype=torch.float64)
    for e in (sigma * noise).tolist():
        runs = [read_from(x) for x in curve(1e12, 3e5, noise=e)]
        fit = with_minimum(parabola(1e12, runs), variance=sigma**2)
        found.append(math.log(fit.parameters))
        errors.append(fit.log_error)
    assert np.mean(found) == pytest.approx(math.log(3e5), abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


def read_from(one):
    return Trained(
        *("x", "mdlm", one["budget"], one["parameters"], one["tokens"], one["nll"]),
        *(one["nll_stderr"], one),
    )


def test_power_laws_of_several_budgets(tmp_path):
    """N* = 0.3 C^0.5, so D* = C / 6 N* ~ C^0.5, for two curves apart."""
    runs = []
    for number, algo in enumerate(("mdlm", "duo_base")):
        for budget in (1e12, 4e12, 1.6e13):
            best = 0.3 * (1 + number) * math.sqrt(budget)
            sizes = [best * x for x in (0.3, 0.6, 1.3, 2.5)]
            noise = [0.001, -0.001, 0.0005, -0.0005]
            runs += curve(budget, best, sizes, noise, algo=algo)
    families = isoflop(read_trained([(None, leave(tmp_path, *runs))]))
    assert [family.name for family in families] == ["duo_base", "mdlm"]
    for family in families:
        assert [x.budget for x in family.optima] == [1e12, 4e12, 1.6e13]
        assert family.of_size.exponent == pytest.approx(0.5, abs=0.01)
        assert family.of_tokens.exponent == pytest.approx(0.5, abs=0.01)
        assert 0 < family.of_size.error < 0.05
    (duo, mdlm) = (family.optima[0].parameters for family in families)
    assert duo / mdlm == pytest.approx(2, rel=0.05)


def test_a_law_is_weighted_by_its_errors():
    exact = law_of([(1, 1.0, 0.1), (math.e, math.e**0.5, 0.1), (9, None, None)])
    assert exact.exponent == pytest.approx(0.5)
    assert exact.error == pytest.approx(0.1 * math.sqrt(2))
    assert exact.at(math.e**2) == pytest.approx(math.e)
    free = law_of([(1, 1.0, None), (math.e, math.e**0.5, 0.1)])
    assert (free.exponent, free.error) == (pytest.approx(0.5), None)
    assert law_of([(1, 1.0, 0.1), (2, None, None)]) is None


@pytest.mark.parametrize(
    ("runs", "why"),
    [
        (curve(1e12, 3e5, SIZES[:2]), "2 sizes, and a parabola needs 3"),
        (curve(1e12, 3e5, SIZES[:1] * 4), "1 size, and"),
        (curve(1e12, 3e4), "outside: the parabola falls beyond the smallest size"),
        (curve(1e12, 3e7), "outside: the parabola falls beyond the largest size"),
        (curve(1e12, 3e5, depth=-0.1), "no minimum"),
    ],
)
def test_a_budget_without_optimum_says_why(tmp_path, runs, why):
    fine = curve(4e12, 4e5)
    (family,) = isoflop(read_trained([(None, leave(tmp_path, *runs, *fine))]))
    first, second = family.optima
    assert first.why.startswith(why)
    assert first.parameters is None
    assert second.parameters == pytest.approx(4e5)
    assert family.of_size is None


def test_what_is_refused(tmp_path):
    def read(name, *records):
        return lambda: isoflop(read_trained([(None, leave(tmp_path / name, *records))]))

    (tmp_path / "none").mkdir()
    nothing = lambda: read_trained([(None, str(tmp_path / "none"))])  # noqa: E731
    refused(nothing, "no compute.json is there", "training.flops")
    refused(read("few", *curve(1e12, 3e5, SIZES[:2])), "3 sizes or more")
    other = compute(1e12, 1e5, 2.0, data="ptb")
    refused(read("mixed", *curve(1e12, 3e5), other), "data=ptb", "do not compare")
    for key, value in (("nll", "low"), ("budget", -1), ("seed", None), ("algo", 3)):
        broken = compute(1e12, 1e5, 2.0) | {key: value}
        refused(read(key, broken), "is no compute.json", f"{key}={value!r}")
    write(tmp_path / "text" / "compute.json", "[")
    unread = lambda: read_trained([(None, str(tmp_path / "text"))])  # noqa: E731
    refused(unread, "cannot be read")


def test_report_of_isoflop(compose, tmp_path, capsys):
    """Tables, files and picture; a budget with too few sizes is in them, too."""
    noise = [0.002, -0.001, 0.001, -0.002, 0.0]
    runs = [*curve(1e12, 3e5, noise=noise), *curve(4e12, 6e5, noise=noise)]
    runs += curve(1.6e13, 1e6, SIZES[:2])
    runs += curve(1e12, 2e5, noise=noise, loss_type="low_var")
    where = leave(tmp_path / "runs", *runs)
    config = compose(
        *("mode=report", "report.table=isoflop", f"report.runs={where}"),
        f"report.path={tmp_path}/out",
    )
    assert report(config) == {"runs": 17}
    text = (tmp_path / "out/report.md").read_text()
    printed = capsys.readouterr().out
    for part in ("mdlm, low_var", "none: 2 sizes", "N* ~ C^a: a", "docstrings"):
        assert part in text
        assert part in printed
    with open(tmp_path / "out/report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [row["row"] for row in rows]
    assert (kinds.count("run"), kinds.count("optimum")) == (17, 4)
    assert kinds.count("law of size") == kinds.count("law of tokens") == 1
    assert "tabular" in (tmp_path / "out/report.tex").read_text()
    for name, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / f"out/report.{name}").read_bytes().startswith(start)
