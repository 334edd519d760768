"""Randomness as a pure function of the run's seed and the position in the run."""

import random

import lightning
import numpy as np
import torch
from omegaconf import DictConfig


def seed_all(seed: int) -> None:
    """Sets the global random states of torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Randomness(lightning.LightningModule):
    """Generators of a model: no random state is kept, so none has to be saved."""

    config: DictConfig

    def seed(self, purpose: str, *position: int) -> int:
        """A seed that depends on the run's, on `purpose` and `position` only."""
        entropy = [self.config.seed, *purpose.encode(), *position]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        return seed % 2**63

    def generator(
        self, purpose: str, *position: int, device: torch.device | str | None = None
    ) -> torch.Generator:
        """A generator with that seed."""
        generator = torch.Generator(device or self.device)
        return generator.manual_seed(self.seed(purpose, *position))

    def _batch_generator(
        self, purpose: str, batch_idx: int, device: torch.device | str | None = None
    ) -> torch.Generator:
        """Draws for one batch of one rank. Those of validation do not depend on the
        step, so that every validation of a run sees the same noise."""
        if self.training:
            training = (self.global_step, batch_idx, self.global_rank)
            return self.generator(f"train/{purpose}", *training, device=device)
        validation = (batch_idx, self.global_rank)
        return self.generator(f"valid/{purpose}", *validation, device=device)
