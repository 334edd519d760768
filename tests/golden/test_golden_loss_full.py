"""Whole losses with the recorded weights and draws: clean ids in, loss out.

`train_stepN_*` is micro-batch N of a global batch, whose times are stratified over
the global batch; `eval_*` is validation, stratified over the batch at hand.

Known errors of the reference:

* under the cosine schedule its derivative of alpha lacks the factor (1 - eps), so
  every continuous-time loss and gradient of ours is (1 - eps) times the recorded one;
* its D3PM loss takes alpha_s = s for alpha_s = 1 - s, which is unbounded below; ours
  is the bound, recorded as `alpha_s_corrected_*`.
"""

import math
import re

import pytest
import torch
from golden_cases import EXACT, Case, close, for_cases
from golden_models import batch_sizes, build, derivative_factor

CORRECTED = "alpha_s_corrected_"
LEVELS = {"rtol": 0.0, "atol": 1e-6}  # alpha_t, for which the case states nothing


def passes(case: Case) -> list[str]:
    """Prefixes of the recorded forward passes, such as 'train_step0_' and 'eval_'."""
    found = {
        match[1]
        for name in case.stated
        if (match := re.fullmatch(r"((?:train_step\d+|eval)_)loss", name))
    }
    assert found
    return sorted(found)


def recorded(case: Case, prefix: str) -> str:
    """Prefix of the right numbers: the corrected ones where there are two kinds."""
    return CORRECTED + prefix if f"{CORRECTED}{prefix}loss" in case else prefix


def run(case, prefix, replay, monkeypatch, **settings):
    """Our loss with the recorded draws, and what it went through on the way.

    Returns:
        The model, its Loss, and the results of sample_t, corrupt and nll by name.
    """
    if f"{prefix}u_time" in case:
        settings |= batch_sizes(case, case[f"{prefix}u_time"], len(case["x0"]))
    model = build(case, **settings).train(prefix != "eval_")
    names = ("u_time", "u_move")
    replay.uniforms = [case[prefix + n] for n in names if prefix + n in case]
    if f"{prefix}random_tokens" in case:
        replay.integers = [case[f"{prefix}random_tokens"]]
    seen = {}

    def watch(name):
        method = getattr(model, name)

        def watched(*args, **kwargs):
            seen[name] = method(*args, **kwargs)
            return seen[name]

        monkeypatch.setattr(model, name, watched)

    for name in ("sample_t", "corrupt", "nll"):
        if hasattr(model, name):
            watch(name)
    batch = {"input_ids": case["x0"], "attention_mask": case["attention_mask"]}
    micro_batch = re.search(r"step(\d+)", prefix)
    loss = model.loss(batch, batch_idx=int(micro_batch[1]) if micro_batch else 0)
    return model, loss, seen


def loss_factor(model) -> float:
    """(1 - eps) where a loss is proportional to the cosine's derivative, else 1."""
    is_continuous = not model.is_autoregressive and model.config.algo.T == 0
    return derivative_factor(model.config) if is_continuous else 1.0


@for_cases("loss", holding="eval_loss")
def test_times_and_corruption(case, replay, monkeypatch):
    """Times, signal levels and noisy ids from the recorded uniforms.

    D3PM's recorded t is the one before t <- floor(t T) / T + 1 / T.
    """
    for prefix in passes(case):
        model, _, seen = run(case, prefix, replay, monkeypatch)
        if model.is_autoregressive:
            assert not replay.uniforms
            assert f"{prefix}u_time" not in case
            continue
        t, T = case[f"{prefix}t"], model.config.algo.T
        limits = case.tolerance(f"{prefix}t", case.tolerance("t"))
        if T > 0:
            t = (t.double() * T).floor() / T + 1 / T
        close(seen["sample_t"], t, f"{case}: {prefix}t", **limits)
        z = seen["corrupt"]
        case.check(f"{prefix}alpha_t", z.alpha_t, default=LEVELS)
        case.check(f"{prefix}xt", z.xt, default=case.tolerance("xt"))


