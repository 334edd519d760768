"""Which sampler `sampling.predictor` names for an algorithm."""

from omegaconf import DictConfig

from sampling.autoregressive import AutoRegressive, SemiAutoRegressive
from sampling.predictors import Analytic, Ancestral, AncestralCache, FirstHitting
from sampling.psi import Psi
from sampling.sampler import Sampler
from utils import ConfigError, choose

# By `sampling.predictor`; of several classes under a name, the one that fits counts.
SAMPLERS: dict[str, tuple[type[Sampler], ...]] = {
    "ancestral": (Ancestral, AutoRegressive),
    "ancestral_cache": (AncestralCache,),
    "analytic": (Analytic,),
    "first_hitting": (FirstHitting,),
    "psi": (Psi,),
}
# Names in MDLM's configs.
ALIASES = {"ddpm": "ancestral", "ddpm_cache": "ancestral_cache"}


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
    if ALIASES.get(predictor) in fitting:
        return fitting[ALIASES[predictor]]
    return choose(fitting, predictor, "sampling.predictor", algorithm.__name__)


def build_sampler(config: DictConfig, algorithm: type) -> Sampler | SemiAutoRegressive:
    """The sampler that `sampling` describes for an algorithm.

    Raises:
        ConfigError: If the settings make no sense, or not for this algorithm.
    """
    sampling = config.sampling
    kind = sampler_class(sampling.predictor, algorithm)
    sampler = kind(sampling, config.algo.compat)
    if not sampling.semi_ar:
        return sampler
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
    return SemiAutoRegressive(sampler, sampling.stride_length, sampling.num_strides)
