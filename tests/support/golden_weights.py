"""Compares the weights of sparse soft inputs, however a processor rounds."""

import itertools

import pytest
import torch
from golden_cases import Case
from torch.special import ndtri

from diffusion import gaussian
from diffusion.gaussian import Levels, PublishedTopLatents


def check_weights(
    case: Case, name: str, limits: dict[str, float], given: tuple, unit: float
) -> None:
    """To the stated tolerance, and what the last digit of their making leaves open.

    The published form rounds U to float64, and U is close to 1, so that a unit in its
    last place is many in the weights; levels of float32 are divided by a temperature.
    Each kind of processor rounds functions in its own way. So twice the change by one
    unit in the last place of each is allowed for.

    Args:
        case: Of the recorded weights.
        name: Theirs.
        limits: rtol that the case states.
        given: Arguments of `PublishedTopLatents.of`.
        unit: Relative one of the levels.
    """
    draws, x0, levels, *others = given
    golden, ours = case[name], PublishedTopLatents.of(*given).weights
    change = torch.zeros_like(golden)
    alternating = (-1.0) ** torch.arange(golden.shape[-1])
    for a, s, u in itertools.product((-1, 1), (-1, 1), (-1, 1, alternating)):
        gauss_alpha = levels.gauss_alpha * (1 + a * unit)
        gauss_sigma = levels.gauss_sigma * (1 + s * unit)
        moved = Levels(gauss_alpha, gauss_sigma, levels.tau)
        last_place = u * torch.finfo(torch.float64).eps / 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gaussian, "ndtri", lambda U, d=last_place: ndtri(U + d))
            weights = PublishedTopLatents.of(draws, x0, moved, *others).weights
        change = torch.maximum(change, (weights - ours).abs())
    excess = (ours - golden).abs() - limits["rtol"] * golden - 2 * change
    assert (excess <= 0).all(), f"{case}: {name}, by up to {excess.max()}"
