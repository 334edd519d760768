"""Distillation to one step: initial tokens, mask ratios, the generator's gradient, the
loss of the auxiliary model.

The recorded numbers are of the published code for images, whose teacher has a condition
and whose networks give the mask a probability. What a case calls a formula of its own
is of text (`text_*`, without the mask's column), or a law on a grid: what this project
trains with.
"""

import re

import pytest
import torch
from golden_cases import EXACT, Case, approx, close, for_cases

from distillation.divergences import without_column
from distillation.initial import InitialRatio, Perturbation, Perturbed
from distillation.jeffreys import (
    jeffreys_gradient,
    smoothed_cross_entropy,
    soft_loss,
    surrogate,
)
from distillation.masking import RATIO_LAWS, masked_count, masked_positions
from models.ema import ExponentialMovingAverage

DTYPES = {"f32": torch.float32, "f64": torch.float64}
BETAS = {"FKL": 0.0, "RKL": 1.0}  # the others are Jeffreys_BETA
OWN = "formula"  # in what a case says of its own numbers


def says(case: Case, pattern: str) -> str:
    """What a case says of where numbers come from."""
    return case.info["provenance"][pattern]


# ---------------------------------------------------------------- what is drawn


@for_cases("dimo", holding="runs", where=lambda case: case.holds("embedding"))
def test_initial_tokens_and_embeddings(case):
    """From the recorded draws, of the published code."""
    mask_index = case.values["mask_index"]
    for run in case.values["runs"]:
        front = run["prefix"]
        count = masked_count(run["length"], run["r_init"])
        assert int(count) == run["masked"]
        where = masked_positions(case[f"{front}/u_position"], count)
        assert (where.sum(dim=-1) == run["masked"]).all()
        x_init = case[f"{front}/random_tokens"].masked_fill(where, mask_index)
        case.check(f"{front}/x_init", x_init, default=EXACT)
        level, noise = run["perturbation"], case.tensors.get(f"{front}/noise")
        if noise is None:  # the reference draws none
            assert level == 0
            noise = torch.full((*x_init.shape, case["embedding"].shape[1]), 7.0)
        ours = Perturbed(x_init, noise, level).embed(case["embedding"])
        case.check(f"{front}/embedded", ours)


@for_cases("dimo", holding="masked_count_of_length_and_ratio")
def test_counts_of_masks(case):
    for length, ratio, count in case.values["masked_count_of_length_and_ratio"]:
        assert int(masked_count(length, ratio)) == count, (length, ratio)


@for_cases("dimo", holding="perturbation_schedules")
def test_schedules(case):
    limits = case.tolerance("perturbation_schedules")
    for schedule in case.values["perturbation_schedules"]:
        ours = Perturbation.of(schedule["spec"])
        levels = [ours.level(step) for step in schedule["steps"]]
        assert levels == approx(schedule["values"], limits)
    for schedule in case.values["ratio_schedules"]:
        ratio = InitialRatio.of(schedule["spec"])
        draws = torch.tensor([ratio.draw(None) for _ in range(2000)])
        if "value" in schedule:
            assert draws.tolist() == approx([schedule["value"]] * 2000, {"rtol": 1e-6})
        else:
            assert draws.min() >= ratio.low
            assert draws.max() <= ratio.high
            error = (ratio.high - ratio.low) / (12 * 2000) ** 0.5
            assert abs(draws.mean() - (ratio.low + ratio.high) / 2) < 5 * error


@for_cases("dimo", holding="ema")
def test_rate_of_the_ema(case):
    """n is counted before the update."""
    recorded = case.values["ema"]
    for step, rate in zip(recorded["steps"], recorded["rate"], strict=True):
        weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        ema = ExponentialMovingAverage([weight], recorded["decay"], counts_before=True)
        ema.num_updates = step
        with torch.no_grad():
            weight += 1
        ema.update([weight])
        assert 1 - float(ema.shadow_params[0]) == approx(rate, case.tolerance("rate"))


@for_cases("dimo", holding="u_grid")
def test_laws_of_mask_ratios(case):
    """On a grid: formulas of the case itself, in float64."""
    assert OWN in says(case, "ratio_grid, means, second_moments")
    u, fine = case["u_grid"], (torch.arange(200_000) + 0.5).double() / 200_000
    for name, mean in case.values["means"].items():
        case.check(f"{name}/ratio_grid_f64", RATIO_LAWS[name](u))
        ratio = RATIO_LAWS[name](fine)
        assert float(ratio.mean()) == pytest.approx(mean, abs=1e-6)
        moment = case.values["second_moments"][name]
        assert float(ratio.square().mean()) == pytest.approx(moment, abs=1e-6)


@for_cases("dimo", holding="u_grid")
def test_masked_tokens(case):
    """From recorded draws, of the published code."""
    mask_index, length = case.values["mask_index"], case.values["length"]
    laws = {name.split("/")[0] for name in case.tensors if "/ratio_free" in name}
    assert laws
    for law in laws:
        for clamp, limits in case.values["clamps"].items():
            if f"{law}/ratio_{clamp}" not in case:
                continue
            ratio = RATIO_LAWS[law](case["u"])
            if limits is not None:
                ratio = ratio.clamp(*limits)
            case.check(f"{law}/ratio_{clamp}", ratio)
            count = masked_count(length, ratio)[:, None]
            where = masked_positions(case["u_position"], count)
            case.check(f"{law}/mask_{clamp}", where, default=EXACT)
            masked = case["x"].masked_fill(where, mask_index)
            case.check(f"{law}/x_masked_{clamp}", masked, default=EXACT)


# ---------------------------------------------------------------- the generator


def beta_of(divergence: str) -> float:
    """Of the names that the published code gives divergences."""
    return BETAS.get(divergence) or float(divergence.partition("_")[2] or 0)


