"""What a sampler asks of a model. A model's class has the members, no base class.

Shapes: B batch, L length, K vocabulary, D hidden size. Signal levels broadcast with the
ids beside them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from models.noise import Noise
from sampling.prompts import Given


class Algorithm(Protocol):
    """What a sampler asks of a model's class, before there is a model."""

    is_autoregressive: bool
    is_one_step: bool
    has_mask: bool
    has_score: bool
    has_leave_one_out: bool


class Model(Protocol):
    """What every sampler asks for, from left to right or by diffusion."""

    num_tokens: int  # L
    vocab_size: int  # K
    num_classes: int | None  # of labels; None: the model takes none

    @property
    def device(self) -> torch.device: ...

    def with_bos(self, given: Given) -> Given:
        """What is given, together with the bos that the model begins with, if any."""

    def prior_sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Ids from which sampling starts, (B, L)."""

    def logits_for_loss(self, hidden: Tensor) -> Tensor:
        """The head, (..., D) -> (..., K)."""


class LeftToRight(Model, Protocol):
    """An autoregressive model."""

    def hidden(self, x: Tensor, cache: Any = None) -> Tensor:
        """Hidden states of ids x that follow those of the cache, (B, l, D)."""

    def process_logits(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the next token, (..., K)."""


class Generator(Protocol):
    """A diffusion model of which one pass makes a sample, beside what it denoises."""

    mask_index: int

    def initial_tokens(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """What samples start from, (B, L)."""

    def perturbed(self, ids: Tensor, generator: torch.Generator | None) -> Any:
        """Initial tokens (B, L) as the network takes them, with noise."""

    def generator_hidden(self, x_init: Any) -> Tensor:
        """Hidden states at such an input, (B, L, D)."""

    def generated_logits(self, logits: Tensor) -> Tensor:
        """Those of tokens that are made, from the head's, (..., K)."""

    def refining(self) -> AbstractContextManager[None]:
        """Within it, the model denoises with the network that refines samples."""


class Denoiser(Model, Protocol):
    """A diffusion model; `diffusion.base.Diffusion` says what each method returns."""

    mask_index: int  # of absorbing states
    time_conditioning: bool
    draws_whole_rows: bool
    noise: Noise

    def sigma(self, alpha_t: Tensor) -> Tensor:
        """Total noise, (B, 1) -> (B, 1)."""

    def hidden(self, xt: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Hidden states, (B, L), (B, 1) and (B,) -> (B, L, D)."""

    def denoised(self, logits: Tensor, *, xt: Tensor, sigma: Tensor) -> Tensor:
        """Log-probabilities of clean tokens, (..., K)."""

    def log_score(self, logits: Tensor, *, alpha_t: Tensor, sigma: Tensor) -> Tensor:
        """Of models with `has_score`: log p_t(y) / p_t(mask), (..., K)."""

    def undecided(self, xt: Tensor) -> Tensor:
        """Tokens that the reverse process may still change, bool like xt."""

    def noise_tokens(
        self, shape: tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor:
        """Ids drawn from the prior, of this shape."""

    def posterior(
        self, x_theta: Tensor, *, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
    ) -> Tensor:
        """q(x_s | x_t, x_theta), (..., K)."""

    def marginal(self, x0_probs: Tensor, alpha_s: Tensor) -> Tensor:
        """q(x_s) for x_0 ~ x0_probs, (..., K)."""

    def change_bound(self, xt: Tensor, *, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """Probability with which `changed` is to be asked, like xt."""

    def changed(
        self,
        x_theta: Tensor,
        *,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        draw: Callable[..., Tensor],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draws x_s for tokens that `change_bound` let through, (n, K) -> (n,)."""


class BlockDenoiser(Denoiser, Protocol):
    """A diffusion model of which a block sees clean ones before it."""

    @property
    def eos_index(self) -> int:
        """The id that ends a text."""

    def clean_sigma(self, batch_size: int) -> Tensor:
        """Total noise with which clean blocks are seen, (B, 1)."""

    def hidden(
        self,
        xt: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Hidden states of ids (B, l) behind those of the cache, (B, l, D)."""

    def hidden_of(
        self,
        x: Tensor,
        x0: Tensor,
        sigma: Tensor,
        block_size: int,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of noisy blocks x, each given the clean ones of x0 before it,
        (B, L, D), without a cache."""
