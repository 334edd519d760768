"""Samplers: prior -> step -> sample. A model supplies probabilities, a sampler draws.

What a sampler asks of a diffusion model: `prior_sample`, `noise`, `predict_x0`,
`posterior`, and for `Analytic` `log_score`. All draws take a generator, so a seed
replays a sample.

Shapes: B batch, L length, K vocabulary. Times and signal levels are (B, 1).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from utils import choose, wide_dtype

TIME_EPS = 1e-5  # last time of the grid; noise removal goes from there to 0


def sample_categorical(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws from the last axis; rows need not be normalised, (..., K) -> (...).

    argmax p / E with E ~ Exp(1). In float32 the noise E is cut off at 2^-24, which
    makes rare tokens rarer; hence float64 by default (`sampling.use_float64`).
    """
    u = torch.rand(
        probs.shape, dtype=probs.dtype, device=probs.device, generator=generator
    )
    return (probs / (1e-10 - (u + 1e-10).log())).argmax(dim=-1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of tokens with mass above top_p, renormalised, (..., K).

    The most likely token always stays.
    """
    if top_p >= 1.0:
        return probs
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    mass_before = sorted_probs.cumsum(dim=-1) - sorted_probs
    kept_sorted = (mass_before <= top_p).index_fill(
        -1, torch.zeros(1, dtype=torch.long, device=probs.device), True
    )
    kept = torch.zeros_like(kept_sorted).scatter(-1, order, kept_sorted)
    probs = torch.where(kept, probs, 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)


class Sampler:
    """Skeleton of every sampler: a grid of times from 1 down, one `step` per pair.

    Args:
        config: `config.sampling`.
    """

    def __init__(self, config: DictConfig) -> None:
        self.num_steps: int = config.steps
        self.p_nucleus: float = config.p_nucleus
        self.use_float64: bool = config.use_float64
        self.noise_removal: str = config.noise_removal

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        """Whether models of this class offer what the sampler asks for."""
        return not algorithm.is_autoregressive

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        num_samples: int,
        *,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Draws samples.

        Args:
            model: A diffusion model on its device, in evaluation mode.
            num_samples: B.
            num_steps: Steps from t = 1 to t = 1e-5; None takes `sampling.steps`.
            generator: On the model's device; None uses torch's global one.
            show_progress: Whether to show a bar over the steps.

        Returns:
            Token ids, (B, L).
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        xt = model.with_bos(model.prior_sample(num_samples, generator))
        times = self.time_grid(num_steps).to(model.device, wide_dtype(model.device))
        levels = [model.noise(t.expand(num_samples, 1)).alpha_t for t in times]
        steps = tqdm(pairwise(levels), "sampling", num_steps, disable=not show_progress)
        for alpha_t, alpha_s in steps:
            xt = model.with_bos(self.step(model, xt, alpha_t, alpha_s, generator))
        finish = choose(self.removals(), self.noise_removal, "sampling.noise_removal")
        return model.with_bos(finish(model, xt, levels[-1], generator))

    def time_grid(self, num_steps: int) -> Tensor:
        """Decreasing times, (num_steps + 1,) float64."""
        return torch.linspace(1, TIME_EPS, num_steps + 1, dtype=torch.float64)

    def step(
        self,
        model: Any,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Draws x_s given x_t, (B, L) -> (B, L)."""
        raise NotImplementedError

    def removals(self) -> dict[str, Callable[..., Tensor]]:
        """The ways to get from the last time of the grid to clean tokens."""
        return {
            "ancestral": self.remove_by_draw,
            "greedy": self.remove_greedily,
            "none": lambda model, xt, alpha_t, generator: xt,
        }

    def remove_by_draw(
        self,
        model: Any,
        xt: Tensor,
        alpha_t: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """One more step, to alpha_s = 1."""
        return self.step(model, xt, alpha_t, torch.ones_like(alpha_t), generator)

    def remove_greedily(
        self,
        model: Any,
        xt: Tensor,
        alpha_t: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The denoiser's most likely tokens: the greedy tail of DUO."""
        return model.most_likely_x0(self.predict_x0(model, xt, alpha_t), xt)

    def predict_x0(self, model: Any, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """Probabilities of clean tokens, nucleus applied, (B, L, K)."""
        log_x_theta = model.predict_x0(xt, alpha_t)
        return nucleus(self.widen(log_x_theta).exp(), self.p_nucleus)

    def widen(self, log_probs: Tensor) -> Tensor:
        """float64 where asked for and where the device has it, else float32."""
        return log_probs.to(self.draw_dtype(log_probs.device))

    def draw_dtype(self, device: torch.device) -> torch.dtype:
        """Type of the probabilities and of the noise of categorical draws."""
        return wide_dtype(device) if self.use_float64 else torch.float32


class Ancestral(Sampler):
    """Draws x_s from q(x_s | x_t, x_theta).

    Reference: D3PM (arXiv:2107.03006), section 3; MDLM (arXiv:2406.07524) for
    absorbing and UDLM (arXiv:2412.10193) for uniform states.
    """

    def step(
        self,
        model: Any,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        x_theta = self.predict_x0(model, xt, alpha_t)
        q_xs = model.posterior(x_theta, xt=xt, alpha_t=alpha_t, alpha_s=alpha_s)
        return sample_categorical(q_xs.to(x_theta.dtype), generator)


class Analytic(Sampler):
    """Tweedie tau-leaping from scores s(y) = p_t(y) / p_t(x_t), absorbing state.

        p(x_s = y) ~ staggered(y) * transition(y),  d = sigma_t - sigma_s
        staggered(y)  = e^d s(y) + [y = m] (1 - e^d) sum_z s(z)
        transition(y) = e^-d [y = x_t] + (1 - e^-d) [x_t = m]

    Reference: SEDD (arXiv:2310.16834), analytic sampling.
    """

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        return super().fits(algorithm) and algorithm.has_score

    def step(
        self,
        model: Any,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        probs = self.reverse_probs(model, xt, alpha_t, alpha_s)
        return sample_categorical(probs, generator)

    def reverse_probs(
        self, model: Any, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor
    ) -> Tensor:
        """Unnormalised p(x_s | x_t), (B, L, K)."""
        score = self.widen(model.log_score(xt, alpha_t)).exp()
        score = self._nucleus_of_tokens(score, model.mask_index)
        exp_d = (alpha_s / alpha_t).to(score.dtype)[..., None]  # (B, 1, 1)
        is_mask = torch.arange(score.shape[-1], device=xt.device) == model.mask_index
        total = score.sum(dim=-1, keepdim=True)
        staggered = exp_d * score + is_mask * (1 - exp_d) * total
        stays = torch.nn.functional.one_hot(xt, score.shape[-1])
        masked = (xt == model.mask_index)[..., None]
        probs = staggered * (stays / exp_d + (1 - 1 / exp_d) * masked)
        return probs.clamp(min=0)

    def _nucleus_of_tokens(self, score: Tensor, mask_index: int) -> Tensor:
        """Nucleus over the tokens to reveal; their total score is kept."""
        if self.p_nucleus >= 1.0:
            return score
        is_mask = torch.arange(score.shape[-1], device=score.device) == mask_index
        tokens = score.masked_fill(is_mask, 0)
        total = tokens.sum(dim=-1, keepdim=True)
        kept = nucleus(tokens / total, self.p_nucleus) * total
        return torch.where(is_mask, score, kept)

    def remove_by_draw(
        self,
        model: Any,
        xt: Tensor,
        alpha_t: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """To sigma = 0, where no mask is left."""
        probs = self.reverse_probs(model, xt, alpha_t, torch.ones_like(alpha_t))
        probs[..., model.mask_index] = 0
        return sample_categorical(probs, generator)


class AutoRegressive(Sampler):
    """Token by token from bos; `sampling.steps` and noise removal do not apply."""

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        return algorithm.is_autoregressive

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        num_samples: int,
        *,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        show_progress: bool = False,
    ) -> Tensor:
        """Draws samples, (B, L); `num_steps` is not used."""
        x = model.prior_sample(num_samples, generator)  # (B, 1): bos
        length = range(model.num_tokens - 1)
        for _ in tqdm(length, "sampling", disable=not show_progress):
            log_probs = model.next_token(x)  # (B, K)
            probs = nucleus(self.widen(log_probs).exp(), self.p_nucleus)
            x = torch.cat([x, sample_categorical(probs, generator)[:, None]], dim=1)
        return x


# By `sampling.predictor`; of several classes under a name, the one that fits counts.
SAMPLERS: dict[str, tuple[type[Sampler], ...]] = {
    "ancestral": (Ancestral, AutoRegressive),
    "analytic": (Analytic,),
}


def sampler_class(predictor: str, algorithm: type) -> type[Sampler]:
    """The sampler that `sampling.predictor` means for an algorithm.

    Raises:
        ConfigError: If there is none; the choices are those that fit.
    """
    fitting = {
        name: sampler
        for name, samplers in SAMPLERS.items()
        for sampler in samplers
        if sampler.fits(algorithm)
    }
    return choose(fitting, predictor, "sampling.predictor", algorithm.__name__)
