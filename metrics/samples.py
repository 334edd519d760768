"""Numbers of samples that need no judge: entropy, distinct n-grams, means.

Units: nats unless a name says bits.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.device import wide_dtype


def sample_entropy(x: Tensor | Sequence[Tensor]) -> Tensor:
    """Entropy of each sample's own token histogram, (N, L) -> (N,), nats.

    Low values betray repetitive samples, which a judge model scores too well.

    Args:
        x: Ids, (N, L); or of samples that have ended, N of (l,).
    """
    entropies = []
    for sample in x:
        _, counts = sample.unique(return_counts=True)
        p = counts.to(wide_dtype(sample.device)) / len(sample)
        entropies.append(-(p * p.log()).sum())
    return torch.stack(entropies)


def distinct_n(x: Tensor | Sequence[Tensor], n: int) -> Tensor:
    """Share of different n-grams among a sample's n-grams, (N, L) -> (N,).

    1 without any repetition, as where there is no n-gram. Within each sample, so that
    it does not depend on how many samples there are. x as for `sample_entropy`.

    Reference: Li et al., diversity-promoting objective (arXiv:1510.03055), distinct-n.
    """
    shares = [
        len(sample.unfold(0, n, 1).unique(dim=0)) / (len(sample) - n + 1)
        if len(sample) >= n
        else 1.0
        for sample in x
    ]
    return torch.tensor(shares, dtype=torch.float64)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; the latter None below two values."""
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return float(x.mean()), error
