"""The discrete-time objective of MDLM (T > 0), from recorded logits and draws.

Known errors of the reference, and what ours does instead:

* it is nan at t = 1/T; ours is the closed form T (alpha_s - alpha_t) / (1 - alpha_t);
* its weight takes 1 - alpha_t = t, clamped to 1 - 1e-4, whatever the schedule masks by;
  ours is that of the schedule. With log-linear noise and t < 1 the two are the same.
"""

import math

import pytest
import torch
from golden_cases import Case, approx, close, for_cases
from golden_mdlm import build, our_schedule, ran

from models.noise import SCHEDULES, settings_of


def runs(case: Case) -> list[dict]:
    assert case.values["runs"]
    return case.values["runs"]


def settings(case: Case, run: dict) -> dict:
    name, given = our_schedule(run["noise"]), case.config.noise
    own = [key for key in settings_of(SCHEDULES[name]) if key in given]
    return {
        "noise.type": name,
        **{f"noise.{key}": given[key] for key in own},
        "algo.T": run["T"],
        "algo.time_conditioning": case.config.time_conditioning,
        "training.sampling_eps": run["sampling_eps"],
        "training.antithetic_sampling": run["antithetic_sampling"],
    }


def of_run(case, run, precision, replay, monkeypatch, **more):
    model = build(case, precision, **settings(case, run) | more)
    u_time = case[f"{run['prefix']}/u_time"]
    return model, ran(model, case, u_time, case["u_move"], replay, monkeypatch)


@pytest.mark.parametrize("precision", ["f32", "f64"])
@for_cases("mdlm_discrete", holding="runs")
def test_times_and_noisy_ids(case, precision, replay, monkeypatch):
    """Times on the grid, levels there, noisy ids, and what the network is told."""
    for run in runs(case):
        front = f"{run['prefix']}/"
        model, found = of_run(case, run, precision, replay, monkeypatch)
        z = found.z
        t = model.noise.inverse(z.alpha_t)[:, 0]
        limits = case.tolerance(f"{front}t_{precision}")
        close(t, case[f"{front}t_{precision}"], f"{case}: {front}t", **limits)
        case.check(f"{front}x_t_{precision}", z.xt)
        case.check(f"{front}move_chance_{precision}", 1 - z.alpha_t)
        sigma = case[f"{front}sigma_{precision}"].double()
        close(found.told, sigma, f"{case}: sigma", rtol=2e-4, atol=1e-4)


@for_cases("mdlm_discrete", holding="runs")
def test_closed_form(case, replay, monkeypatch):
    """Weight of each row, loss of each token, mean: finite at the first time, too."""
    for run in runs(case):
        front = f"{run['prefix']}/"
        _, found = of_run(case, run, "f64", replay, monkeypatch)
        z = found.z
        weight = (-z.dalpha_t / (1 - z.alpha_t))[:, 0]
        case.check(f"{front}weight_closed_f64", weight)
        case.check(f"{front}nll_closed_f64", found.nll)
        limits = case.tolerance("loss_closed_f64")
        assert found.loss == approx(run["loss_closed_f64"], limits)


@pytest.mark.parametrize("precision", ["f32", "f64"])
@for_cases("mdlm_discrete", holding="runs")
def test_loss_of_the_reference_where_it_is_right(case, precision, replay, monkeypatch):
    """Rows that are finite there and before t = 1, under log-linear noise."""
    for run in runs(case):
        front = f"{run['prefix']}/"
        _, found = of_run(case, run, precision, replay, monkeypatch)
        golden = case[f"{front}nll_{precision}"]
        broken = golden.isnan().any(dim=-1)
        assert broken.nonzero().flatten().tolist() == run[f"nan_rows_{precision}"]
        assert found.nll.isfinite().all()
        assert math.isfinite(found.loss)
        rows = ~broken & (case[f"{front}t_f64"] < 1 - 1e-6)
        if run["noise"] == "loglinear":
            case.check(f"{front}nll_{precision}", found.nll, rows=rows)
        else:  # its weights are those of another schedule
            limits = case.tolerance(f"{front}nll_{precision}")
            ours, theirs = found.nll[rows].double(), golden[rows].double()
            assert not torch.allclose(ours, theirs, **limits)


@for_cases("mdlm_discrete", holding="runs")
def test_without_time_conditioning_the_network_is_told_nothing(
    case, replay, monkeypatch
):
    for run in runs(case):
        told = {"algo.time_conditioning": False}
        _, found = of_run(case, run, "f64", replay, monkeypatch, **told)
        assert not found.told.any()
