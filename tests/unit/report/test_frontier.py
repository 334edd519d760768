"""Frontiers: the perplexity at a matched entropy, and runs as curves of samplers."""

import math

import numpy as np
import pytest
from evaluated import likelihood, read, samples

from report.frontier import Point, Text, frontier, matched


def point(entropy, ppl, entropy_error=0.01, ppl_error=1.0, beside="1") -> Point:
    return Point(beside, entropy, entropy_error, ppl, ppl_error)


def run(temperature: float = 1.0, model: str | None = None, **other):
    """An evaluation; keys of `sampling` by their names, others with slashes."""
    own = {
        key
        if "/" in key or key in ("steps", "ppl", "entropy", "algo", "held_out")
        else f"settings/sampling/{key}": value
        for key, value in other.items()
    }
    return read(samples(**{"settings/sampling/temperature": temperature, **own}), model)


# ---------------------------------------------------------------- matched entropy


@pytest.mark.parametrize("entropy", [5.0, 5.1, 5.25, 5.3, 5.5])
def test_a_line_in_the_logarithm_is_met_exactly(entropy):
    """Whatever the order of the runs, and at the runs themselves."""
    points = [point(h, math.exp(1 + 0.5 * h)) for h in (5.3, 5.0, 5.5)]
    assert matched(points, entropy).ppl == pytest.approx(math.exp(1 + 0.5 * entropy))


def test_it_is_between_the_two_nearest_runs():
    points = [point(5.0, 20.0), point(5.2, 40.0), point(5.4, 1000.0)]
    assert matched(points, 5.1).ppl == pytest.approx(math.sqrt(20 * 40))


def test_errors_are_those_of_repeated_measurements():
    """Of both runs, in both directions; 100 000 repetitions."""
    a, b, entropy = (5.0, 20.0, 0.01, 0.5), (5.4, 60.0, 0.02, 2.0), 5.1
    found = matched([point(*x[:2], *x[2:]) for x in (a, b)], entropy)
    rng = np.random.default_rng(0)

    def drawn(x):
        z = rng.standard_normal((2, 100_000))
        return x[0] + x[2] * z[0], np.log(x[1]) + x[3] / x[1] * z[1]

    (ha, la), (hb, lb) = drawn(a), drawn(b)
    logs = la + (entropy - ha) / (hb - ha) * (lb - la)
    assert found.error / found.ppl == pytest.approx(logs.std(), rel=0.03)


def test_at_a_run_the_error_is_its_own():
    """With that of its entropy along the slope."""
    points = [point(5.0, 20.0), point(5.2, 40.0, 0.0, 4.0)]
    assert matched(points, 5.2).error == pytest.approx(4.0)
    slope = math.log(2) / 0.2
    expected = 20 * math.hypot(1 / 20, slope * 0.01)
    assert matched(points, 5.0).error == pytest.approx(expected)


@pytest.mark.parametrize("entropy", [4.999, 5.401, 0.0, 100.0])
def test_nothing_is_said_beyond_the_ends(entropy):
    """However near the end is, also within its error."""
    found = matched([point(5.0, 20.0), point(5.4, 60.0)], entropy)
    assert (found.ppl, found.error) == (None, None)
    assert "extrapolation" in found.why
    assert ("lowest" if entropy < 5.2 else "highest") in found.why


@pytest.mark.parametrize("entropy", [5.0, 5.1])
def test_one_run_is_no_curve(entropy):
    assert matched([point(5.0, 20.0)], entropy).why == "one run is no curve"


def test_runs_of_one_entropy_have_their_mean():
    found = matched([point(5.0, 20.0), point(5.0, 80.0)], 5.0)
    assert found.ppl == pytest.approx(40.0)
    assert math.isfinite(found.error)


@pytest.mark.parametrize("missing", [{"entropy_error": None}, {"ppl_error": None}])
def test_without_an_error_of_a_run_there_is_a_number_alone(missing):
    found = matched([point(5.0, 20.0, **missing), point(5.4, 60.0)], 5.2)
    assert found.ppl is not None
    assert found.error is None


# ---------------------------------------------------------------- runs as curves


def names(shown) -> dict[str, list[str]]:
    return {x.name: [point.beside for point in x.points] for x in shown.samplers}


@pytest.mark.parametrize(
    ("key", "values", "along"),
    [
        ("temperature", [0.7, 1.0], "temperature"),
        ("p_nucleus", [0.9, 1.0], "p_nucleus"),
        ("gamma", [0.1, 1.0], "gamma"),
        ("order_noise", [0.0, 1.0], "order_noise"),
        ("steps", [8, 16], "steps"),
        (
            "psi",
            [{"middle_mode": f"constant-{kappa}"} for kappa in (0.5, 0.9)],
            "high_mode/middle_mode/low_mode",
        ),
    ],
)
def test_what_has_several_values_draws_the_curve(key, values, along):
    runs = [run(entropy=5 + i, **{key: x}) for i, x in enumerate(values)]
    shown = frontier(runs)
    assert shown.along == along
    assert [len(sampler.points) for sampler in shown.samplers] == [2]
    assert shown.samplers[0].name == "duo_base, ancestral"


def test_temperature_goes_before_steps():
    """Steps then tell samplers apart, and are their budget."""
    shown = frontier([run(t, steps=n) for t in (0.7, 1.0) for n in (8, 16)])
    assert names(shown) == {
        f"duo_base, ancestral, {n} steps": ["0.7", "1"] for n in (8, 16)
    }
    assert [x.budget for x in shown.samplers] == [8, 16]
    assert {x.line for x in shown.samplers} == {"duo_base, ancestral"}


