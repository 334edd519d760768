"""Noise schedules: signal level, derivative and inverse.

Two known errors of the reference, and what ours does instead:

* its inverse ignores eps and returns (1 - eps) t for alpha(t); ours returns t, because
  an inverse that does not undo the schedule sends samplers to the wrong time;
* its cosine derivative lacks the chain-rule factor (1 - eps); ours is the derivative.
"""

import pytest
import torch
from golden_cases import Case, approx, close, for_cases

from models.noise import SCHEDULES, Noise

TYPES = {"f32": torch.float32, "f64": torch.float64}


def schedule_of(case: Case) -> str:
    """Which of our schedules the case is about: its config or its name says so."""
    if "noise" in case.config:
        return case.config.noise.type
    text = f"{case.name} {case.info['description']}"
    found = [name for name in SCHEDULES if name.replace("-", "") in text]
    return max(found, key=len)  # "linear" is a part of "loglinear"


def schedules(case: Case) -> list[tuple[int, Noise]]:
    """Our schedule for each eps of the case, with its index."""
    noise = SCHEDULES[schedule_of(case)]
    return [(index, noise(eps)) for index, eps in enumerate(case.values["eps"])]


@pytest.mark.parametrize("precision", TYPES)
@for_cases("noise", holding="eps")
def test_signal_level(case, precision):
    """alpha(t) for every eps; the float32 results take t in float32."""
    t = case["t"].to(TYPES[precision])
    for index, noise in schedules(case):
        alpha_t = noise(t).alpha_t
        assert alpha_t.dtype == t.dtype
        case.check(f"alpha_{precision}_{index}", alpha_t)


@pytest.mark.parametrize("precision", TYPES)
@for_cases("noise", holding="eps")
def test_derivative(case, precision):
    """d alpha / dt: the reference's, times (1 - eps) for the cosine schedule.

    That factor is right: our derivative is also the slope of the recorded alpha.
    """
    t = case["t"].to(TYPES[precision])
    for index, noise in schedules(case):
        name = f"dalpha_{precision}_{index}"
        factor = 1 - noise.eps if schedule_of(case) == "cosine" else 1.0
        dalpha_t = noise(t).dalpha_t
        case.check(name, dalpha_t, factor=factor)
        if factor < 1 - 10 * case.tolerance(name).get("atol", 0):
            with pytest.raises(AssertionError):
                case.check(name, dalpha_t)


@for_cases("noise", holding="eps")
def test_derivative_is_the_slope(case):
    """Ours equals a central difference of ours, which the recorded alpha confirms."""
    t = case["t"].clamp(1e-3, 1 - 1e-3)
    for _, noise in schedules(case):
        h = 1e-5
        slope = (noise(t + h).alpha_t - noise(t - h).alpha_t) / (2 * h)
        close(noise(t).dalpha_t, slope, f"{case}: slope", rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("precision", TYPES)
@for_cases("noise", holding="eps")
def test_inverse(case, precision):
    """Of the recorded alpha(t), the reference's inverse is (1 - eps) times ours.

    Ours is right: it gives t back. Where cosine's angle is near 0, alpha holds it to
    the square root of the precision only, hence the tolerance of that.
    """
    t = case["t"].to(TYPES[precision])
    atol = torch.finfo(t.dtype).eps ** 0.5
    for index, noise in schedules(case):
        ours = noise.inverse(case[f"alpha_{precision}_{index}"])
        name = f"t_for_alpha_{precision}_{index}"
        case.check(name, ours, factor=1 / (1 - noise.eps))
        close(ours, t, f"{case}: inverse(alpha(t)) and t", atol=atol)
        slack = 10 * case.tolerance(name).get("atol", 0)
        if precision == "f64" and noise.eps > slack:
            with pytest.raises(AssertionError):
                case.check(name, ours)


@for_cases("noise", holding="scalar_inverse")
def test_inverse_of_plain_numbers(case):
    """The reference's inverse of a plain number is ours at eps = 0.

    That is its missing eps in another form: with eps = 0 there is nothing to ignore.
    """
    noise = SCHEDULES[schedule_of(case)](eps=0.0)
    limits = case.tolerance("scalar_inverse", {"atol": 1e-6})
    for alpha, golden in case.values["scalar_inverse"].items():
        t = noise.inverse(torch.tensor(float(alpha), dtype=torch.float64))
        assert float(t) == approx(golden, limits)
