"""All processes of a run train the same, or none does.

Before anything is trained every process tells the others where it goes on, what it
trains and on which data, and what keeps it from doing so. If they disagree, all of them
end with the same line; one that ended alone would have the others wait for it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from omegaconf import DictConfig

from training.identity import DATA, NAME, record_of
from training.processes import has_others, num_processes
from training.resume import Resumed
from utils import ConfigError


class Agreement(lightning.Callback):
    """Brings the processes together when training begins, and has checkpoints hold what
    they agree on.

    Args:
        config: The run's.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._problem: str | None = None
        self._start = "at step 0"
        self._weights = ""  # a mark of those that training goes on with
        self._record: dict[str, Any] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keeps a mistake for later, if other processes would wait for this one."""
        try:
            yield
        except ConfigError as error:
            if not has_others(self._config):
                raise
            self._problem = self._problem or str(error)

    def begin(self, resumed: Resumed | None, data: dict[str, str]) -> None:
        """Notes what this process would do.

        Args:
            resumed: Where training goes on.
            data: Marks of tokenizer and rows, by names of `identity.DATA`.
        """
        self._record = record_of(self._config, data)
        if resumed is not None:
            checkpoint = resumed.checkpoint
            self._start = f"from step {checkpoint.step} of {resumed.path}"
            if num_processes(self._config) > 1:
                self._weights = f"{checkpoint.step} {mark_of(checkpoint.weights or {})}"

    def setup(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, stage: str
    ) -> None:
        if stage != "fit" or trainer.world_size == 1:
            return
        own = (self._problem, self._start, self._weights, self._record)
        ranks: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(ranks, own)
        if line := disagreement(ranks):
            raise ConfigError(line)

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        if self._record:
            checkpoint[NAME] = self._record


def mark_of(weights: Mapping[str, torch.Tensor]) -> str:
    """What tells weights from others, from a few values of each."""
    total = hashlib.sha256()
    for name, value in sorted(weights.items()):
        some = value.detach().cpu().flatten()[:16].double()
        total.update(f"{name} {tuple(value.shape)} {some.tolist()}".encode())
    return total.hexdigest()


def disagreement(ranks: list[Any]) -> str | None:
    """The line with which all processes end; None if they agree.

    Args:
        ranks: Problem, start, mark of the weights and record of every process.
    """
    number = len(ranks)
    for rank, (problem, *_) in enumerate(ranks):
        if problem is not None:
            return f"{problem} (process {rank} of {number})"
    first, *others = ranks
    for rank, other in enumerate(others, 1):
        if line := _differences(rank, first[1:], other[1:]):
            return f"the {number} processes of this run disagree on {line}"
    return None


def _differences(rank: int, first: tuple[Any, ...], other: tuple[Any, ...]) -> str:
    """On what a process disagrees with the first one, and what to do."""
    start, weights, record = first
    other_start, other_weights, other_record = other
    if other_weights != weights:
        return (
            f"what to resume: process 0 would go on {start}, process {rank} "
            f"{other_start}. Give hydra.run.dir or checkpointing.save_dir a folder "
            "that all nodes see, or put the same checkpoints on every node."
        )
    for part in ("settings", "course"):
        ours, theirs = record[part], other_record[part]
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                return (
                    f"{key}: process 0 has {ours.get(key)!r}, process {rank} "
                    f"{theirs.get(key)!r}. Give all nodes the same command."
                )
    for name, what in DATA.items():
        if other_record["data"].get(name) != record["data"].get(name):
            return (
                f"{what}: process {rank} has other ones than process 0. Put the same "
                "files on every node."
            )
    return ""
