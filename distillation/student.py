"""The life of a model that learns from a teacher: when the teacher changes, and what of
it is saved and restored.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

from omegaconf import DictConfig
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from distillation.teacher import RoundCounter, Teacher
from trainer_base import TrainerBase
from utils import ConfigError


class Student(TrainerBase):
    """A model with a teacher, which changes at the start of every round.

    The teacher of a round is the student as it is when the round begins. An objective
    whose teacher comes from elsewhere gives another `renew_teacher` and
    `restore_teacher`; one with the same teacher all along has a single round.

    A subclass sets `rounds` and `teacher`, and gives the loss.
    """

    needs_weights = True
    rounds: RoundCounter
    teacher: Teacher

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        if "fsdp" in config.strategy._target_.lower():
            raise ConfigError(
                f"strategy=fsdp cannot hold the teacher of algo={config.algo.name}; "
                "choose strategy=ddp."
            )

    def renew_teacher(self, number: int) -> None:
        """Makes the student, as it is now, the teacher of a round, and writes its file.

        The weights are their EMA where `teacher.use_ema` asks for it.
        """
        ema = self.ema if self.teacher.use_ema else None
        with nullcontext() if ema is None else ema.applied(self.parameters()):
            self.teacher.take(self.backbone.state_dict(), number)
        self.teacher.write(self.trainer)

    def restore_teacher(self, number: int) -> None:
        """Takes up the teacher of a round in which the run was interrupted."""
        self.teacher.restore(number)

    def take_up_needed(self, checkpoint: Checkpoint) -> None:
        """The teacher of the round in which a run was interrupted, if it was in one."""
        super().take_up_needed(checkpoint)
        step, training = checkpoint.step or 0, checkpoint.lightning.get("training", {})
        number = self.rounds.number(step)
        if step == self.rounds.start(number):
            if not (step and training.get("validation_due")):
                return  # the round begins with a teacher of its own
            number = self.rounds.number(step - 1)
        self.teacher.expect(checkpoint.teacher or {})
        self.restore_teacher(number)

    # ---- Lightning's hooks

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to devices and types take the teacher along."""
        self.teacher.move(fn, recurse)
        return super()._apply(fn, recurse)

    def on_train_start(self) -> None:
        super().on_train_start()
        number = self.rounds.number(self.global_step)
        if self.global_step > self.rounds.start(number):  # resumed within a round
            self.restore_teacher(number)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """A new teacher for a new round, once, before its first micro-batch."""
        super().on_train_batch_start(batch, batch_idx)
        number = self.rounds.number(self.global_step)
        if number != self.teacher.round:
            self.renew_teacher(number)

    def on_validation_epoch_start(self) -> None:
        if self.validation_due:  # of an interrupted run, whose last step counts
            self.restore_teacher(self.rounds.number(self.global_step - 1))
        super().on_validation_epoch_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = self.teacher.state()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.teacher.expect(checkpoint.get("teacher", {}))
