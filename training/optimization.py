"""Optimiser, schedule and clipping."""

from collections.abc import Iterable
from typing import Any

import hydra
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor, nn

from models.shards import local, whole
from training.accumulation import Accumulation
from training.finite import FiniteTraining


class Optimization(Accumulation, FiniteTraining):
    """How the weights of a model change, as `optim` and `lr_scheduler` say."""

    config: DictConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters as optimisers take them: all in one."""
        return [{"params": list(self.parameters())}]

    def clipped_parameters(self) -> list[nn.Parameter]:
        """Those whose gradients are clipped."""
        return list(self.parameters())

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters, in one kernel.

        With float16 gradients Lightning unscales and clips them between backward and
        step, which a fused optimiser does not allow.
        """
        optim = self.config.optim
        return torch.optim.AdamW(
            self.parameter_groups(),
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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients, and has those that are not finite left out.

        Not through Lightning, which refuses to clip for a fused optimiser under any
        mixed precision, although only float16 gradients are scaled.
        """
        self.weigh_gradients()
        norm = self._clip(gradient_clip_val, gradient_clip_algorithm)
        self.judge_update(optimizer, norm)

    def _clip(self, limit: float | None, algorithm: str | None) -> Tensor:
        """Clips gradients as asked for; their norm before, the same on all ranks."""
        parameters = self.clipped_parameters()
        if limit and algorithm != "value":
            return whole(torch.nn.utils.clip_grad_norm_(parameters, limit))
        norm = total_norm(parameters)
        if limit:
            grads = [local(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_clamp_min_(grads, -limit)
            torch._foreach_clamp_max_(grads, limit)
        return norm


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all their gradients together, over all processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(grads))
