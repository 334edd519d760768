"""A checkpoint that has been read: its weights, and what it says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from checkpoints.schema import is_tensor, setting

if TYPE_CHECKING:  # what a file says of itself is read without torch
    from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """What a file or a Hugging Face folder holds, as plain data on the CPU.

    A field is None where the file or folder does not say. `checkpoints.schema` has the
    types and ranges that the fields of a file have been compared with.
    """

    weights: Mapping[str, Tensor] | None = None  # names begin with `backbone.`
    config: dict[str, Any] | None = None  # of the run that wrote it, nested
    ema: Mapping[str, Any] | None = None  # decay, num_updates, shadow_params
    step: int | None = None  # updates of the weights
    epoch: int | None = None
    teacher: Mapping[str, Any] | None = None  # round and sha256 of a distillation's
    optimizer_states: list[Any] | None = None
    lightning_version: str | None = None
    val_ppl: float | None = None  # the lowest of the run's validations
    # All of a file, for Lightning to restore a run from; empty of a folder.
    lightning: dict[str, Any] = field(default_factory=dict)

    # Of the weights, by name; stands alone where a file was not read as a whole.
    outline: Mapping[str, Sequence[int]] | None = None
    is_own: bool = False  # whether this code wrote it as the file of a run

    # Of folders only.
    format: str | None = None
    source: str | None = None  # the path or hub id that was asked for
    folder: Path | None = None  # where its files are on this machine
    weights_kind: str | None = None  # EMA or raw
    likelihood: str | None = None  # what the model's likelihood is worth

    @classmethod
    def of_lightning(cls, content: dict[str, Any]) -> Self:
        """The checkpoint in what Lightning writes to a file.

        Args:
            content: Of the file; its config is plain data. It becomes `lightning`.
        """
        weights = content.get("state_dict")
        settings = content.get("hyper_parameters")
        config = settings.get("config") if isinstance(settings, dict) else None
        return cls(
            weights=weights if isinstance(weights, dict) else None,
            config=config if isinstance(config, dict) else None,
            ema=content.get("ema"),
            step=content.get("global_step"),
            epoch=content.get("epoch"),
            teacher=content.get("teacher"),
            optimizer_states=content.get("optimizer_states"),
            lightning_version=content.get("pytorch-lightning_version"),
            val_ppl=_lowest_ppl(content.get("callbacks")),
            is_own=isinstance(content.get("identity"), dict),
            lightning=content,
        )

    def not_finite(self, kinds: Sequence[str] = ("raw", "EMA")) -> str | None:
        """Which of its weights are not finite, in words; None: all are.

        Args:
            kinds: Those that matter.
        """
        from models.finite import summary

        shadow = (self.ema or {}).get("shadow_params", ())
        tensors: dict[str, Mapping[str, Tensor]] = {
            "raw": self.weights or {},
            "EMA": {str(i): x for i, x in enumerate(shadow)},
        }
        found = {kind: summary(tensors[kind]) for kind in kinds}
        lines = [f"{kind} weights: {x}" for kind, x in found.items() if x]
        return "; ".join(lines) or None

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Of its weights, by name; empty if it does not say."""
        if self.weights is None:
            return self.outline or {}
        return {name: tuple(x.shape) for name, x in self.weights.items()}

    def setting(self, key: str) -> Any:
        """A value of its config by a dotted key; None if it does not say."""
        return setting(self.config, key)


def _lowest_ppl(callbacks: Any) -> float | None:
    """The lowest val/ppl, to six digits: a note of the callback that keeps the best."""
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    for state in states:
        if not isinstance(state, dict) or state.get("monitor") != "val/nll":
            continue
        nll = state.get("best_model_score")
        if is_tensor(nll) and nll.numel() == 1 and nll.is_floating_point():
            nll = float(nll)
        if isinstance(nll, float) and 0 <= nll < 100:
            return float(f"{math.exp(nll):.6g}")
    return None