def log_p(case: Case, setting: dict, dtype: torch.dtype) -> tuple:
    """Of auxiliary model and teacher, whose guidance is the published code's alone."""
    weight = setting["true_cfg"]
    if setting["adaptive_cfg"]:
        weight = 1 + (weight - 1) * case["ratio"].to(dtype)[:, None, None]
    guided, free = (case[f"z_phi_{name}"].to(dtype) for name in ("cond", "uncond"))
    z_phi = free + weight * (guided - free)
    log_phi = (z_phi / setting["true_temp"]).log_softmax(dim=-1)
    z_psi = case["z_psi"].to(dtype)
    return (z_psi / setting["fake_temp"]).log_softmax(dim=-1), log_phi


def at_masks(g: torch.Tensor, case: Case) -> torch.Tensor:
    return g * case["mask"][..., None]


@for_cases("dimo", holding="z_phi_cond")
def test_gradient_of_the_generator(case):
    """g, the loss and its gradient, as published."""
    for run in case.values["runs"]:
        if not isinstance(run["setting"], int):
            continue  # of text
        dtype = DTYPES[run["dtype"]]
        log_psi, log_phi = log_p(case, case.values["settings"][run["setting"]], dtype)
        beta = beta_of(run["divergence"])
        g = at_masks(jeffreys_gradient(log_psi, log_phi, beta), case)
        name = f"{run['setting']}/{run['divergence']}"
        if f"{name}/g_{run['dtype']}" in case:
            case.check(f"{name}/g_{run['dtype']}", g)
        z = case["z_theta"].to(dtype).clone().requires_grad_()
        entries = len(z) if run["reduction"] == "sum" else z.numel()
        loss = surrogate(z, g).sum() / entries
        loss.backward()
        assert loss.item() == approx(run["loss"], case.tolerance("loss"))
        close(z.grad, g / entries, f"{case}: {name}", rtol=1e-6, atol=1e-12)
        norm = float(z.grad.norm())
        assert norm == approx(run["grad_norm"], case.tolerance("loss"))
        recorded = f"{name}/grad_z_theta_{run['dtype']}"
        if recorded in case and run["reduction"] == "sum":
            case.check(recorded, z.grad)


@for_cases("dimo", holding="z_phi_cond")
def test_gradient_for_text(case):
    """Formulas of the case itself: no guidance, and no column of the mask."""
    assert OWN in says(case, "text_*")
    number = 0
    for run in case.values["runs"]:
        found = re.fullmatch(r"text_(.+)_(.+)", str(run["setting"]))
        if found is None:
            continue
        number += 1
        temperatures = [float(x) for x in found.groups()]
        beta = float(run["divergence"].removeprefix("beta_"))
        z_theta, z_phi, z_psi = (
            without_column(case[z].to(DTYPES[run["dtype"]]), case.values["mask_index"])
            for z in ("z_theta", "z_phi_cond", "z_psi")
        )
        log_phi, log_psi = (
            (z / temperature).log_softmax(dim=-1)
            for z, temperature in zip((z_phi, z_psi), temperatures, strict=True)
        )
        g = at_masks(jeffreys_gradient(log_psi, log_phi, beta), case)
        case.check(f"{run['setting']}/{run['divergence']}/g_{run['dtype']}", g)
        z_theta.requires_grad_()
        loss = surrogate(z_theta, g).sum() / len(g)
        loss.backward()
        limits = case.tolerance("loss")
        assert loss.item() == approx(run["loss"], limits)
        assert z_theta.grad.norm().item() == approx(run["grad_norm"], limits)
        if "dot_loss" in run:  # the form with the same gradient
            product = (z_theta.detach() * g).sum() / len(g)
            assert product.item() == approx(run["dot_loss"], limits)
        if "mean_divergence" in run:
            one, other = (
                (p.exp() * (p - q)).sum(dim=-1)[case["mask"]].mean()
                for p, q in ((log_phi, log_psi), (log_psi, log_phi))
            )
            divergence = (1 - beta) * one + beta * other
            assert divergence.item() == approx(run["mean_divergence"], limits)
    assert number


# ---------------------------------------------------------------- the auxiliary model


@for_cases("dimo", holding="z_psi", where=lambda case: case.holds("x_theta"))
def test_loss_of_the_auxiliary_model(case):
    """As published, where the soft loss is a mean over the classes and where smoothing
    also reaches the mask; and for text, of which the numbers are the case's own."""
    assert OWN in says(case, "text_*")
    mask, x = case["mask"], case["x_theta"][case["mask"]]
    for run in case.values["runs"]:
        is_text = run["prefix"].startswith("text")
        z_psi, z_theta = (
            case[name].to(DTYPES[run["dtype"]]).clone().requires_grad_()
            for name in ("z_psi", "z_theta")
        )
        z, target = z_psi[mask], z_theta[mask]
        if is_text:
            z = without_column(z, case.values["mask_index"])
        smoothing = run["label_smoothing"]
        hard = smoothed_cross_entropy(z.log_softmax(dim=-1), x, smoothing).mean()
        weight, loss = run.get("alpha_fake", 0), hard
        if not is_text:
            soft = soft_loss(z, target, run["temperature_fake"]).mean() / z.shape[-1]
            loss = weight * soft + (1 - weight) * hard
            assert hard.item() == approx(run["loss_hard"], case.tolerance("loss"))
            if run["loss_soft"]:
                assert soft.item() == approx(run["loss_soft"], case.tolerance("loss"))
        assert loss.item() == approx(run["loss"], case.tolerance("loss"))
        loss.backward()
        assert z_theta.grad is None
        case.check(f"{run['prefix']}/grad_{run['dtype']}", z_psi.grad)
