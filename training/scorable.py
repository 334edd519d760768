"""What downstream tasks ask of a model: likelihoods of some tokens given others."""

from typing import NamedTuple

import torch
from torch import Tensor


class Stratum(NamedTuple):
    """One of `count` draws of a row's bound: where its time lies, and its seed."""

    seed: int
    index: int = 0  # the time is in the part index / count .. (index + 1) / count
    count: int = 1

    def generator(self) -> torch.Generator:
        """On the host, new."""
        return torch.Generator().manual_seed(self.seed)


def regret(log_p: Tensor, x0: Tensor) -> Tensor:
    """max_y log p(y) - log p(x_0), (..., K) and (...) -> (...)."""
    return log_p.amax(dim=-1) - log_p.gather(-1, x0[..., None]).squeeze(-1)
