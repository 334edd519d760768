"""Tiny models for tests, and which algorithms and samplers there are."""

import copy
import functools
from pathlib import Path

import hydra
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cli.settle import algorithm_class
from diffusion.base import Diffusion
from models.noise import SCHEDULES, SigmaRange
from sampling.registry import SAMPLERS, samplers_of
from utils import register_resolvers

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = (
    "model=tiny",
    "model.hidden_size=32",
    "model.cond_dim=16",
    "model.n_blocks=2",
    "model.n_heads=2",
    "model.length=8",
    "model.dropout=0",
    "loader.global_batch_size=4",
    "loader.eval_global_batch_size=4",
    "trainer.accelerator=cpu",
    "sampling.steps=8",
)


def compose(*overrides: str, tiny: bool = True) -> DictConfig:
    """The run's config as `main.py` composes it; the caller may edit it.

    Args:
        overrides: As on the command line.
        tiny: Whether to make model, data and batches tiny first.
    """
    return copy.deepcopy(_composed(overrides, tiny))


@functools.cache
def _composed(overrides: tuple[str, ...], tiny: bool) -> DictConfig:
    parser = OverridesParser.create()
    parsed = {word: parser.parse_override(word) for word in overrides}
    values = [word for word in overrides if is_value(parsed[word])]
    choices = tuple(word for word in overrides if word not in values)
    config = copy.deepcopy(_chosen(choices, tiny))
    ConfigLoaderImpl._apply_overrides_to_config([parsed[x] for x in values], config)
    return config


def is_value(override: Override) -> bool:
    """Whether it is set in a config that is composed, as Hydra does last of all."""
    key = override.key_or_group
    is_group = key.startswith("hydra") or (CONFIGS / key).is_dir()
    is_group |= override.package is not None
    return not (is_group or override.is_delete() or override.is_sweep_override())


@functools.cache  # Hydra takes longer to compose than a tiny model to run
def _chosen(choices: tuple[str, ...], tiny: bool) -> DictConfig:
    """The config of some choices of groups."""
    register_resolvers()
    has_data = any(choice.startswith("data=") for choice in choices)
    data = [] if has_data else ["data=synthetic", "data.vocab_size=7"]
    base = [*TINY, *data] if tiny else []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose("config", [*base, *choices])


class StubTokenizer:
    """What a model asks of a tokenizer.

    The default has no mask and one token added later, as GPT-2 with its [PAD]; so
    absorbing and uniform models alike have K = 7.
    """

    def __init__(
        self,
        vocab_size: int = 6,
        num_added: int = 1,
        mask_token_id: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_added = num_added
        self.mask_token_id = mask_token_id
        self.bos_token_id, self.eos_token_id = 0, 1

    def __len__(self) -> int:
        return self.vocab_size + self.num_added

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


def tiny_model(*overrides: str, tokenizer: StubTokenizer | None = None):
    """A model in evaluation mode whose outputs depend on its inputs.

    Args:
        overrides: As on the command line, `algo=...` among them.
        tokenizer: The stub to use.
    """
    config = compose(*overrides)
    torch.manual_seed(0)
    algorithm = algorithm_class(config)
    model = algorithm(config, tokenizer or StubTokenizer())
    with torch.no_grad():  # heads start at zero, which would hide much
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    if hasattr(model, "teacher"):  # another network, so that there is a loss
        weights = model.backbone.state_dict()
        scale = torch.Generator().manual_seed(1)
        for name, x in weights.items():
            weights[name] = x + 0.1 * torch.randn(x.shape, generator=scale)
        model.teacher.take(weights, 0)
    return model.eval()


def nearly_whole(noise: str) -> tuple[str, ...]:
    """Settings under which next to nothing is clean at t = 1, or noise at t = 0."""
    if issubclass(SCHEDULES[noise], SigmaRange):
        return ("noise.sigma_min=1e-7", "noise.sigma_max=12")
    return ("noise.eps=1e-5",)


def available_algorithms() -> dict[str, type]:
    """Config name -> class, for every algo config whose class exists."""
    found = {}
    for path in sorted((CONFIGS / "algo").glob("*.yaml")):
        target = OmegaConf.load(path)._target_
        module, name = target.rsplit(".", 1)
        try:
            found[path.stem] = getattr(__import__(module), name)
        except (ImportError, AttributeError):
            continue
    return found


# What samplers and laws of the forward process ask of an algorithm.
PROCESS = (
    "noise_tokens",
    "prior_sample",
    "q_xt",
    "posterior",
    "marginal",
    "process_logits",
    "denoised",
    "carry_over",
    "change_bound",
    "changed",
    "undecided",
    "hidden",
    "forward",
    "next_token",
    "log_score",
    "with_bos",
    "vocabulary",
    "nll_per_token",
    "draws_whole_rows",
)


def process_of(algorithm: type) -> tuple:
    return tuple(getattr(algorithm, name, None) for name in PROCESS)


ALGORITHMS = available_algorithms()
# Of those with the same process and the same sampling only the most general one.
_FIRST = {
    process_of(cls): name
    for name, cls in sorted(ALGORITHMS.items(), key=lambda x: -len(x[1].__mro__))
}
DIFFUSION = [
    name
    for name, cls in ALGORITHMS.items()
    if issubclass(cls, Diffusion) and name in _FIRST.values()
]
SAMPLING = [
    (predictor, name)
    for predictor in SAMPLERS
    for name, algorithm in ALGORITHMS.items()
    if name in _FIRST.values()
    if any(sampler.fits(algorithm) for sampler in samplers_of(predictor))
]
