"""Backbones by name; a backbone's module is imported when it is chosen.

To add one: a module with a class that has `from_config(config, vocab_size)`,
`trunk(x, sigma, weights)` and `head(hidden)`, and an entry here.
"""

from importlib import import_module

from omegaconf import DictConfig
from torch import nn

from utils import choose

BACKBONES = {"dit": "models.dit.DIT"}


def build_backbone(config: DictConfig, vocab_size: int) -> nn.Module:
    """The backbone that `algo.backbone` names.

    Args:
        config: The run's config.
        vocab_size: K, a mask entry included where there is one.
    """
    target = choose(BACKBONES, config.algo.backbone, "algo.backbone")
    module, name = target.rsplit(".", 1)
    return getattr(import_module(module), name).from_config(config, vocab_size)
