"""The life of a model that learns from a teacher: when the teacher changes, and what of
it is saved and restored.
"""

import posixpath
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from checkpoints.about import ALIKE, own_algorithms
from checkpoints.checkpoint import Checkpoint
from data.marks import OTHER, compared, tokenizer_mark
from distillation.teacher import RoundCounter, Teacher
from metrics.likelihood import Likelihood
from models.flops import Passes
from models.head import Loss
from models.network import Network
from trainer_base import TrainerBase
from training.identity import data_marks
from utils import ConfigError

TOKENIZER = "data.tokenizer_name_or_path"


class Student(TrainerBase):
    """A model with a teacher, which changes at the start of every round.

    The teacher of a round is the student as it is when the round begins. An objective
    whose teacher comes from elsewhere gives another `renew_teacher` and
    `restore_teacher`; one with the same teacher all along has a single round.

    A subclass sets `rounds` and `teacher`, and gives `distillation_loss`, the loss of
    training. Validation reports the bound of the likelihood, and that loss under its
    own name.
    """

    needs_weights = True
    takes_labels = False
    has_blocks = False
    rounds: RoundCounter
    teacher: Teacher

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.valid_distillation = Likelihood()

    def networks(self) -> list[Network]:
        """The teacher's, too."""
        return [*super().networks(), self.teacher.prepared()]

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        raise ConfigError(
            f"training.flops={config.training.flops}: what the teacher of algo="
            f"{config.algo.name} takes is not counted; give trainer.max_steps instead."
        )

    def distillation_loss(self, batch: Mapping[str, Tensor], batch_idx: int) -> Loss:
        """What the student minimises, of a batch as `loss` takes it."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> Loss:
        """That of the distillation in training, the bound of the likelihood else."""
        if self.training:
            return self.distillation_loss(batch, batch_idx)
        return super().loss(batch, batch_idx)

    def check_weights(self, checkpoint: Checkpoint, key: str) -> Mapping[str, Tensor]:
        """Refuses also weights that mean something else than the student's."""
        if self.config.mode == "train":
            self.refuse_other_kind(checkpoint, key)
        return super().check_weights(checkpoint, key)

    def refuse_other_kind(self, checkpoint: Checkpoint, key: str) -> None:
        """Refuses a checkpoint that says that it cannot be a teacher."""
        if found := self._other_kind(checkpoint):
            where = f"{key}={OmegaConf.select(self.config, key)!r}"
            raise ConfigError(
                f"{where} cannot be the teacher of algo={self.config.algo.name}: it "
                f"has {found}."
            )

    def _other_kind(self, checkpoint: Checkpoint) -> str | None:
        """What a checkpoint says of its network that the student's is not."""
        algo, name = self.config.algo, checkpoint.setting("algo.name")
        alike = any({name, algo.name} <= names for names in ALIKE)
        if name != algo.name and name in own_algorithms() and not alike:
            return f"algo={name}"
        conditioning = checkpoint.setting("algo.time_conditioning")
        if conditioning not in (None, algo.time_conditioning):
            return (
                f"algo.time_conditioning={conditioning}, the student has "
                f"{algo.time_conditioning}"
            )
        theirs = checkpoint.setting(TOKENIZER)
        ours = OmegaConf.select(self.config, TOKENIZER)
        mark = data_marks(checkpoint).get("tokenizer")
        if mark is not None:
            is_other = compared(mark, tokenizer_mark(self.tokenizer)) == OTHER
        else:  # a folder of the same name has the same one
            names = [posixpath.basename(str(x)) for x in (theirs, ours)]
            is_other = theirs is not None and names[0] != names[1]
            is_other &= ours != checkpoint.source  # the one in its folder
        return f"{TOKENIZER}={theirs}, the student has {ours}" if is_other else None

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

    def train_results(self) -> dict[str, Tensor]:
        return {"train/distillation_loss": self.train_likelihood.compute()["nll"]}

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.teacher.is_there:
            losses = self.distillation_loss(batch, batch_idx)
            self.valid_distillation.update(losses.nlls, losses.num_tokens)

    def on_validation_epoch_end(self) -> None:
        if self.teacher.is_there:
            loss = self.valid_distillation.compute()["nll"]
            self.log("val/distillation_loss", loss, sync_dist=True)
            self.valid_distillation.reset()
        super().on_validation_epoch_end()

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