def test_gamma_is_what_entropy_bound_costs():
    """As steps are for others."""
    name = {"predictor": "entropy_bound"}
    shown = frontier([run(t, gamma=x, **name) for t in (0.7, 1.0) for x in (0.0, 2.5)])
    assert list(names(shown)) == [
        f"duo_base, entropy_bound, gamma={x}" for x in ("0", "2.5")
    ]
    assert {x.line for x in shown.samplers} == {"duo_base, entropy_bound"}
    assert {x.budget for x in shown.samplers} == {None}


def test_samplers_are_told_apart_by_what_they_differ_in():
    """Each by keys of its own kind; what a sampler does not read is unsaid."""
    runs = [
        *(
            run(t, predictor="confidence", order=x)
            for x in ("margin", "entropy")
            for t in (0.7, 1.0)
        ),
        *(run(t, corrector="gibbs", corrector_steps=3, steps=4) for t in (0.7, 1.0)),
        *(run(t, algo="ar", steps=n) for n, t in ((1, 0.7), (2, 1.0))),
        *(run(t, steps=16) for t in (0.7, 1.0)),
    ]
    shown = frontier(runs)
    assert list(names(shown)) == [
        "duo_base, confidence, order=margin",
        "duo_base, confidence, order=entropy",
        "duo_base, ancestral + gibbs",
        "ar",
        "duo_base, ancestral",
    ]
    by_name = {x.name: x for x in shown.samplers}
    assert by_name["duo_base, ancestral + gibbs"].budget == 16
    assert by_name["ar"].budget is None
    assert by_name["ar"].is_for_all


def test_checkpoints_and_names_of_ones_own_tell_samplers_apart():
    key = "settings/eval.checkpoint_path"
    shown = frontier(
        [run(**{key: f"runs/{x}/last.ckpt"}) for x in "ab"] + [run(model="Mine")]
    )
    expected = ["duo_base, a, ancestral", "duo_base, b, ancestral", "Mine, ancestral"]
    assert list(names(shown)) == expected


def test_precision_of_draws_and_weights_tell_samplers_apart():
    shown = frontier(
        [run(), run(use_float64=False), run(**{"checkpoint/weights": "raw"})]
    )
    assert len(shown.samplers) == 3
    assert any("use_float64=False" in name for name in names(shown))
    assert any("weights=raw" in name for name in names(shown))


def test_seeds_of_one_setting_are_one_point():
    """The geometric mean of perplexities, errors as of a mean."""
    runs = [
        run(**{"settings/seed": i, "ppl": x, "entropy": 5 + i / 5})
        for i, x in enumerate((20.0, 80.0))
    ]
    [sampler] = frontier(runs).samplers
    [found] = sampler.points
    assert found.ppl == pytest.approx(40.0)
    assert found.entropy == pytest.approx(5.1)
    assert found.entropy_error == pytest.approx(0.005 / math.sqrt(2))
    expected = 40 * math.hypot(0.5 / 20, 0.5 / 80) / 2
    assert found.ppl_error == pytest.approx(expected)
    assert found.samples == 1600
    assert len(found.files) == 2


def test_other_texts_and_judges_do_not_compare():
    """Most files are the measure; the others say what differs."""
    usual = [run(t) for t in (0.7, 0.85, 1.0)]
    for key, value, words in (
        ("settings/model", {"length": 8}, "length is 8, not 1024"),
        ("settings/data.tokenizer_name_or_path", "text8", "tokenizer is text8, not"),
        ("settings/eval.gen_ppl_eval_model_name_or_path", "a/b", "judge is b, not"),
        ("prompt", "Once", "prompt is Once, not None"),
        ("complete", False, "complete is False, not True"),
    ):
        own = {f"settings/sampling/{key}" if key == "prompt" else key: value}
        other = read(samples(**own))
        shown = frontier([*usual, other])
        assert [bool(x.differs) for x in shown.samplers] == [False, True]
        assert words in shown.samplers[1].differs


# ---------------------------------------------------------------- which entropy


def held_out(entropy: float, **more) -> dict:
    return {"held_out": {"rows": 9, "entropy": entropy, **more}}


def test_it_is_that_of_held_out_text():
    about = held_out(5.4, entropy_stderr=0.01, ngram_ppl=3.5, ngram_ppl_stderr=0.1)
    assert frontier([run(), run(0.7, **about)]).text == Text(5.4, 0.01)
    judged = {"ppl": None, "ngram_ppl": 30.0, "settings/eval.ngram_order": 5}
    content = samples(**judged, **about)
    assert frontier([read(content)]).text == Text(5.4, 0.01, 3.5, 0.1)


def test_or_the_one_that_is_given():
    runs = [run(**held_out(5.4, entropy_stderr=0.01))]
    assert frontier(runs, 5.3).text == Text(5.3)
    assert frontier(runs, 5.4).text == Text(5.4, 0.01)
    assert frontier([run()], 5.3).text == Text(5.3)


def test_or_none():
    assert frontier([run()]).text is None
    assert frontier([run(**held_out(math.inf))]).text is None


def test_files_without_a_judge_are_counted():
    shown = frontier([run(), run(ppl=None), read(likelihood())])
    assert shown.left_out == 1
    assert frontier([run(ppl=None), read(likelihood())]) is None
    assert frontier([]) is None
