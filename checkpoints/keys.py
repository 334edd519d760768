"""How the names and shapes of a state dict fit a module, or sizes that are stated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

from utils import ConfigError


class KeyReport(NamedTuple):
    """How a state dict fits a module."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    retyped: list[str]

    def raise_if_any(self, where: str, advice: str = "") -> None:
        """Refuses a partial fit, which would silently evaluate random weights.

        Args:
            where: What does not fit.
            advice: Further words at the end.
        """
        parts = [
            f"{len(names)} {kind} (e.g. {names[0]})"
            for kind, names in self._asdict().items()
            if names
        ]
        if parts:
            raise ConfigError(
                f"{where} does not fit this model: {', '.join(parts)}. "
                "Check algo, model, model.length, data.tokenizer_name_or_path and, of "
                f"images, data.num_classes.{advice}"
            )


def key_report(module: nn.Module, state: Mapping[str, torch.Tensor]) -> KeyReport:
    """Compares names and shapes of `state` with those of `module`."""
    own = module.state_dict()
    return KeyReport(
        missing=sorted(own.keys() - state.keys()),
        unexpected=sorted(state.keys() - own.keys()),
        reshaped=sorted(
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ),
        retyped=sorted(
            f"{name} {state[name].dtype} for {own[name].dtype}"
            for name in own.keys() & state.keys()
            if own[name].is_floating_point() != state[name].is_floating_point()
        ),
    )


_EMBEDDING = "backbone.vocab_embed.embedding"
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_CONDITION = "backbone.sigma_map.mlp.0.weight"


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int | None]:
    """Sizes of a transformer by the shapes of its weights, as far as they say."""
    embedding = shapes.get(_EMBEDDING, ())
    blocks = {match[1] for match in map(_BLOCK.match, shapes) if match}
    found = {
        "hidden_size": embedding[1] if len(embedding) == 2 else None,
        "n_blocks": len(blocks) or None,
    }
    if _CONDITION in shapes:
        found["cond_dim"] = next(iter(shapes[_CONDITION]), None)
    return found


def check_sizes(
    shapes: Mapping[str, Sequence[int]], sizes: Mapping[str, Any], where: str
) -> None:
    """Refuses sizes of a transformer that are not those of its weights.

    A network of sizes that a file only states may take all the memory there is.

    Args:
        shapes: Of the weights, by name.
        sizes: `hidden_size`, `n_blocks`, `n_heads`, `cond_dim`, those that are stated.
        where: What is said to have them, for the message.
    """
    found = sizes_of(shapes)
    for name, value in found.items():
        if sizes.get(name) not in (None, value):
            raise ConfigError(
                f"{where} states {name}={sizes[name]}, its weights {value}."
            )
    heads, hidden = sizes.get("n_heads"), found["hidden_size"]
    if heads is not None and (not hidden or heads < 1 or hidden % heads):
        raise ConfigError(
            f"{where} states n_heads={heads}, which does not fit {hidden}."
        )
