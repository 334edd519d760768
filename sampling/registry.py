"""Which sampler `sampling.predictor` names for an algorithm.

Samplers are imported when they are asked for, so that their names can be checked
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from models.registry import block_size_of
from utils import ConfigError, choose, imported

if TYPE_CHECKING:
    from sampling.autoregressive import SemiAutoRegressive
    from sampling.blocks import BlockByBlock
    from sampling.correctors import Corrector
    from sampling.denoiser import Algorithm
    from sampling.sampler import Sampler

# By `sampling.predictor`: classes, or where they are. Of several under a name, the one
# that fits counts. Plug-ins add theirs by `duo.sampler` (docs/extending.md).
SAMPLERS: dict[str, tuple[str | type[Sampler], ...]] = {
    "ancestral": (
        "sampling.predictors.Ancestral",
        "sampling.autoregressive.AutoRegressive",
        "sampling.one_step.OneStep",
    ),
    "ancestral_cache": ("sampling.predictors.AncestralCache",),
    "analytic": ("sampling.predictors.Analytic",),
    "first_hitting": ("sampling.predictors.FirstHitting",),
    "psi": ("sampling.psi.Psi",),
    "one_step": ("sampling.one_step.OneStep",),
    "confidence": ("sampling.ordered.Confidence",),
    "entropy_bound": ("sampling.ordered.EntropyBound",),
}
# By `sampling.corrector`.
CORRECTORS = {"gibbs": "sampling.correctors.Gibbs"}
# Keys of `sampling` that a model with blocks alone reads, and what they are for others.
OF_BLOCKS = {"num_blocks": None, "stop_at_eos": False, "block_cache": True}
# Names in MDLM's configs.
ALIASES = {"ddpm": "ancestral", "ddpm_cache": "ancestral_cache"}


def samplers_of(predictor: str) -> tuple[type[Sampler], ...]:
    """The classes that a name of the table stands for."""
    return tuple(imported(x) if isinstance(x, str) else x for x in SAMPLERS[predictor])


def sampler_class(predictor: str, algorithm: type[Algorithm]) -> type[Sampler]:
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


def check_sampler(config: DictConfig, algorithm: type[Algorithm]) -> None:
    """Refuses settings of `sampling` that make no sense, or not for this algorithm.

    Args:
        config: The run's config.
        algorithm: The class of the model that samples are drawn from.

    Raises:
        ConfigError: With the key, the value and the choices.
    """
    check_guidance(config)
    sampling = config.sampling
    sampler = sampler_class(sampling.predictor, algorithm)
    sampler.validate_config(sampling)
    check_keys_of_others(sampling, sampler)
    check_corrector(config, algorithm, sampler)
    block_size = block_size_of(config)
    if block_size is not None:
        _blocks().validate_config(config, block_size)
        return
    check_keys_of_blocks(sampling)
    if sampling.semi_ar:
        _windows().validate_config(config, algorithm)


def check_keys_of_blocks(sampling: DictConfig) -> None:
    """Refuses what only a model with blocks reads."""
    for key, value in OF_BLOCKS.items():
        if sampling[key] != value:
            raise ConfigError(
                f"sampling.{key}={sampling[key]!r} is for models that write block by "
                "block, algo.block_size=N; without blocks the only value is "
                f"{'null' if value is None else value}."
            )


def check_keys_of_others(sampling: DictConfig, chosen: type[Sampler]) -> None:
    """Refuses keys that only another sampler or corrector reads."""
    readers: dict[str, dict[str, Any]] = {}
    for name in SAMPLERS:
        for sampler in samplers_of(name):
            if sampler is not chosen:
                readers[f"sampling.predictor={name}"] = sampler.keys
    for name, path in CORRECTORS.items():
        if name != sampling.corrector:
            readers[f"sampling.corrector={name}"] = imported(path).keys
    for reader, keys in readers.items():
        for key, value in keys.items():
            if key not in chosen.keys and sampling[key] != value:
                kind = reader.partition("=")[0]
                now = sampling[kind.removeprefix("sampling.")] or "null"
                raise ConfigError(
                    f"sampling.{key}={sampling[key]!r} is for {reader}; with {kind}="
                    f"{now} the only value is {value!r}."
                )


def check_corrector(
    config: DictConfig, algorithm: type[Algorithm], sampler: type[Sampler]
) -> None:
    """Refuses correctors that there are not, or not for this algorithm."""
    name = config.sampling.corrector
    if name is None:
        return
    choose(CORRECTORS, name, "sampling.corrector")
    if not algorithm.has_leave_one_out:
        cure = (
            "sampling.predictor=psi with a mode such as sampling.psi.middle_mode="
            "constant-remdm-0.01, which masks tokens again, corrects masked diffusion"
            if algorithm.has_mask and not algorithm.is_one_step
            else "the only value is null"
        )
        raise ConfigError(
            f"sampling.corrector={name!r} is for uniform-state diffusion, such as "
            f"algo=duo_base, not for algo={config.algo.name}; {cure}."
        )
    imported(CORRECTORS[name]).validate_config(config.sampling)
    check_window(config, sampler)


def check_window(config: DictConfig, kind: type[Sampler]) -> None:
    """Refuses times of a corrector at which no step ends."""
    sampling = config.sampling
    noise = imported("models.noise.build_noise")(config.noise)
    sampler = kind(sampling, config.algo.compat)
    corrector = build_corrector(sampling)
    plan = sampler.plan(noise, sampling.steps)
    if corrector and not any(corrector.is_due(noise, step.alpha_s) for step in plan):
        raise ConfigError(
            f"sampling.corrector_t_min={sampling.corrector_t_min} and sampling."
            f"corrector_t_max={sampling.corrector_t_max}: none of the sampling.steps="
            f"{sampling.steps} steps ends at a time between them; widen the window."
        )


def check_guidance(config: DictConfig) -> None:
    """Refuses a weight of classes where there are none."""
    weight = config.sampling.guid_weight
    if weight and config.data.get("num_classes") is None:
        raise ConfigError(
            f"sampling.guid_weight={weight} needs a model with classes, and "
            "data.num_classes is null; the only values are null and 0."
        )


def build_sampler(
    config: DictConfig, algorithm: type[Algorithm]
) -> Sampler | SemiAutoRegressive | BlockByBlock:
    """The sampler that `sampling` describes for an algorithm.

    Raises:
        ConfigError: As `check_sampler`.
    """
    check_sampler(config, algorithm)
    sampling = config.sampling
    kind = sampler_class(sampling.predictor, algorithm)
    sampler = kind(sampling, config.algo.compat)
    sampler.corrector = build_corrector(sampling)
    block_size = block_size_of(config)
    if block_size is not None:
        ways = sampling.num_blocks, sampling.block_cache, sampling.stop_at_eos
        return _blocks()(sampler, block_size, *ways)
    if not sampling.semi_ar:
        return sampler
    return _windows()(sampler, sampling.stride_length, sampling.num_strides)


def build_corrector(sampling: DictConfig) -> Corrector | None:
    """The corrector that `config.sampling` names, if any."""
    if sampling.corrector is None:
        return None
    kind: type[Corrector] = imported(CORRECTORS[sampling.corrector])
    return kind(sampling)


def _windows() -> type[SemiAutoRegressive]:
    return imported("sampling.autoregressive.SemiAutoRegressive")


def _blocks() -> type[BlockByBlock]:
    return imported("sampling.blocks.BlockByBlock")