@for_cases("loss", holding="eval_loss")
def test_loss(case, replay, monkeypatch):
    """Loss of every token, their masked sum, the number of valid ones, the mean."""
    for prefix in passes(case):
        model, loss, seen = run(case, prefix, replay, monkeypatch)
        golden, factor = recorded(case, prefix), loss_factor(model)
        limits = case.tolerance(f"{prefix}loss")
        case.check(f"{golden}loss_per_token", seen["nll"].nll, factor=factor)
        case.check(f"{golden}loss", loss.loss, factor=factor)
        case.check(f"{golden}nll_sum", loss.nlls.sum(), factor=factor, default=limits)
        case.check(f"{golden}num_tokens", loss.num_tokens.sum(), default=EXACT)
        assert loss.nlls.shape == (len(case["x0"]),)


@for_cases("loss", holding="eval_loss")
def test_gradients(case, replay, monkeypatch):
    """Total gradient norm and single gradients of the training losses."""
    for prefix in passes(case):
        golden = recorded(case, prefix)
        if f"{golden}grad_norm" not in case:
            assert prefix == "eval_"
            continue
        model, loss, _ = run(case, prefix, replay, monkeypatch)
        loss.loss.backward()
        factor = loss_factor(model)
        limits = case.tolerance("grad_norm")
        gradients = {name: p.grad for name, p in model.backbone.named_parameters()}
        squares = sum(float(g.double().pow(2).sum()) for g in gradients.values())
        norm = torch.tensor(math.sqrt(squares))
        case.check(f"{golden}grad_norm", norm, factor=factor, default=limits)
        for name in case.group(f"{golden}grad/"):
            ours = gradients[name]
            case.check(f"{golden}grad/{name}", ours, factor=factor, default=limits)


@for_cases("loss", holding="reconstruction_loss")
def test_reconstruction(case):
    """D3PM's -log p(x0 | x0 as input, sigma = 0) of every token."""
    with torch.no_grad():
        ours = build(case).reconstruction_nll(case["x0"]).nll
    case.check("reconstruction_loss", ours)


@for_cases("loss", holding=f"{CORRECTED}eval_loss")
def test_d3pm_does_not_repeat_the_slip(case, replay, monkeypatch):
    """alpha_s is the signal level at s: 1 - s for the log-linear schedule, not s.

    `test_loss` compares with the corrected numbers; here ours must differ from the
    uncorrected ones, which come from the same draws and noisy ids.
    """
    for prefix in passes(case):
        for name in ("u_time", "t", "u_move", "alpha_t", "xt", "num_tokens"):
            both = case[f"{prefix}{name}"], case[f"{CORRECTED}{prefix}{name}"]
            assert torch.equal(*both), name
        _, loss, seen = run(case, prefix, replay, monkeypatch)
        wrong = case[f"{prefix}loss_per_token"].double()
        ours = seen["nll"].nll.double()
        masked = seen["corrupt"].xt == case.values["mask_index"]
        close(ours[~masked], wrong[~masked], "reconstruction", rtol=1e-4, atol=1e-5)
        assert masked.any()
        assert not torch.allclose(ours[masked], wrong[masked], rtol=1e-3)
        for name, number in (("loss", loss.loss), ("nll_sum", loss.nlls.sum())):
            wrong = case[prefix + name].double()
            assert not torch.allclose(number.double(), wrong, rtol=1e-3)


def is_cosine(case: Case) -> bool:
    return case.config.noise.type == "cosine" and case.config.algo.T == 0


@for_cases("loss", holding="eval_loss", where=is_cosine)
def test_cosine_factor_is_seen(case, replay, monkeypatch):
    """`test_loss` multiplies by (1 - eps); without it the numbers must differ."""
    limits = case.tolerance("eval_loss")
    if case.config.noise.eps < 5 * limits["rtol"]:
        pytest.skip(f"noise.eps={case.config.noise.eps} is within the tolerance")
    for prefix in passes(case):
        _, loss, _ = run(case, prefix, replay, monkeypatch)
        golden = case[f"{prefix}loss"].double()
        assert not torch.allclose(loss.loss.double(), golden, **limits)
