"""A whole update of a model, as training makes it, on whatever device it is."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from trainer_base import TrainerBase


def update_of(model: TrainerBase, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A function that makes an update and returns its loss: forward, backward, clipping
    with the judgement whether all is finite, AdamW, EMA."""
    model.train()
    model.trainer = SimpleNamespace(
        model=model, world_size=1, global_rank=0, global_step=0
    )
    model.log = lambda *args, **options: None
    if model.device.type not in ("cpu", "cuda"):  # where the host learns of it later
        model._updates.note = lambda step, values: None
    optimizer, model.ema = model.make_optimizer(), model.make_ema()
    assert optimizer.defaults["fused"]

    def update() -> Tensor:
        with model.autocast():
            loss = model.training_step(batch, 0)
        loss.backward()
        model.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.ema.update(model.averaged_parameters())
        return loss.detach()

    return update


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}
