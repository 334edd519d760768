"""The noise schedules of MDLM, and its loss by three ways to draw times.

Known errors of the reference, and what ours does instead:

* `importance` and `change` have the weight -f_0 in the place of f_1 - f_0, which the
  expectation wants; our losses are (f_0 - f_1) / f_0 times the recorded ones;
* they are accepted for schedules for which they are not defined; ours refuses that.
"""

import pytest
import torch
from golden_cases import Case, approx, close, for_cases
from golden_mdlm import GIVEN_TYPES, VARIANTS, build, names_of, our_schedule, ran, takes

from models.noise import SCHEDULES, Noise
from utils import ConfigError

TYPES = {"f32": torch.float32, "f64": torch.float64}
FLOAT32 = {"rtol": 2e-4, "atol": 1e-6}
EVERY_TYPE = pytest.mark.parametrize("precision", TYPES)
EVERY_MODE = pytest.mark.parametrize("mode", VARIANTS)


def schedules(case: Case) -> list[tuple[int, Noise]]:
    """Our schedule for each setting of the case, with its index."""
    schedule = SCHEDULES[our_schedule(case.config.noise.type)]
    names = case.values["setting_names"]
    return [
        (index, schedule(**dict(zip(names, values, strict=True))))
        for index, values in enumerate(case.values["settings"])
    ]


@EVERY_TYPE
@for_cases("mdlm_noise", holding="t")
def test_total_noise_and_rate(case, precision):
    """sigma = -log(alpha) and its derivative, whatever the type of t."""
    t = case["t"].to(TYPES[precision])
    for index, noise in schedules(case):
        alpha_t, dalpha_t = noise(t)
        assert alpha_t.dtype == t.dtype
        case.check(f"total_{precision}_{index}", -torch.log(alpha_t))
        case.check(f"rate_{precision}_{index}", -dalpha_t / alpha_t)


@for_cases("mdlm_noise", holding="t")
def test_inverse_of_recorded_noise(case):
    """The time of the recorded level is the recorded time."""
    for index, noise in schedules(case):
        t = noise.inverse(torch.exp(-case[f"total_f64_{index}"]))
        close(t, case["t"], f"{case}: inverse", atol=1e-9)


@EVERY_TYPE
@for_cases("mdlm_noise", holding="u_importance")
def test_times_of_importance_sampling(case, precision):
    """The schedule's times of the levels at uniform numbers, and their range."""
    u = case["u_importance"].to(TYPES[precision])
    for index, noise in schedules(case):
        levels = noise.log_uniform()
        ends = {"f_0": levels.f_0, "f_T": levels.f_1}
        for name, ours in ends.items():
            name = f"{name}_{precision}_{index}"
            limits = case.tolerance(name)
            assert ours == approx(case.values[name], limits)
        if precision == "f32":  # 1 - alpha has no digits left in it
            u = u.double()
        case.check(
            f"t_importance_{precision}_{index}", noise.inverse(levels(u).alpha_t)
        )


@EVERY_MODE
@EVERY_TYPE
@for_cases("mdlm_noise", holding="logits")
def test_loss(case, precision, mode, replay, monkeypatch):
    """From the recorded draws: levels, noisy ids, what the network is told, loss."""
    if mode in case.values.get("not_defined", {}):
        pytest.skip("the next test")
    for index, noise in schedules(case):
        suffix = f"{mode}_{precision}_{index}"
        model = build(case, precision, **takes(case, index, mode))
        found = ran(model, case, case["u_time"], case["u_move"], replay, monkeypatch)
        z, limits = found.z, case.tolerance
        case.check(f"x_t_{suffix}", z.xt)
        case.check(f"move_chance_{suffix}", 1 - z.alpha_t)
        told = case[f"conditioning_{suffix}"]  # to the network, which is float32
        close(found.told, told, f"{case}: conditioning_{suffix}", **FLOAT32)
        factor = 1.0
        if mode != "plain":
            levels = noise.log_uniform()
            factor = (levels.f_0 - levels.f_1) / levels.f_0
        if f"times_{suffix}" in case:
            t = noise.inverse(z.alpha_t[:, 0])
            case.check(f"times_{suffix}", t)
            case.check(f"sigma_{suffix}", model.sigma(z.alpha_t)[:, 0])
        if f"dsigma_{suffix}" in case:
            alpha_t, dalpha_t = noise(t)
            case.check(f"dsigma_{suffix}", -dalpha_t / alpha_t)
        case.check(f"nll_{suffix}", found.nll, factor=factor)
        name = f"loss_{suffix}"
        golden = case.values[name] * factor
        assert found.loss == approx(golden, limits(name))


@EVERY_MODE
@for_cases("mdlm_noise", holding="not_defined")
def test_what_is_not_defined_is_refused(case, mode):
    if mode in case.values["not_defined"]:
        with pytest.raises(ConfigError, match="is not defined for noise="):
            build(case, "f32", **takes(case, 0, mode))


@for_cases("mdlm_noise", holding="logits")
def test_without_time_conditioning_the_network_is_told_nothing(
    case, replay, monkeypatch
):
    for mode in VARIANTS:
        if mode in case.values.get("not_defined", {}):
            continue
        settings = takes(case, 0, mode) | {"algo.time_conditioning": False}
        model = build(case, "f64", **settings)
        found = ran(model, case, case["u_time"], case["u_move"], replay, monkeypatch)
        assert not found.told.any()


def test_names_are_ours():
    """Every name of the code of MDLM is one of our schedules."""
    assert {our_schedule(name) for name in names_of()} <= SCHEDULES.keys()
    assert GIVEN_TYPES == {"f32": "float32", "f64": "float64"}
