"""Sparse soft inputs of DUO's curriculum: the largest of K latents and their weights.

A known error of the reference: x_t is x_0 wherever x_0 is among the kept entries; ours
repeats that under `algo.compat=reference` only.
"""

import pytest
import torch
from golden_cases import EXACT, Case, close, for_cases
from golden_weights import check_weights
from torch import Tensor

from diffusion.gaussian import TOP_LATENTS, Levels, TopDraws, rounded_top_normals


def sparse(case: Case, index: int, setting: dict, compat: str):
    """TopLatents of a recorded setting, and what it was made of."""

    def get(name: str) -> Tensor:
        return case[f"{index}/{name}"]

    alpha, sigma = (get(name).double()[:, None] for name in ("alpha", "sigma"))
    tau = torch.full_like(alpha, 1 / setting["inverse_temperature"])
    levels = Levels(alpha, sigma, tau)
    u, slots = get("u"), get("random_ints")
    order = torch.arange(u.shape[-1]).expand(u.shape)
    draws = TopDraws(u, get("eps_extra").double(), slots, order)
    given = draws, get("x0"), levels, setting["vocab_size"]
    return TOP_LATENTS[compat].of(*given), given


@for_cases("duo_topk", holding="settings")
def test_sparse_input_as_published(case):
    """Weights, ids and x_t, and the values of which they are made."""
    for i, setting in enumerate(case.values["settings"]):
        soft, given = sparse(case, i, setting, "reference")
        draws, _, levels, *_ = given
        assert soft.ids.shape[-1] == setting["k"]
        limits = case.tolerance(f"{i}/weights")
        check_weights(case, f"{i}/weights", limits, given, unit=0)
        for name, ours in {"indices": soft.ids, "xt": soft.xt}.items():
            case.check(f"{i}/{name}", ours)
        own = levels.gauss_alpha + levels.gauss_sigma * draws.eps
        z = rounded_top_normals(draws.u, setting["vocab_size"] - 1)
        values = levels.gauss_sigma[..., None] * z
        is_kept = own > values[..., -1]
        values[..., -1] = torch.maximum(own, values[..., -1])
        case.check(f"{i}/extra_value", own, default=limits)
        case.check(f"{i}/extra_in_topk", is_kept, default=EXACT)
        case.check(f"{i}/topk_values", values, default=limits)


@for_cases("duo_topk", holding="settings")
def test_sparse_input_of_the_paper(case):
    """With the same draws: x_t is x_0 where its value is the largest, and only there.

    The reference takes x_0 in more places; without such a place the cases could not
    tell the two.
    """
    num_more = 0
    for i, setting in enumerate(case.values["settings"]):
        soft, _ = sparse(case, i, setting, "paper")
        x0, golden = case[f"{i}/x0"], case[f"{i}/indices"]
        is_first = case[f"{i}/extra_value"] > case[f"{i}/topk_values"][..., 0]
        assert torch.equal(soft.xt == x0, is_first)
        assert torch.equal(soft.xt, torch.where(is_first, x0, golden[..., 0]))
        is_kept = case[f"{i}/extra_in_topk"]
        assert torch.equal(soft.ids, golden)  # the draws hold the order as published
        ours, golden = soft.weights[~is_kept], case[f"{i}/weights"][~is_kept]
        close(ours, golden, f"{case}: {i}/weights", rtol=1e-7)  # U without rounding
        assert (soft.weights.sum(dim=-1) <= 1 + 1e-12).all()
        num_more += int((is_kept & ~is_first).sum())
    if num_more == 0:
        pytest.skip(f"{case}: no x_0 that is kept without being the largest")
