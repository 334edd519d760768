"""A whole update of a model, as training makes it, on whatever device it is."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from trainer_base import TrainerBase


class Update:
    """An update of a model on a batch: forward, backward, clipping with the judgement
    whether all is finite, AdamW, EMA. Called, it returns the loss."""

    def __init__(self, model: TrainerBase, batch: Mapping[str, Tensor]) -> None:
        self.model, self.batch = model.train(), batch
        model.trainer = SimpleNamespace(
            model=model, world_size=1, global_rank=0, global_step=0
        )
        model.log = lambda *args, **options: None
        if model.device.type not in ("cpu", "cuda"):  # the host learns of it later
            model._updates.note = lambda step, values: None
        self.optimizer, model.ema = model.make_optimizer(), model.make_ema()
        assert self.optimizer.defaults["fused"]

    def __call__(self) -> Tensor:
        model, optimizer = self.model, self.optimizer
        with model.autocast():
            loss = model.training_step(self.batch, 0)
        loss.backward()
        model.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.ema.update(model.averaged_parameters())
        return loss.detach()

    def kept(self) -> list[Tensor]:
        """What stays from update to update: weights, moments, averages."""
        states = self.optimizer.state.values()
        moments = [x for state in states for x in state.values()]
        return [*self.model.parameters(), *moments, *self.model.ema.shadow_params]


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}
