"""Losses of single tokens from given network outputs, on a grid of times.

Row i of a batch is time t[i], from 1e-6 to 1. The reference computes in float32 all
through and loses digits at both ends; `*_f64` are the same formulas in float64. Ours
keeps signal levels in float64 beside float32 logits.

Known errors of the reference: D3PM's alpha_s, and the cosine's derivative; see
`test_golden_loss_full.py`. `loss_alpha_s_corrected*` are the right numbers for D3PM,
NaN where s = t - 1/T <= 0.
"""

import re

import pytest
import torch
from golden_cases import Case, close, for_cases
from golden_models import build, derivative_factor
from torch import Tensor

PRECISIONS = {"": torch.float32, "_f64": torch.float64}  # by suffix of the tensors


def model_of(case: Case):
    """The case's algorithm around any network, with times taken as they are."""
    times = {"training__antithetic_sampling": False, "training__sampling_eps": 0.0}
    return build(case, weights=None, model__n_blocks=1, **times)


def levels(model, case: Case) -> tuple[Tensor, Tensor]:
    """Our float64 alpha_t and d alpha / dt at the case's times, (B, 1) each.

    NOTE: `Diffusion.corrupt` turns the derivative into a difference where T > 0; the
    D3PM loss, the only one with T > 0 here, does not use it.
    """
    t = case["t_discretised_f64"] if "t_discretised_f64" in case else case["t"]
    return model.noise(t[:, None])


def loss_name(case: Case) -> str:
    corrected = "loss_alpha_s_corrected"
    return corrected if corrected in case else "loss"


def our_loss(model, case: Case, dtype: torch.dtype) -> Tensor:
    """Our loss of every token for logits of a type, (B, L)."""
    alpha_t, dalpha_t = levels(model, case)
    xt, x0 = case["xt"], case["x0"]
    log_x_theta = model.process_logits(
        case["raw_logits"].to(dtype), xt=xt, sigma=model.sigma(alpha_t)
    )
    assert log_x_theta.dtype == dtype
    return model.nll_per_token(
        log_x_theta, xt=xt, x0=x0, alpha_t=alpha_t, dalpha_t=dalpha_t
    )


def relative_error(values: Tensor, truth: Tensor) -> Tensor:
    """Largest relative error of each row, (B, L) -> (B,); 0/0 counts as 0."""
    values, truth = values.double(), truth.double()
    error = (values - truth).abs() / truth.abs().clamp(min=1e-300)
    return error.amax(dim=-1)


def stated_rows(case: Case) -> Tensor:
    """Rows for which the case's float32 tolerance is meant, (B,) bool."""
    text = case.info["tolerance"]["loss"]
    if not (found := re.search(r"([\d.e-]+) <= t <= ([\d.e-]+)", text)):
        return torch.ones(case["t"].shape, dtype=torch.bool)
    low, high = map(float, found.groups())
    return (case["t"] >= low) & (case["t"] <= high)


@for_cases("loss", holding="raw_logits")
def test_schedule(case, replay):
    """Times (D3PM's discretised), alpha, its derivative and sigma on the grid."""
    model = model_of(case)
    replay.uniforms = [case["t"]]  # u = t, for neither strata nor eps are set
    t = model.sample_t(len(case["t"]))
    if model.T > 0:
        for name in ("t_discretised", "t_discretised_f64"):  # both made in float32
            case.check(name, t, default={"rtol": 1e-6})
    else:
        assert torch.equal(t, case["t"])
    alpha_t, dalpha_t = levels(model, case)
    factor = derivative_factor(model.config)
    for suffix, limit in (("", 1e-6), ("_f64", 1e-12)):
        limits = {"atol": limit, "rtol": limit}
        case.check(f"alpha_t{suffix}", alpha_t, default=limits)
        case.check(f"dalpha_t{suffix}", dalpha_t, factor=factor, default=limits)
        sigma = model.sigma(case[f"alpha_t{suffix}"])
        case.check(f"sigma{suffix}", sigma, default=limits)


@pytest.mark.parametrize("suffix", PRECISIONS)
@for_cases("loss", holding="raw_logits")
def test_process_logits(case, suffix):
    """Raw network output to log-probabilities, or for SEDD to log-scores."""
    model = model_of(case)
    assert case["raw_logits"].shape[-1] == model.vocab_size
    ours = model.process_logits(
        case["raw_logits"].to(PRECISIONS[suffix]),
        xt=case["xt"],
        sigma=case[f"sigma{suffix}"],
    )
    ours = model.carry_over(ours, case["xt"])
    golden = case[f"log_x_theta{suffix}"]
    # -1e6 stands for impossible; float32 holds it to 0.06 only.
    impossible = golden < case.values["neg_infinity"] / 2
    assert torch.equal(ours < case.values["neg_infinity"] / 2, impossible)
    close(ours[impossible], golden[impossible], "impossible tokens", rtol=1e-6)
    limits = {"rtol": 1e-12, "atol": 1e-12} if suffix else case.tolerance("log_x_theta")
    close(ours[~impossible], golden[~impossible], f"{case}: log_x_theta", **limits)


