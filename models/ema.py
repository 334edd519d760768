"""Exponential moving average of a list of parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.shards import local, split_as
from utils import ConfigError


class ExponentialMovingAverage:
    """Shadow weights, ramped up so that early updates are not held back.

        d = min(decay, (1 + n) / (10 + n)),  n = number of updates, this one included
        shadow <- shadow - (1 - d) (shadow - parameter)

    Parameters that need no gradient are left out, unless `has_frozen`. Under sharded
    training the list holds each rank's shards, and so does the shadow.

    Args:
        parameters: Parameters to average, in a fixed order.
        decay: Upper bound of d, in [0, 1].
        use_num_updates: False keeps d = decay from the start.
        has_frozen: Whether parameters that need no gradient have a shadow, too.
        counts_before: Whether n is the number of updates before this one.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        decay: float,
        use_num_updates: bool = True,
        *,
        has_frozen: bool = False,
        counts_before: bool = False,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay} is outside [0, 1]")
        self.decay = decay
        self.num_updates: int | None = 0 if use_num_updates else None
        self.has_frozen = has_frozen
        self.counts_before = counts_before
        self.shadow_params = [p.detach().clone() for p in self._of(parameters)]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves the shadow towards `parameters`; call after each optimiser update."""
        trained = self._of(parameters)
        self._match_device(trained)
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            n = self.num_updates - self.counts_before
            decay = min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(_local(self.shadow_params), _local(trained), 1.0 - decay)

    @contextmanager
    def applied(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Puts the shadow into `parameters` for the duration of the block.

        The raw weights come back at the end, also after an exception.
        """
        trained = self._of(parameters)
        self._match_device(trained)
        raw = [p.detach().clone() for p in trained]
        try:
            _copy(self.shadow_params, trained)
            yield
        finally:
            _copy(raw, trained)

    def state_dict(self) -> dict[str, Any]:
        """`decay`, `num_updates` and `shadow_params` in the order of construction."""
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the shadow and the number of updates.

        NOTE(compat): the reference also takes the file's decay, so `training.ema`
        is ignored there when fine-tuning. Here the configured decay holds.
        """
        shapes = [p.shape for p in self.shadow_params]
        if [p.shape for p in state["shadow_params"]] != shapes:
            raise ConfigError(
                "The EMA weights of the checkpoint are of another network; "
                "training.ema=0 leaves them out."
            )
        self.num_updates = state["num_updates"]
        own, theirs = self.shadow_params, state["shadow_params"]
        self.shadow_params = [
            split_as(p, like).detach().clone()
            for p, like in zip(theirs, own, strict=True)
        ]

    def split(self, parameters: Iterable[nn.Parameter]) -> None:
        """Splits the shadow over processes where `parameters` have been split."""
        self.shadow_params = [
            split_as(shadow, p).clone()
            for shadow, p in zip(self.shadow_params, self._of(parameters), strict=True)
        ]

    def _of(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        return [p for p in parameters if p.requires_grad or self.has_frozen]

    def _match_device(self, parameters: list[Tensor]) -> None:
        self.shadow_params = [
            shadow.to(p.device, p.dtype)
            for shadow, p in zip(self.shadow_params, parameters, strict=True)
        ]


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    torch._foreach_copy_(_local(target), _local(source))


def _local(tensors: list[Tensor]) -> list[Tensor]:
    return [local(x) for x in tensors]
