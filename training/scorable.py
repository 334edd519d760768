"""What downstream tasks ask of a model: likelihoods of some tokens given others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stratum:
    """One of `count` draws of a row's bound: where its time lies, and its seed."""

    seed: int
    index: int = 0  # the time is in the part index / count .. (index + 1) / count
    count: int = 1

    def generator(self) -> torch.Generator:
        """On the host, new."""
        return torch.Generator().manual_seed(self.seed)


class Scorable:
    """A model of which parts of a text can be scored, given the others."""

    def nll_given(self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]) -> Tensor:
        """-log p of unknown tokens given the known ones of their row, nats, (B, L).

        Exact, or one draw of an upper bound, whose sum over a row is what counts; 0 at
        known tokens. A row's numbers do not depend on the other rows.

        Args:
            x0: Clean ids, (B, L), of any L up to `model.length`.
            known: (B, L) bool, on the host; the first token of each row is.
            strata: Draw of each row; an exact likelihood needs none.
        """
        raise NotImplementedError

    def regret_given(
        self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]
    ) -> Tensor:
        """max_y log p(y) - log p(x_0) of unknown tokens, nats, (B, L).

        0 where the token is the model's first choice, and at known tokens. AR: given
        all tokens to the left of it. Diffusion: at t = 1, where the known tokens are
        clean and all others noise, in one evaluation of the network.

        Args:
            x0, known: As for `nll_given`.
            strata: For the noise of each row.
        """
        raise NotImplementedError


def regret(log_p: Tensor, x0: Tensor) -> Tensor:
    """max_y log p(y) - log p(x_0), (..., K) and (...) -> (...)."""
    return log_p.amax(dim=-1) - log_p.gather(-1, x0[..., None]).squeeze(-1)
