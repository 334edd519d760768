"""Samplers with the recorded weights and draws: nucleus, analytic steps, whole runs.

Known error of the reference: D3PM draws revealed tokens anew at every step; its runs
replay under `algo.compat=reference`, and under ours revealed tokens stay.
"""

import re
from itertools import pairwise

import pytest
import torch
from golden_cases import Case, close, find_cases, for_cases, golden_dir, parameters
from golden_models import build, sizes_of
from torch import Tensor

import samplers
from samplers import SAMPLERS, Analytic, nucleus


class Watch:
    """What a sampler fed to its categorical draws and got from them."""

    def __init__(self, monkeypatch) -> None:
        self.probs: list[Tensor] = []
        self.drawn: list[Tensor] = []
        draw = samplers.sample_categorical

        def watched(probs, generator):
            self.probs.append(probs)
            self.drawn.append(draw(probs, generator))
            return self.drawn[-1]

        monkeypatch.setattr(samplers, "sample_categorical", watched)


# ---------------------------------------------------------------- nucleus


@for_cases("nucleus", holding="log_probs")
def test_nucleus(case):
    """Kept and renormalised probabilities for every top_p; what is cut is exactly 0.

    Among equal probabilities the order of torch.sort decides which go, so rows with
    ties at the edge are compared as sorted lists. Ours has no top-k.
    """
    probs = case["log_probs"].exp()
    names = [name for name in case.stated if re.fullmatch(r"top_p_[\d.]+", name)]
    assert names
    for name in names:
        golden = case[name].exp()
        ours = nucleus(probs, float(name.removeprefix("top_p_")))
        tied = (golden > 0).sum(dim=-1) != unambiguous(probs, golden)
        assert torch.equal((ours > 0)[~tied], (golden > 0)[~tied])
        limits = case.tolerance(name)
        close(ours[~tied], golden[~tied], f"{case}: {name}", **limits)
        in_order = (x[tied].sort(dim=-1).values for x in (ours, golden))
        close(*in_order, f"{case}: {name}, ties", **limits)


def unambiguous(probs: Tensor, golden: Tensor) -> Tensor:
    """Tokens as likely as the least likely kept one or more, (..., K) -> (...).

    More than are kept means that a tie was cut.
    """
    least = torch.where(golden > 0, probs, torch.inf).amin(dim=-1, keepdim=True)
    return (probs >= least).sum(dim=-1)


# ---------------------------------------------------------------- analytic


@for_cases("analytic", holding="t_dt")
def test_analytic_step(case, replay, monkeypatch):
    """Scores, then the step from t to t - dt and noise removal at t: probabilities
    (no mask is left by the latter) and draws."""
    model, watch = build(case), Watch(monkeypatch)
    sampler = Analytic(model.config.sampling)
    xt = case["xt"]
    column = torch.ones(len(xt), 1, dtype=torch.float64)
    for index, (t, dt) in enumerate(case.values["t_dt"]):
        alpha_t = model.noise(t * column).alpha_t
        alpha_s = model.noise((t - dt) * column).alpha_t
        draws = (f"{index}/analytic", f"{index}/denoise")
        replay.uniforms = [case[f"{name}_u"] for name in draws]
        with torch.no_grad():
            score = model.log_score(xt, alpha_t).exp()
            sampler.step(model, xt, alpha_t, alpha_s, None)
            sampler.remove_by_draw(model, xt, alpha_t, None)
        close_to_row_maximum(case, f"{index}/score", score, like=f"{draws[0]}_probs")
        for name in draws:
            probs = watch.probs.pop(0)
            close_to_row_maximum(case, f"{name}_probs", probs)
            case.check(f"{name}_sample", watch.drawn.pop(0))
        assert (probs[..., model.mask_index] == 0).all()  # of noise removal


def close_to_row_maximum(
    case: Case, name: str, ours: Tensor, like: str | None = None
) -> None:
    """Compares to the stated tolerance, which is relative to each row's maximum."""
    golden = case[name].double()
    largest = golden.amax(dim=-1, keepdim=True)
    limits = case.tolerance(like or name)
    what = f"{case}: {name}"
    close(ours / largest, golden / largest, what, atol=limits["rtol"])


