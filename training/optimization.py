"""Optimiser, schedule, clipping, and the step of the EMA that follows an update."""

from typing import Any

import hydra
import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig

from models.ema import ExponentialMovingAverage


class Optimization(lightning.LightningModule):
    """How the weights of a model change, as `optim` and `lr_scheduler` say."""

    config: DictConfig
    ema: ExponentialMovingAverage | None

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters, in one kernel.

        With float16 gradients Lightning unscales and clips them between backward and
        step, which a fused optimiser does not allow.
        """
        optim = self.config.optim
        return torch.optim.AdamW(
            self.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=str(self.config.trainer.precision) not in ("16", "16-mixed"),
        )

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of an optimiser's learning rate, as `lr_scheduler` says."""
        return hydra.utils.instantiate(self.config.lr_scheduler, optimizer=optimizer)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": self.make_schedule(optimizer),
                "interval": "step",
                "name": "trainer/lr",
            },
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the total norm; sharded gradients need their own wrapper's method.

        Not through Lightning, which refuses to clip for a fused optimiser under any
        mixed precision, although only float16 gradients are scaled.
        """
        if not gradient_clip_val:
            return
        sharded = getattr(self.trainer.model, "clip_grad_norm_", None)
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif sharded is not None:
            sharded(gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
