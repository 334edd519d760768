"""Backbones by name; a backbone's module is imported when it is chosen.

To add one: a module with a subclass of `models.network.Network`, and an entry here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from omegaconf import DictConfig

from utils import choose, imported, require

if TYPE_CHECKING:  # names can be checked without torch, which takes a second
    from torch import Tensor

    from models.network import Network


class SoftInput(Protocol):
    """What a backbone's trunk takes beside ids: averages of embedding rows."""

    def embed(self, embedding: Tensor) -> Tensor:
        """(K, D) -> (B, L, D), differentiable in the embedding."""
        ...


class Backbone(NamedTuple):
    """Where a backbone's class is, and which `model.type` describes it."""

    target: str
    model_type: str


BACKBONES = {
    "dit": Backbone("models.dit.DIT", "ddit"),
    "hf_dit": Backbone("models.dit.DIT", "ddit"),  # sizes are those of a checkpoint
}


def validate_backbone(config: DictConfig) -> Backbone:
    """The entry that `algo.backbone` names.

    Raises:
        ConfigError: If there is none, or `model` describes another kind of network.
    """
    backbone = choose(BACKBONES, config.algo.backbone, "algo.backbone")
    where = f"model={config.model.name}, algo.backbone={config.algo.backbone}"
    require(config.model.type, [backbone.model_type], "model.type", where)
    return backbone


def build_backbone(config: DictConfig, vocab_size: int) -> Network:
    """The network that `algo.backbone` and `model` describe.

    Args:
        config: The run's config.
        vocab_size: K, a mask entry included where there is one.
    """
    backbone = imported(validate_backbone(config).target)
    return backbone.from_config(config, vocab_size)
