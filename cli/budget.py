"""How many steps `training.flops` buys, before there is a model."""

from typing import Any

import torch
from omegaconf import DictConfig

from data.tokenizers import get_tokenizer
from models.flops import UNIT, compute_of
from models.registry import build_backbone
from utils import ConfigError


def steps_of(config: DictConfig, algorithm: type[Any]) -> int:
    """The steps that a run may take, by the sizes of its network alone.

    Args:
        config: The run's config, in which values may still be made of others.
        algorithm: Its class.

    Raises:
        ConfigError: If the budget buys no step, or FLOP are not counted.
    """
    algorithm.validate_config(config)
    passes = algorithm.passes(config)
    vocab_size, _ = algorithm.vocabulary(get_tokenizer(config))
    with torch.device("meta"):  # takes no memory
        network = build_backbone(config, vocab_size)
    compute = compute_of(config, network, passes)
    steps = compute.steps(config.training.flops * UNIT)
    if steps < 1:
        raise ConfigError(
            f"training.flops={config.training.flops} (1e18 FLOP) is less than one step "
            f"takes, {compute.step_flops / UNIT:.3g}: give more, or lower "
            "loader.global_batch_size or model.length."
        )
    return steps
