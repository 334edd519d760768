"""How many tokens of a sample are masked, and which: exact counts at drawn ratios.

Reference: Di[M]O (arXiv:2503.15457), pseudo-intermediate states.

Shapes: B batch, L length.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAGE = (0.55, 0.25, 0.5, 1.0)  # mean and deviation of the normal, and where it is cut


def _truncated_normal(u: Tensor) -> Tensor:
    """Inverse distribution function of the normal law of `MAGE`."""
    mean, deviation, low, high = MAGE
    ends = [(x - mean) / deviation for x in (low, high)]
    start, stop = (math.erfc(-x / math.sqrt(2)) / 2 for x in ends)
    z = torch.special.ndtri(start + u * (stop - start))
    return (mean + deviation * z).clamp(low, high)


# By name: from u ~ U(0, 1) to the share of masked tokens.
RATIO_LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "square": lambda u: u.square(),
    "cosine": lambda u: torch.cos(math.pi / 2 * u),
    "arccos": lambda u: torch.arccos(u) * (2 / math.pi),
    "mage": _truncated_normal,
}


def masked_count(length: int, ratio: Tensor | float) -> Tensor:
    """max(1, round(L ratio)), half to even, like the ratio.

    A number is multiplied in float64 and rounded in float32, as published.
    """
    if isinstance(ratio, float | int):
        share = torch.tensor(length * ratio, dtype=torch.float32)
    else:
        share = length * ratio
    return share.round().clamp(1, length).long()


def masked_positions(u: Tensor, count: Tensor, first: int = 0) -> Tensor:
    """Exactly `count` positions of each row, uniformly, (B, L) bool.

    Args:
        u: U(0, 1), (B, L).
        count: Of each row, (B, 1), or of all, ().
        first: Positions before this one are left out.
    """
    # A permutation whose inverse has the same law.
    return F.pad(u[:, first:].argsort(dim=-1) < count, (first, 0))
