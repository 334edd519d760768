"""When a round of distillation begins, how large its time gap is, and which network its
teacher is.
"""

import hashlib

import torch
from omegaconf import DictConfig
from torch import nn

from utils import ConfigError, require


class Rounds:
    """Time gap dt and round of the teacher, by step.

        n = step // update_teacher_every,  dt = 2^n / T

    as long as dt <= 1; training stays in the last such round. With linear growth dt
    goes from linear_growth_min to linear_growth_max over trainer.max_steps.
    """

    def __init__(self, config: DictConfig) -> None:
        self.T: int = config.algo.T
        self.length: int = config.algo.update_teacher_every
        self.is_linear: bool = config.algo.linear_growth_dt
        self.bounds = config.algo.linear_growth_min, config.algo.linear_growth_max
        self.max_steps: int = config.trainer.max_steps
        self.last = None if self.is_linear else self.T.bit_length() - 1

    @staticmethod
    def validate_config(config: DictConfig) -> None:
        """Refuses gaps that are none."""
        algo = config.algo
        require(algo.linear_growth_dt, (True, False), "algo.linear_growth_dt")
        if not algo.linear_growth_dt and algo.T < 1:
            raise ConfigError(f"algo.T={algo.T}: the first time gap is 1 / T; T >= 1.")
        low, high = algo.linear_growth_min, algo.linear_growth_max
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"algo.linear_growth_min={low}, algo.linear_growth_max={high}: the "
                "time gap must grow within (0, 1]."
            )

    def number(self, step: int) -> int:
        """n, from 0."""
        number = step // self.length
        return number if self.last is None else min(number, self.last)

    def start(self, number: int) -> int:
        """The first step of a round."""
        return number * self.length

    def gap(self, step: int) -> float:
        """dt, in (0, 1]."""
        if self.is_linear:
            low, high = self.bounds
            return min(low + step / self.max_steps * (high - low), high)
        return 2 ** self.number(step) / self.T


def digest(network: nn.Module) -> str:
    """A fingerprint of a network's weights."""
    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        total.update(name.encode())
        total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