# ---------------------------------------------------------------- whole runs


def runs(where=lambda case: True) -> list:
    """(case, index of a run) for every recorded run; those of predictors that ours
    does not have are skipped."""
    found = []
    for case in find_cases(golden_dir(), "sampling", holding="runs"):
        if not where(case):
            continue
        for index, run in enumerate(case.values["runs"]):
            marks = []
            if run["predictor"] not in SAMPLERS:
                reason = f"predictor={run['predictor']} is not in samplers.SAMPLERS"
                marks = [pytest.mark.skip(reason=reason)]
            name = f"{case}-{index}-{run['predictor']}"
            found.append(pytest.param((case, index), id=name, marks=marks))
    return found or parameters([], "sampling* with runs")


def replayed(case: Case, index: int, replay, monkeypatch, **settings):
    """Our run with the recorded draws: samples, its draws, its network calls."""
    run = case.values["runs"][index]
    for key in ("predictor", "noise_removal", "steps", "p_nucleus", "psi"):
        if key in run:
            settings[f"sampling__{key}"] = run[key]
    model = build(case, **settings)
    replay.uniforms = list(case[f"{index}/u"])
    if f"{index}/x_init" in case:
        replay.integers = [case[f"{index}/x_init"]]
    watch, calls = Watch(monkeypatch), []
    model.backbone.blocks[0].register_forward_hook(lambda *call: calls.append(1))
    samples = model.generate_samples(case.values["batch"])
    return samples, watch, len(calls)


@pytest.mark.parametrize("run", runs())
def test_run(run, replay, monkeypatch):
    """Ids after every draw and at the end, exactly; probabilities of the first and
    of the last draw; no more network calls than the reference's.

    For D3PM this is `algo.compat=reference`, whose errors the recorded run has.
    """
    case, index = run
    is_d3pm = case.config.algo.name == "d3pm"
    settings = {"algo__compat": "reference"} if is_d3pm else {}
    samples, watch, calls = replayed(case, index, replay, monkeypatch, **settings)
    for step, (ours, golden) in enumerate(
        zip(watch.drawn, case[f"{index}/x_steps"], strict=True)
    ):
        assert torch.equal(ours, golden), f"step {step}"
    case.check(f"{index}/x_final", samples)
    case.check(f"{index}/first_probs", watch.probs[0])
    case.check(f"{index}/last_probs", watch.probs[-1])
    # float32 noise would make rare tokens rarer.
    assert all(probs.dtype == case[f"{index}/u"].dtype for probs in watch.probs)
    recorded = case.values["runs"][index]
    assert len(watch.drawn) == recorded["sampling_calls"]
    assert calls <= recorded["network_calls"]


@pytest.mark.parametrize("run", runs(lambda case: case.config.algo.name == "d3pm"))
def test_d3pm_keeps_revealed_tokens(run, replay, monkeypatch):
    """With algo.compat=paper a token stays once it is there, which is what the
    posterior says; the recorded run changes some."""
    case, index = run
    samples, watch, _ = replayed(case, index, replay, monkeypatch)
    mask = case.values["mask_index"]
    assert not changed([*watch.drawn, samples], mask)
    if case.values["runs"][index]["noise_removal"] != "none":
        assert (samples != mask).all()
    assert changed(list(case[f"{index}/x_steps"]), mask)


def changed(x_steps: list[Tensor], mask: int) -> bool:
    """Whether any token that is not the mask is another one a step later."""
    return any(bool(((x != mask) & (x != y)).any()) for x, y in pairwise(x_steps))


@for_cases("sampling", holding="gumbel")
def test_autoregressive_run(case, replay):
    """Token by token from bos, with the recorded Gumbel noise g turned into the
    uniforms u = exp(-exp(-g)) of the same draw: argmax p / -log u = argmax log p + g.
    """
    gumbel = case["gumbel"].double()
    replay.uniforms = list(torch.exp(-torch.exp(-gumbel)).unbind(dim=1))
    samples = build(case).generate_samples(len(gumbel))
    case.check("x", samples)
    assert (samples[:, 0] == case.values["bos_token_id"]).all()
    assert (samples != sizes_of(case)[1]).all()  # never the mask
