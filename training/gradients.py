"""Norms of gradients in the log."""

import lightning
import torch

from models.shards import whole
from training.lightning_state import is_logged

# ---------------------------------------------------------------- callbacks


class GradientInspectionCallback(lightning.Callback):
    """Logs the norms of the largest parameter gradients, before clipping.

    Args:
        num_grads_log: How many parameters to log at each logging step.
    """

    def __init__(self, num_grads_log: int = 10) -> None:
        self.num_grads_log = num_grads_log

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if not is_logged(trainer, trainer.global_step):
            return
        named = [
            (name, parameter.grad)
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        ]
        norms = torch.stack([whole(grad.norm()) for _, grad in named])
        top = norms.topk(min(self.num_grads_log, len(named)))
        for norm, index in zip(top.values, top.indices.tolist(), strict=True):
            pl_module.log(f"grad_norm/{named[index][0]}", norm)
