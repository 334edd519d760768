"""Times and kappas of the psi sampler, against the formulas written out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from refusals import refused

from models.noise import SCHEDULES
from sampling.psi import PSI_SCHEDULES, KappaRule

EPS = 1e-5
MODES = (
    "pure-posterior",
    "pure-pc",
    "constant-0.3",
    "constant-remdm-0.2",
    "max-capped-0.1",
    "max-rescale-0.7",
)


def config(**changes):
    return OmegaConf.create(
        {
            "time_profile": "linear",
            "high_mode": "pure-posterior",
            "middle_mode": "pure-posterior",
            "low_mode": "pure-posterior",
            "high_frac": 0.2,
            "middle_frac": 0.6,
        }
        | changes
    )


def schedule(rescales_twice=False, **changes):
    kind = PSI_SCHEDULES["reference" if rescales_twice else "paper"]
    return kind(config(**changes))


def everywhere(mode):
    """The same mode in one phase of all times."""
    return {"high_mode": mode, "high_frac": 1.0, "middle_frac": 0.0}


@pytest.fixture(params=sorted(SCHEDULES))
def noise(request):
    return SCHEDULES[request.param]()


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("mode", "kind", "eta"),
    [
        ("pure-posterior", "pure-posterior", 1.0),
        ("pure-pc", "pure-pc", 0.0),
        ("constant-0.5", "constant", 0.5),
        ("constant-1", "constant", 1.0),
        ("constant-0", "constant", 0.0),
        ("constant-.25", "constant", 0.25),
        ("constant-1e-3", "constant", 0.001),
        ("constant-2.5e-3", "constant", 0.0025),
        ("constant-remdm-0.2", "constant-remdm", 0.2),
        ("max-capped-0.01", "max-capped", 0.01),
        ("max-capped-1e-2", "max-capped", 0.01),
        ("max-rescale-0.05", "max-rescale", 0.05),
    ],
)
def test_modes_are_taken_apart(mode, kind, eta):
    assert KappaRule.parse(mode, "key") == (kind, eta)


@pytest.mark.parametrize(
    ("mode", "hint"),
    [
        ("constant", "constant-ETA"),
        ("constant-remdm", "constant-remdm-ETA"),
        ("max-capped", "max-capped-ETA"),
        ("max-rescale-", "max-rescale"),
        ("pure-pc-0.5", "write pure-pc"),
        ("pure-posterior-1", "write pure-posterior"),
        ("constant-1.5", "at most 1"),
        ("constant--0.5", "Choose from"),
        ("constant-x", "Choose from"),
        ("max-caped-0.1", "max-capped"),
        ("", "Choose from"),
        (None, "Choose from"),
        (0.5, "Choose from"),
    ],
)
@pytest.mark.parametrize("phase", ["high", "middle", "low"])
def test_other_modes_are_refused(mode, hint, phase):
    """In one line, with the key."""
    key = f"{phase}_mode"
    refused(lambda: schedule(**{key: mode}), f"sampling.psi.{key}", hint)


@pytest.mark.parametrize(
    "profile",
    [
        "constant",
        "linear-constant-linear",
        "linear-constant-linear-",
        "linear-constant-linear-x",
        "linear-constant-linear-0.5-in",
        "linear-inv",
        "linear-constant-linear-0",
        "linear-constant-linear-1",
        "linear-constant-linear-1.5-inv",
        None,
    ],
)
def test_other_time_profiles_are_refused(profile):
    parts = "sampling.psi.time_profile", repr(profile)
    refused(lambda: schedule(time_profile=profile), *parts)


def test_fractions_above_one_are_refused():
    refused(
        lambda: schedule(high_frac=0.6, middle_frac=0.5),
        "high_frac=0.6",
        "middle_frac=0.5",
    )


# ---------------------------------------------------------------- phases and times


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_phases_share_out_the_times(num_steps, high, share):
    """num_steps + 1 of them, none negative, each near its fraction."""
    middle = share * (1 - high)
    if high + middle > 1:  # by rounding
        middle = 0.0
    sizes = schedule(high_frac=high, middle_frac=middle).phase_sizes(num_steps)
    assert sum(sizes) == num_steps + 1
    assert min(sizes) >= 0
    assert abs(sizes[0] - high * (num_steps + 1)) <= 0.5
    assert abs(sizes[1] - middle * (num_steps + 1)) <= 1


@pytest.mark.parametrize("num_steps", [2, 4, 6, 8, 10, 12])
def test_two_halves_leave_nothing_below_zero(num_steps):
    """Of an odd number of times both halves may round up."""
    sizes = schedule(high_frac=0.5, middle_frac=0.5).phase_sizes(num_steps)
    assert sizes[2] >= 0
    assert sum(sizes) == num_steps + 1


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_linear_times(noise, num_steps):
    times = schedule().times(noise, num_steps, EPS)
    expected = torch.linspace(1, EPS, num_steps + 1, dtype=torch.float64)
    assert torch.equal(times, expected)


def test_times_with_a_plateau(noise):
    """Down to it, there, and from it to the end."""
    times = schedule(
        time_profile="linear-constant-linear-0.4", high_frac=0.3, middle_frac=0.4
    ).times(noise, 9, EPS)
    low = [0.4, 0.4 - (0.4 - EPS) / 2, EPS]
    expected = torch.tensor([1, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, *low]).double()
    assert times.dtype == torch.float64
    torch.testing.assert_close(times, expected, rtol=0, atol=1e-7)


def test_a_plateau_of_a_signal_level(noise):
    """-inv: where alpha_t is the number, not t."""
    times = schedule(
        time_profile="linear-constant-linear-0.9-inv", high_frac=0.3, middle_frac=0.4
    ).times(noise, 9, EPS)
    alphas = noise(times[2:8]).alpha_t
    expected = torch.full((6,), 0.9, dtype=torch.float64)
    torch.testing.assert_close(alphas, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("high_frac", "middle_frac", "expected"),
    [
        (0.0, 0.4, [0.5, 0.5, 0.5, 0.25, 0.0]),  # begins at the plateau
        (0.2, 0.6, [1.0, 0.5, 0.5, 0.5, 0.5]),  # phases of one point
        (0.2, 0.8, [1.0, 0.5, 0.5, 0.5, 0.5]),  # no low phase
        (0.0, 1.0, [0.5] * 5),
        (1.0, 0.0, [1.0, 0.875, 0.75, 0.625, 0.5]),
    ],
)
def test_times_of_short_and_empty_phases(noise, high_frac, middle_frac, expected):
    times = schedule(
        time_profile="linear-constant-linear-0.5",
        high_frac=high_frac,
        middle_frac=middle_frac,
    ).times(noise, 4, EPS)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(times, expected, rtol=0, atol=EPS)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.99))
def test_times_never_rise(num_steps, high, share, plateau):
    noise = SCHEDULES["cosine"]()
    times = schedule(
        time_profile=f"linear-constant-linear-{plateau:.6f}",
        high_frac=high,
        middle_frac=min(share * (1 - high), 1 - high),
    ).times(noise, num_steps, EPS)
    assert len(times) == num_steps + 1
    assert bool((times.diff() <= 0).all())
    assert times[0] <= 1
    assert times[-1] >= EPS


# ---------------------------------------------------------------- kappas


def remdm(rule):
    """kappa = 1 - sigma_t / (1 - alpha_s) for a ReMDM rate sigma_t (limit), where
    limit = (1 - alpha_s) / alpha_t is the largest allowed by ReMDM, with 1."""

    def kappa(alpha_t, alpha_s):
        sigma_t = rule((1 - alpha_s) / alpha_t)
        return min(1.0, max(0.0, 1 - sigma_t / (1 - alpha_s)))

    return kappa


@pytest.mark.parametrize(
    ("mode", "rescales_twice", "formula"),
    [
        ("max-capped-0.1", False, remdm(lambda limit: min(0.1, limit))),
        ("constant-remdm-0.2", False, remdm(lambda limit: 0.2)),
        ("max-rescale-0.3", False, remdm(lambda limit: 0.3 * min(1, limit))),
        ("max-rescale-0.3", True, remdm(lambda limit: 0.3 * min(0.3, limit))),
        ("max-capped-0.1", True, remdm(lambda limit: min(0.1, limit))),
        ("pure-posterior", False, lambda alpha_t, alpha_s: 1.0),
        ("pure-pc", False, lambda alpha_t, alpha_s: 0.0),
        ("constant-0.4", False, lambda alpha_t, alpha_s: 0.4),
    ],
)
def test_kappas_are_the_formulas(noise, mode, rescales_twice, formula):
    """Of every step, from alpha_t to alpha_s."""
    rules = schedule(rescales_twice, **everywhere(mode))
    alphas = noise(rules.times(noise, 20, EPS)).alpha_t
    levels = alphas.tolist()
    expected = [formula(*pair) for pair in pairwise(levels)]
    got = rules.kappas(alphas)
    assert len(got) == 21
    assert got[:20] == pytest.approx(expected, abs=1e-12)
    assert all(isinstance(kappa, float) for kappa in got)


def test_remdm_rates_are_neither_all_one_nor_all_zero(noise):
    """So that the formulas above are told apart."""
    for mode in ("max-capped-0.1", "constant-remdm-0.2", "max-rescale-0.3"):
        rules = schedule(**everywhere(mode))
        kappas = rules.kappas(noise(rules.times(noise, 20, EPS)).alpha_t)
        assert len(set(kappas)) > 3


def test_each_phase_has_its_mode(noise):
    """The last time of a phase that follows the schedule has the posterior alone."""
    rules = schedule(
        high_mode="constant-0.25",
        middle_mode="constant-remdm-1e-3",
        low_mode="pure-pc",
        high_frac=0.3,
        middle_frac=0.3,
    )
    kappas = rules.kappas(noise(rules.times(noise, 9, EPS)).alpha_t)
    assert kappas[:3] == [0.25] * 3
    assert all(0.9 < kappa < 1 for kappa in kappas[3:5])
    assert kappas[5] == 1
    assert kappas[6:] == [0] * 4


@given(
    st.lists(st.sampled_from(MODES), min_size=3, max_size=3),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(["linear", "linear-constant-linear-0.5"]),
    st.sampled_from(sorted(SCHEDULES)),
)
def test_kappas_are_weights(modes, num_steps, high, profile, name):
    """One for each time, in [0, 1], whatever the phases, empty ones among them."""
    noise = SCHEDULES[name]()
    rules = schedule(
        time_profile=profile,
        high_mode=modes[0],
        middle_mode=modes[1],
        low_mode=modes[2],
        high_frac=high,
        middle_frac=(1 - high) / 2,
    )
    kappas = rules.kappas(noise(rules.times(noise, num_steps, EPS)).alpha_t)
    assert len(kappas) == num_steps + 1
    assert all(0 <= kappa <= 1 for kappa in kappas)


# ---------------------------------------------------------------- in a sampler


@pytest.mark.parametrize(("compat", "cap"), [("paper", 1), ("reference", 0.3)])
def test_the_sampler_follows_the_schedule(make_model, compat, cap):
    """Levels and kappa of each step; "max-rescale" by algo.compat."""
    model = make_model(
        "algo=duo_base",
        f"algo.compat={compat}",
        "sampling.predictor=psi",
        "sampling.psi.high_mode=max-rescale-0.3",
        "sampling.psi.high_frac=1",
        "sampling.psi.middle_frac=0",
    )
    plan = model.sampler.plan(model.noise, 6)
    times = torch.linspace(1, EPS, 7, dtype=torch.float64)
    levels = model.noise(times).alpha_t.tolist()
    formula = remdm(lambda limit: 0.3 * min(cap, limit))
    assert len(plan) == 6
    for index, step in enumerate(plan):
        assert float(step.alpha_t) == pytest.approx(levels[index])
        assert float(step.alpha_s) == pytest.approx(levels[index + 1])
        expected = formula(levels[index], levels[index + 1])
        assert step.kappa == pytest.approx(expected, abs=1e-12)
