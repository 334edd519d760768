"""DUO's curriculum: for some steps the network's input is soft.

    w_t = gauss_alpha_t onehot(x_0) + gauss_sigma_t eps,  x_t = argmax w_t
    input = sum_y softmax(w_t / tau)(y) embedding(y)

x_t is a uniform-state diffusion with the signal level alpha_t that the operator gives
(`integral/`), so the loss is that of the uniform state.

Reference: DUO (arXiv:2506.10892), the curriculum.
"""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion.gaussian import (
    TOP_LATENTS,
    DenseLatents,
    Levels,
    SoftTokens,
    TopDraws,
    enough,
)
from integral.registry import OPERATORS, Settings, build_operator, check_ends
from integral.transform import gauss_levels
from models.device import widened
from training.row_streams import seeded
from utils import ConfigError, require

NEVER_SOFT = -10.0  # log10 tau where the input is not soft
DEFAULT_TOP_K = 32  # what top_k=-1 means


class Curriculum:
    """Temperature by step, and the noisy input at a time.

    Args:
        config: The run's config.
        vocab_size: K.

    Raises:
        ConfigError: If the mode does not fit vocabulary and range of gamma.
    """

    def __init__(self, config: DictConfig, vocab_size: int) -> None:
        settings = config.algo.curriculum
        self.vocab_size = vocab_size
        self.operator = build_operator(Settings.of(config, vocab_size))
        self.start, self.end = settings.start, settings.end
        self.log10_tau = settings.gumbel_tau_log10_start, settings.gumbel_tau_log10_end
        self.is_dense = settings.mode == "simple"
        self.top_k = DEFAULT_TOP_K if settings.top_k == -1 else settings.top_k
        self.top_latents = TOP_LATENTS[config.algo.compat]

    @staticmethod
    def validate_config(config: DictConfig) -> None:
        """Refuses settings without a meaning."""
        settings = config.algo.curriculum
        check_operator(config)
        if settings.start > settings.end:
            raise ConfigError(
                f"algo.curriculum.start={settings.start} is after "
                f"algo.curriculum.end={settings.end}."
            )
        if settings.mode == "simple" and settings.top_k != -1:
            raise ConfigError(
                f"algo.curriculum.top_k={settings.top_k} has no effect with "
                "algo.curriculum.mode=simple; choose -1, or mode=efficient_cached."
            )
        smallest = TOP_LATENTS[config.algo.compat].smallest_k
        if settings.top_k != -1 and settings.top_k < smallest:
            raise ConfigError(
                f"algo.curriculum.top_k={settings.top_k} is neither -1 (which is "
                f"{DEFAULT_TOP_K}) nor at least {smallest} "
                f"(algo.compat={config.algo.compat})."
            )

    def is_over(self, step: int) -> bool:
        """Whether the input is discrete and the loss the true bound, from `end` on."""
        return step >= self.end

    def log10_tau_at(self, step: int) -> float:
        """Constant before `start`, then linear until `end`."""
        if self.is_over(step):
            return NEVER_SOFT
        first, last = self.log10_tau
        if step < self.start:
            return first
        return first + (last - first) * (step - self.start) / (self.end - self.start)

    @torch.no_grad()
    def draw(
        self,
        x0: Tensor,
        t: Tensor,
        step: int,
        seeds: Sequence[int],
        is_clean: Tensor | None = None,
    ) -> SoftTokens:
        """The soft input for clean ids.

        Args:
            x0: (B, L).
            t: Times, (B,) on the host.
            step: Of the optimiser; sets the temperature.
            seeds: Of each row's draws, (B,).
            is_clean: Tokens to leave as they are, broadcasts with (B, L).
        """
        tau = 10 ** self.log10_tau_at(step)
        levels = self._levels(t, tau, x0.device).expand(x0.shape)
        if is_clean is not None:
            tau_there = torch.where(is_clean, 10**NEVER_SOFT, levels.tau)
            sigma_there = levels.gauss_sigma.masked_fill(is_clean, 0)
            levels = Levels(levels.gauss_alpha, sigma_there, tau_there)
        k = self._num_kept(tau)
        if k is None:
            return DenseLatents(x0, levels, self.vocab_size, seeds)
        generators = seeded(seeds, x0.device)
        draws = TopDraws.draw(x0.shape, self.vocab_size, k, generators, x0.device)
        return self.top_latents.of(draws, x0, levels, self.vocab_size)

    def _levels(self, t: Tensor, tau: float, device: torch.device) -> Levels:
        """(B, 1) each, on the device."""
        gauss = gauss_levels(self.operator.gammas.gamma(t[:, None]))
        levels = (*gauss, torch.full_like(t[:, None], tau))
        return Levels(*(widened(x, device) for x in levels))

    def _num_kept(self, tau: float) -> int | None:
        """How many entries of the latent to draw; None is all of them.

        Mode `simple` is a softmax over all; where a few entries are all of it to
        rounding, only those are drawn.
        """
        if not self.is_dense:
            return min(self.top_k, self.vocab_size - 1)
        lowest = torch.tensor(self.operator.gammas.low)
        return enough(self.vocab_size, tau / float(gauss_levels(lowest)[1]))


def check_operator(config: DictConfig) -> None:
    """Refuses modes that do not exist, and ends of gamma that are no numbers."""
    settings = config.algo.curriculum
    require(settings.mode, OPERATORS, "algo.curriculum.mode")
    check_ends(settings.gamma_min, settings.gamma_max)
