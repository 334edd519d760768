"""Randomness as a pure function of the run's seed and the position in the run."""

import functools
import random
from typing import NamedTuple

import lightning
import numpy as np
import torch
from omegaconf import DictConfig

from training.row_streams import RowStream


def seed_all(seed: int) -> None:
    """Sets the global random states of torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Dealt(NamedTuple):
    """How rows are dealt out to ranks and batches."""

    num_ranks: int  # W
    batch_size: int  # b in training
    eval_batch_size: int  # b in validation
    accumulate: int  # micro-batches of an update
    is_published: bool  # whether ranks take rows in turn


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

    # ---- what is drawn for a row: by its index, however rows are dealt out

    def row_indices(self, batch_size: int, batch_idx: int) -> range:
        """Where the rows of a batch of this rank are in the global batch of the update;
        in validation, among all rows of the split.

        Micro-batch m of all W ranks is the slice [m W b, (m + 1) W b), as in the orders
        of `dataloader`: rank r has the r-th b of it. With `algo.compat=reference` it
        has, in training, every W-th row from the r-th on.
        """
        W, of_training, of_validation, accumulate, is_published = self._dealt
        rank, b = self.global_rank, of_training if self.training else of_validation
        micro = batch_idx % accumulate if self.training else batch_idx
        first = micro * W * b
        if self.training and is_published:
            return range(first + rank, first + rank + W * batch_size, W)
        return range(first + rank * b, first + rank * b + batch_size)

    @functools.cached_property
    def _dealt(self) -> Dealt:
        """Read once: a setting that follows from others takes long to look up."""
        loader, trainer = self.config.loader, self.config.trainer
        return Dealt(
            trainer.devices * trainer.num_nodes,
            loader.batch_size,
            loader.eval_batch_size,
            trainer.accumulate_grad_batches,
            self.config.algo.compat == "reference",
        )

    def row_stream(self, purpose: str, rows: range) -> RowStream:
        """Draws of rows at this update. Those of validation do not depend on the
        update, so that every validation of a run sees the same noise."""
        return RowStream([self.config.seed, *self._position(purpose)], rows)

    def shared_generator(self, purpose: str) -> torch.Generator:
        """For what is drawn once for all rows of an update, on the host; of validation
        as for `row_stream`."""
        return next(self.row_stream(purpose, range(1)).generators())

    def _position(self, purpose: str) -> list[int]:
        if self.training:
            return [*f"train/{purpose}".encode(), self.global_step]
        return [*f"valid/{purpose}".encode()]
