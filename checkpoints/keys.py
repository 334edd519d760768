"""How the names and shapes of a state dict fit a module."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from utils import ConfigError


class KeyReport(NamedTuple):
    """How a state dict fits a module."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    retyped: list[str]

    def raise_if_any(self, where: str) -> None:
        """Refuses a partial fit, which would silently evaluate random weights."""
        parts = [
            f"{len(names)} {kind} (e.g. {names[0]})"
            for kind, names in self._asdict().items()
            if names
        ]
        if parts:
            raise ConfigError(
                f"{where} does not fit this model: {', '.join(parts)}. "
                "Check algo, model, model.length and data.tokenizer_name_or_path."
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
