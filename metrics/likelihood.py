"""Corpus likelihood with standard errors (val/nll, val/bpd, val/ppl), and the unigram
baseline.

Units: nats per token unless a name says bits.
"""

import math

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from models.device import wide_dtype


class Likelihood(torchmetrics.Metric):
    """Corpus negative log-likelihood per token, with its standard error.

        nll = sum_i x_i / sum_i n_i,   bpd = nll / log 2,   ppl = exp(nll)

    for sequences i with summed loss x_i (nats) and n_i valid tokens. The standard
    error is that of a ratio estimator over independent sequences (delta method):

        se^2 = N / (N - 1) * sum_i (x_i - nll n_i)^2 / (sum_i n_i)^2

    It covers the choice of sequences and the draw of one time per sequence. Times
    are spread evenly over the sequences, so for diffusion models it errs on the safe
    side.
    """

    full_state_update = False
    nll_sum: Tensor  # sum_i x_i
    token_sum: Tensor  # sum_i n_i
    nll_sq: Tensor  # sum_i x_i^2
    nll_token: Tensor  # sum_i x_i n_i
    token_sq: Tensor  # sum_i n_i^2
    count: Tensor  # N
    _STATES = ("nll_sum", "token_sum", "nll_sq", "nll_token", "token_sq", "count")

    def __init__(self) -> None:
        super().__init__()
        for name in self._STATES:
            zero = torch.zeros((), dtype=wide_dtype())
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(self, nlls: Tensor, num_tokens: Tensor) -> None:
        """Adds sequences.

        Args:
            nlls: Loss of each sequence summed over its valid tokens, nats, (N,).
            num_tokens: Valid tokens of each sequence, (N,).
        """
        x, n = nlls.detach().to(self.nll_sum), num_tokens.to(self.nll_sum)
        self.nll_sum += x.sum()
        self.token_sum += n.sum()
        self.nll_sq += (x * x).sum()
        self.nll_token += (x * n).sum()
        self.token_sq += (n * n).sum()
        self.count += x.numel()

    def sums(self) -> Tensor:
        """What this rank has added up since the last reset, (6,)."""
        return torch.stack([getattr(self, name) for name in self._STATES])

    def set_sums(self, of_ranks: Tensor, rank: int, world_size: int) -> None:
        """Takes up what all ranks had added up.

        Args:
            of_ranks: `sums` of each, (W, 6).
            rank, world_size: Of this process; with another W than then the first rank
                takes all.
        """
        if len(of_ranks) == world_size:
            sums = of_ranks[rank]
        else:
            sums = of_ranks.sum(dim=0) * (rank == 0)
        for name, value in zip(self._STATES, sums, strict=True):
            setattr(self, name, value.to(self.nll_sum))

    def compute(self) -> dict[str, Tensor]:
        """nll, bpd, ppl and the standard error of each (NaN below two sequences), and
        over how many rows (sequences) and tokens."""
        nll = self.nll_sum / self.token_sum
        residual = self.nll_sq - 2 * nll * self.nll_token + nll**2 * self.token_sq
        variance = self.count / (self.count - 1) * residual.clamp(min=0)
        stderr = variance.sqrt() / self.token_sum
        ppl = nll.exp()
        return {
            "nll": nll,
            "bpd": nll / math.log(2),
            "ppl": ppl,
            "nll_stderr": stderr,
            "bpd_stderr": stderr / math.log(2),
            "ppl_stderr": ppl * stderr,
            "rows": self.count,
            "tokens": self.token_sum,
        }


def unigram_nll(train: np.ndarray, valid: np.ndarray) -> float:
    """Nats per token of a unigram model with add-one smoothing.

    The floor that any language model must beat clearly.

    Args:
        train, valid: How often each token occurs, (K,).
    """
    counts = train + 1.0
    log_p = np.log(counts / counts.sum())
    return float(-np.dot(valid, log_p) / valid.sum())
