"""Whether numbers are finite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.shards import local


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or an infinite value; waits once for them.

    Of one that is split over processes this one looks at its own part.
    """
    floats = {k: local(x) for k, x in tensors.items() if x.is_floating_point()}
    if not floats:
        return []
    are_finite = torch.stack([x.detach().isfinite().all() for x in floats.values()])
    pairs = zip(floats, are_finite.tolist(), strict=True)
    return [name for name, is_finite in pairs if not is_finite]


def summary(tensors: Mapping[str, Tensor]) -> str | None:
    """'3 of 24 hold NaN or infinite values, the first of them NAME'; None: all are
    finite."""
    names = not_finite(tensors)
    if not names:
        return None
    return (
        f"{len(names)} of {len(tensors)} hold NaN or infinite values, the first of "
        f"them {names[0]}"
    )
