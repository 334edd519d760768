"""Learning-rate schedules that configs name."""

import math

import torch
from torch import Tensor

from utils import ConfigError

# ---------------------------------------------------------------- learning rate


class CosineDecayWarmupLRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, half a cosine, then a floor; counted in optimiser updates.

    With W = warmup_t, D = t_initial, k the update and lr the base rate:

        k < W:          warmup_lr_init + k (lr - warmup_lr_init) / W
        W <= k < W + D: lr_min + (lr - lr_min) (1 + cos(pi (k - W) / D)) / 2
        otherwise:      lr_min

    Args:
        optimizer: Its `lr` is the peak.
        t_initial: Length D of the cosine, in updates.
        warmup_t: Length W of the warm-up, in updates.
        warmup_lr_init: Rate at update 0.
        lr_min: Floor.
        t_in_epochs: Must be False: the trainer steps once per update.
        warmup_prefix: True starts the cosine after the warm-up; False lets the
            warm-up replace the cosine's beginning.
        last_epoch: Update to resume after.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        t_initial: float,
        warmup_t: float = 0,
        warmup_lr_init: float = 0.0,
        lr_min: float = 0.0,
        t_in_epochs: bool = False,
        warmup_prefix: bool = True,
        last_epoch: int = -1,
    ) -> None:
        if t_in_epochs:
            raise ConfigError(
                "lr_scheduler.t_in_epochs=True: the schedule counts updates; "
                "choose False."
            )
        self.t_initial = t_initial
        self.warmup_t = warmup_t
        self.warmup_lr_init = warmup_lr_init
        self.lr_min = lr_min
        self.warmup_prefix = warmup_prefix
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [self._rate(lr, self.last_epoch) for lr in self.base_lrs]

    def _rate(self, lr: float | Tensor, k: float) -> float | Tensor:
        if k < self.warmup_t:
            return self.warmup_lr_init + k * (lr - self.warmup_lr_init) / self.warmup_t
        if self.warmup_prefix:
            k = k - self.warmup_t
        if k >= self.t_initial:
            return self.lr_min
        cosine = math.cos(math.pi * k / self.t_initial)
        return self.lr_min + 0.5 * (lr - self.lr_min) * (1 + cosine)


class LRHalveScheduler:
    """Factor for `LambdaLR`: linear warm-up, then halved every n_halve_steps.

    Args:
        warmup_steps: Updates until the factor reaches 1.
        n_halve_steps: Updates between halvings, counted from the warm-up's end.
    """

    def __init__(self, warmup_steps: int, n_halve_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.n_halve_steps = n_halve_steps

    def __call__(self, current_step: int) -> float:
        if current_step < self.warmup_steps:
            return current_step / self.warmup_steps
        return 0.5 ** ((current_step - self.warmup_steps) // self.n_halve_steps)
