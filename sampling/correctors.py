"""Correctors: what redraws tokens at one noise level, between the steps of a sampler.

Shapes: B batch, L length, K vocabulary, n tokens of a chunk. Signal levels are (B, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.noise import Noise
from sampling.reverse_process import Chain, Tokens
from utils import ConfigError, choose

if TYPE_CHECKING:
    from sampling.sampler import Sampler

# From the model's probabilities (n, K) and x_t (n,) to how sure it is of x_t's tokens.
Certainty = Callable[[Tensor, Tensor], Tensor]


class Corrector(Protocol):
    """What a sampler asks of a corrector."""

    keys: ClassVar[dict[str, Any]]  # of `sampling`: their values without the corrector

    def __init__(self, config: DictConfig) -> None: ...

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        """Refuses settings of `config.sampling` that make no sense."""

    def is_due(self, noise: Noise, alpha: Tensor) -> bool:
        """Whether it acts at a signal level, a number on the host."""

    def __call__(
        self, sampler: Sampler, chain: Chain, xt: Tensor, alpha_t: Tensor
    ) -> Tensor:
        """x_t with some of its free tokens drawn anew at its level, (B, L)."""


def log_margin(p: Tensor, xt: Tensor) -> Tensor:
    """log of the most likely token's probability over the next one's, (n,)."""
    first, second = p.topk(2, dim=-1).values.log().unbind(dim=-1)
    return first - second


# By `sampling.corrector_select`: where it is lowest, tokens are drawn anew.
CERTAINTIES: dict[str, Certainty | None] = {
    "random": None,
    "lowest_max": lambda p, xt: p.amax(dim=-1).log(),
    "lowest_current": lambda p, xt: p.gather(-1, xt[:, None]).squeeze(-1).log(),
    "lowest_margin": log_margin,
}


class Gibbs:
    """Redraws tokens of a uniform-state x_t from their law given all the others.

        p(x_t^i = v | x_t without i) = alpha_t LOO_i(v) + (1 - alpha_t) / K

    with LOO, the leave-one-out denoiser, being what the network has learnt. A sweep
    redraws `corrector_parallel` positions at once. One position chosen at random leaves
    the law of x_t as it is; several at once are faster and do so only in the limit of
    tokens that do not depend on each other.

    Other choices of `corrector_select` take the positions the network is least sure
    of, and leave the law: they lower the entropy of samples. Positions are then
    drawn without replacement with weights exp(-certainty / `corrector_temperature`),
    the certainty being a log-probability; at temperature 0 the lowest ones are taken.

    A sweep is one evaluation of the network for a sequence, and none where all of its
    positions turn out as noise. Of random positions the head sees these alone.

    Args:
        config: `config.sampling`.

    Reference: arXiv:2605.22765, the Gibbs corrector.
    """

    keys: ClassVar[dict[str, Any]] = {
        "corrector_steps": 1,
        "corrector_parallel": 1,
        "corrector_select": "random",
        "corrector_temperature": 1,
        "corrector_t_min": 0,
        "corrector_t_max": 1,
    }

    def __init__(self, config: DictConfig) -> None:
        self.validate_config(config)
        self.num_sweeps: int = config.corrector_steps
        self.parallel: int = config.corrector_parallel
        self.certainty = CERTAINTIES[config.corrector_select]
        self.temperature: float = config.corrector_temperature
        self.t_min: float = config.corrector_t_min
        self.t_max: float = config.corrector_t_max

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        select = config.corrector_select
        certainty = choose(CERTAINTIES, select, "sampling.corrector_select")
        if certainty is None and config.corrector_temperature != 1:
            raise ConfigError(
                f"sampling.corrector_temperature={config.corrector_temperature} has no "
                f"effect with sampling.corrector_select={select}; the only value is 1."
            )
        if config.corrector_t_min > config.corrector_t_max:
            raise ConfigError(
                f"sampling.corrector_t_min={config.corrector_t_min} is above sampling."
                f"corrector_t_max={config.corrector_t_max}: no time is between them."
            )

    def is_due(self, noise: Noise, alpha: Tensor) -> bool:
        slack = 1e-9  # of a time that went through the schedule and back
        t = float(noise.inverse(alpha))
        return self.t_min - slack <= t <= self.t_max + slack

    def __call__(
        self, sampler: Sampler, chain: Chain, xt: Tensor, alpha_t: Tensor
    ) -> Tensor:
        for _ in range(self.num_sweeps):
            xt = self.sweep(sampler, chain, xt, alpha_t)
        return xt

    def sweep(
        self, sampler: Sampler, chain: Chain, xt: Tensor, alpha_t: Tensor
    ) -> Tensor:
        """Redraws `corrector_parallel` positions of each sequence at once."""
        if self.certainty is not None:
            return self._ranked(sampler, chain, xt, alpha_t, self.certainty)
        chosen = self._lowest(chain.uniform(xt.shape), chain.free)
        if sampler.is_dense(chain):
            return chain.replace(
                xt, alpha_t, chosen, lambda tokens: self._drawn(sampler, chain, tokens)
            )
        model = chain.model
        is_noise = chosen & (chain.uniform(xt.shape) >= alpha_t)

        def denoised(tokens: Tokens) -> Tensor:
            return sampler.draw(sampler.x_theta(model, tokens), chain.generator)

        new = chain.replace(xt, alpha_t, chosen & ~is_noise, denoised)
        noise = model.noise_tokens(xt.shape, chain.generator)
        return torch.where(is_noise, noise, new)

    def _ranked(
        self,
        sampler: Sampler,
        chain: Chain,
        xt: Tensor,
        alpha_t: Tensor,
        certainty: Certainty,
    ) -> Tensor:
        """All free positions propose a token, and the least certain ones take it."""
        found = torch.zeros_like(xt, dtype=alpha_t.dtype)

        def proposed(tokens: Tokens) -> Tensor:
            sure = certainty(sampler.belief(chain.model, tokens), tokens.xt)
            found[tokens.rows, tokens.columns] = sure.to(found.dtype)
            return self._drawn(sampler, chain, tokens)

        proposal = chain.replace(xt, alpha_t, chain.free, proposed)
        found = found - self.temperature * chain.gumbel(xt.shape)
        return torch.where(self._lowest(found, chain.free), proposal, xt)

    def _drawn(self, sampler: Sampler, chain: Chain, tokens: Tokens) -> Tensor:
        """Draws from the whole law, (n,)."""
        model = chain.model
        x_thetas = sampler.x_thetas(model, tokens)
        laws = [model.marginal(x, tokens.alpha_t).to(x.dtype) for x in x_thetas]
        return sampler.draw(sampler.guided(laws), chain.generator)

    def _lowest(self, values: Tensor, free: Tensor) -> Tensor:
        """The free positions with the lowest values of each sequence, (B, L) bool."""
        count = min(self.parallel, values.shape[1])
        values = values.clamp(max=torch.finfo(values.dtype).max)  # a margin may be inf
        values = values.masked_fill(~free, torch.inf)
        lowest = values.topk(count, dim=-1, largest=False).indices
        return torch.zeros_like(free).scatter(-1, lowest, True) & free
