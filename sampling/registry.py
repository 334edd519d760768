"""Which sampler `sampling.predictor` names for an algorithm.

Samplers are imported when they are asked for, so that their names can be checked
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from utils import ConfigError, choose, imported

if TYPE_CHECKING:
    from sampling.autoregressive import SemiAutoRegressive
    from sampling.sampler import Sampler

# By `sampling.predictor`; of several classes under a name, the one that fits counts.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "ancestral": (
        "sampling.predictors.Ancestral",
        "sampling.autoregressive.AutoRegressive",
    ),
    "ancestral_cache": ("sampling.predictors.AncestralCache",),
    "analytic": ("sampling.predictors.Analytic",),
    "first_hitting": ("sampling.predictors.FirstHitting",),
    "psi": ("sampling.psi.Psi",),
}
# Names in MDLM's configs.
ALIASES = {"ddpm": "ancestral", "ddpm_cache": "ancestral_cache"}


def samplers_of(predictor: str) -> tuple[type[Sampler], ...]:
    """The classes that a name of the table stands for."""
    return tuple(imported(path) for path in SAMPLERS[predictor])


def sampler_class(predictor: str, algorithm: type) -> type[Sampler]:
    """The sampler that `sampling.predictor` means for an algorithm.

    Raises:
        ConfigError: If there is none; the choices are those that fit.
    """
    fitting = {
        name: sampler
        for name in SAMPLERS
        for sampler in samplers_of(name)
        if sampler.fits(algorithm)
    }
    if ALIASES.get(predictor) in fitting:
        return fitting[ALIASES[predictor]]
    return choose(fitting, predictor, "sampling.predictor", algorithm.__name__)


def check_sampler(config: DictConfig, algorithm: type) -> None:
    """Refuses settings of `sampling` that make no sense, or not for this algorithm.

    Args:
        config: The run's config.
        algorithm: The class of the model that samples are drawn from.

    Raises:
        ConfigError: With the key, the value and the choices.
    """
    sampling = config.sampling
    sampler_class(sampling.predictor, algorithm).validate_config(sampling)
    if not sampling.semi_ar:
        return
    if algorithm.is_autoregressive:
        raise ConfigError(
            "sampling.semi_ar=True is for diffusion models, not "
            f"algo={config.algo.name}; the only value is False."
        )
    if sampling.noise_removal in ("none", False):
        raise ConfigError(
            f"sampling.noise_removal={sampling.noise_removal!r} would leave noise in "
            "the windows of sampling.semi_ar=True; choose ancestral or greedy."
        )
    if not 0 < sampling.stride_length < config.model.length:
        raise ConfigError(
            f"sampling.stride_length={sampling.stride_length} is not above 0 and below "
            f"model.length={config.model.length}."
        )


def build_sampler(config: DictConfig, algorithm: type) -> Sampler | SemiAutoRegressive:
    """The sampler that `sampling` describes for an algorithm.

    Raises:
        ConfigError: As `check_sampler`.
    """
    check_sampler(config, algorithm)
    sampling = config.sampling
    kind = sampler_class(sampling.predictor, algorithm)
    sampler = kind(sampling, config.algo.compat)
    if not sampling.semi_ar:
        return sampler
    windows = imported("sampling.autoregressive.SemiAutoRegressive")
    return windows(sampler, sampling.stride_length, sampling.num_strides)