@for_cases("loss", holding="raw_logits")
def test_float64(case):
    """All in float64, against the float64 tensors, to their tolerance."""
    model = model_of(case)
    ours = our_loss(model, case, torch.float64)
    name = f"{loss_name(case)}_f64"
    rows = case[name].isfinite().all(dim=-1)
    assert rows.any()
    limits = case.tolerance("loss_f64")
    factor = derivative_factor(model.config)
    case.check(name, ours, factor=factor, rows=rows, default=limits)


@for_cases("loss", holding="raw_logits")
def test_float32_beside_the_reference(case):
    """float32 logits against the reference's float32 loss, on the rows for which the
    case states a tolerance and the reference itself keeps to it."""
    model = model_of(case)
    ours = our_loss(model, case, torch.float32)
    name = loss_name(case)
    limits = case.tolerance("loss")
    sound = relative_error(case[name], case[f"{name}_f64"]) <= limits["rtol"]
    rows = stated_rows(case) & sound  # NaN is not sound
    assert rows.any()
    factor = derivative_factor(model.config)
    case.check(name, ours, factor=factor, rows=rows, default=limits)


@for_cases("loss", holding="raw_logits")
def test_float32_is_exact_at_both_ends(case):
    """Our loss from float32 logits is finite on every row and keeps its tolerance
    against float64; where the reference's float32 loses digits ours loses a tenth of
    them at most. The reference's error is the one that the case records."""
    model = model_of(case)
    ours = our_loss(model, case, torch.float32)
    assert ours.isfinite().all()
    name = loss_name(case)
    truth = case[f"{name}_f64"] * derivative_factor(model.config)
    rows = truth.isfinite().all(dim=-1)
    close(ours[rows], truth[rows], f"{case}: float64", **case.tolerance("loss"))
    theirs = relative_error(case[name], case[f"{name}_f64"])
    if name == "loss":
        recorded = torch.tensor(case.values["max_rel_err_float32_vs_float64_per_row"])
        close(theirs, recorded, f"{case}: the reference's error", rtol=1e-2, atol=1e-7)
        lost = (~case[name].isfinite().all(dim=-1)).nonzero().flatten().tolist()
        assert lost == case.values["rows_with_nonfinite_float32"]
    inexact = rows & (theirs > 5e-5)
    error = relative_error(ours, truth)
    assert (error[inexact] <= theirs[inexact] / 10).all(), (error, theirs)


@for_cases("loss", holding="loss_alpha_s_corrected")
def test_d3pm_first_time(case):
    """At s = t - 1/T <= 0 the last logarithm is 0/0 and the recorded row NaN; ours is
    the limit: no second term, T dt / t (log(alpha_t q / t + 1) - log p(x0))."""
    model = model_of(case)
    ours = our_loss(model, case, torch.float64)
    alpha_t = levels(model, case)[0].squeeze(-1)
    t = 1 - alpha_t
    first = t - 1 / model.T <= 0
    lost = ~case["loss_alpha_s_corrected_f64"].isfinite().all(dim=-1)
    assert torch.equal(first, lost)
    for row in first.nonzero().flatten().tolist():
        log_p = case["log_x_theta_f64"][row]  # (L, K)
        q = log_p[:, model.mask_index].exp()
        log_p_x0 = log_p.gather(-1, case["x0"][row][:, None]).squeeze(-1)
        limit = torch.log(alpha_t[row] * q / t[row] + 1) - log_p_x0
        limit = limit / t[row] * (case["xt"][row] == model.mask_index)
        close(ours[row], limit, f"{case}: row {row}", rtol=1e-12)


@for_cases("loss", holding="loss_alpha_s_corrected")
def test_d3pm_does_not_repeat_the_slip(case):
    """Ours is a Kullback-Leibler divergence, never negative, and not the recorded
    `loss` with alpha_s = s (which at s = 1/2 happens to be the same)."""
    model = model_of(case)
    ours, wrong = our_loss(model, case, torch.float64), case["loss_f64"]
    assert (ours >= 0).all()
    masked = case["xt"] == case.values["mask_index"]
    s = case["t_discretised_f64"][:, None] - 1 / model.T
    apart = masked & (s > 0) & ((s - 0.5).abs() > 0.05)
    assert apart.any()
    assert not torch.isclose(ours[apart], wrong[apart], rtol=1e-3).any()
    assert torch.equal(ours[~masked], wrong[~masked])  # zeros
    theirs = relative_error(case["loss"], wrong)
    recorded = torch.tensor(case.values["max_rel_err_float32_vs_float64_per_row"])
    close(theirs, recorded, f"{case}: the reference's error", rtol=1e-2, atol=1e-7)
