"""Checkpoints of a run that may stop at any time: written whole or not at all, bounded
in number, and one more when a signal asks the run to end.
"""

import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, cast

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from checkpoints.reading import read_checkpoint
from training.resume import KEY, Resumed
from training.trainer import stopping_together
from utils import (
    PARTIAL,
    STOP_SIGNALS,
    RunStopped,
    SignalReceived,
    copy_file,
    filesystem_of,
    first_line,
    whole_file,
)

log = logging.getLogger(__name__)


class CheckpointFiles(CheckpointIO):
    """How Lightning writes and reads checkpoints: atomically, without executing code.

    Args:
        resumed: A checkpoint that has been read already.
        trusted: As for `read_checkpoint`.
    """

    def __init__(
        self, resumed: Resumed | None = None, trusted: tuple[str, ...] = ()
    ) -> None:
        self._resumed = resumed
        self._trusted = trusted

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes to a local or fsspec path.

        Raises:
            RunStopped: If it cannot; what was there is still there.
        """
        with write_or_stop(str(path)), whole_file(str(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        resumed, self._resumed = self._resumed, None  # memory is free afterwards
        if resumed is not None and resumed.path == str(path):
            return resumed.checkpoint.lightning
        return read_checkpoint(str(path), KEY, self._trusted).lightning

    def remove_checkpoint(self, path: Any) -> None:
        filesystem, inner = filesystem_of(str(path))
        if filesystem.exists(inner):
            filesystem.rm(inner)


@contextmanager
def write_or_stop(path: str) -> Iterator[None]:
    """Turns a failure to write into one line.

    Raises:
        RunStopped: If there is no space, no permission, no connection.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            # torch says "unexpected pos" in the place of what was wrong
            reason = reason.__cause__ or reason.__context__
        if reason is None:
            raise
        raise RunStopped(
            f"{path} cannot be written: {first_line(reason)}. Training has stopped; "
            "the checkpoints that were there are as they were",
            can_go_on=True,
        ) from None


def save_checkpoint(trainer: lightning.Trainer, path: str, *copies: str) -> None:
    """Writes a checkpoint, and copies of it. All ranks call this.

    Raises:
        RunStopped: On all ranks, if that of rank 0 cannot write.
    """
    trainer.save_checkpoint(path, weights_only=False)
    with stopping_together(trainer):
        for copy in copies:
            with write_or_stop(copy):
                rank_zero_only(copy_file)(path, copy)


class Doubtful(Protocol):
    """What is asked of a model before its checkpoint is written."""

    def is_in_doubt(self) -> bool:
        """Whether its weights may be of no use."""


class CheckpointEveryNSteps(CheckpointCallback):
    """Writes EPOCH-STEP.ckpt and last.ckpt every so many updates.

    Args:
        dirpath: Folder, local or behind fsspec.
        every_n_train_steps: Updates between checkpoints; 0 writes none.
        save_top_k: How many EPOCH-STEP.ckpt to keep, the newest; -1 keeps all.
        save_last: Whether to write last.ckpt, too.
        verbose: Whether to log each one.
        auto_insert_metric_name: Whether names are epoch=E-step=S.ckpt.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int = 500,
        save_top_k: int = 2,
        save_last: bool = True,
        verbose: bool = False,
        auto_insert_metric_name: bool = False,
    ) -> None:
        self.dirpath = dirpath
        self.every_n_train_steps = every_n_train_steps
        self.save_top_k = save_top_k
        self.save_last = save_last
        self.verbose = verbose
        self.name = "epoch={}-step={}.ckpt" if auto_insert_metric_name else "{}-{}.ckpt"
        self._written: list[str] = []  # names that this run has given, the kept ones
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._clean()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step  # stands still while gradients accumulate
        if step == self._step:
            return
        self._step = step
        if not self.every_n_train_steps or step % self.every_n_train_steps:
            return
        if cast(Doubtful, model).is_in_doubt():  # every algorithm has it
            rank_zero_info("step %d: no checkpoint, the update was left out", step)
        else:
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # what is logged of the steps before the checkpoint
        name = self.name.format(trainer.current_epoch, trainer.global_step)
        names = [name] * (self.save_top_k != 0) + ["last.ckpt"] * self.save_last
        if self.save_top_k != 0:
            self._written = [x for x in self._written if x != name] + [name]
        if names:
            save_checkpoint(trainer, *(f"{self.dirpath}/{x}" for x in names))
        if self.save_top_k > 0:
            for old in self._written[: -self.save_top_k]:
                trainer.strategy.remove_checkpoint(f"{self.dirpath}/{old}")
            self._written = self._written[-self.save_top_k :]
        if self.verbose:
            wrote = " and ".join(names)
            rank_zero_info("step %d: wrote %s", trainer.global_step, wrote)

    def _clean(self) -> None:
        """Removes what a killed process has left half-written."""
        filesystem, inner = filesystem_of(self.dirpath)
        if not filesystem.exists(inner):
            return
        for path in filesystem.ls(inner, detail=False):
            if re.search(rf"\.ckpt\.\d+{re.escape(PARTIAL)}$", path):
                filesystem.rm(path)

    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the names in a checkpoint that are of the kind it gives itself.

        They are of files in its folder; whatever else is named is not its own.
        """
        given = re.escape(self.name).replace(r"\{\}", r"\d+")
        names = [x for x in state["written"] if isinstance(x, str)]
        self._written = [x for x in names if re.fullmatch(given, x, re.ASCII)]


def without_missing(
    callbacks: list[lightning.Callback], bound: str
) -> list[lightning.Callback]:
    """The callbacks, but for one that waits for a likelihood under another name.

    Args:
        callbacks: Of the config.
        bound: What begins the names of the likelihood of the run's validations.
    """
    found = [
        callback
        for callback in callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor == "val/nll"
    ]
    if bound == "val/" or not found:
        return callbacks
    rank_zero_info("no best.ckpt: a validation of this algorithm has no val/nll")
    return [callback for callback in callbacks if callback not in found]


class Validated(Protocol):
    """What the end of a run asks of a model in the middle of a validation."""

    def leave_validation(self) -> None:
        """Puts back the weights that training goes on with."""


class RunEnd(CheckpointCallback):
    """Writes last.ckpt where a run ends: after its last update, or where a signal
    asks it to end, after an update or a batch of a validation.

    SIGTERM is what Slurm sends before it preempts or requeues a job, SIGUSR1 what
    `sbatch --signal=USR1@120` sends before the time limit; after the latter the job is
    put into the queue again. SIGINT is Ctrl-C; a second one ends at once. Samples of a
    validation, which may take minutes, are cut off where there is one process.

    Args:
        path: Of last.ckpt.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._received = 0
        self._step = 0
        self._saved = -1  # step
        self._num_valid_batches = 0
        self._may_cut_off = False  # here and now: samples are drawn
        self._group: dist.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}

    # ---- what is received

    def on_train_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._step = self._saved = trainer.global_step
        self._listen(trainer)

    def _listen(self, trainer: lightning.Trainer) -> None:
        if self._handlers:
            return
        for number in STOP_SIGNALS:  # in the place of Lightning's own handlers
            self._handlers[number] = signal.signal(number, self._receive)
        if trainer.world_size > 1:  # on the host: does not wait for the device
            self._group = dist.new_group(backend="gloo")

    def teardown(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, stage: str
    ) -> None:
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers, self._group = {}, None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received:
                raise SignalReceived(number)
            os.write(2, b"\nsaving after this update; Ctrl-C again ends at once\n")
        self._received = number
        if self._may_cut_off:
            raise SignalReceived(number)

    def _agreed(self) -> int:
        """The signal that any rank has received, the same number on all ranks."""
        return self._of_ranks(self._received, dist.ReduceOp.MAX)

    def _of_ranks(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        total = torch.tensor(number)
        if self._group is not None:
            dist.all_reduce(total, operation, self._group)
        return int(total)

    # ---- where a run may end

    def on_train_batch_end(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, *args: Any
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients accumulate
        self._step = trainer.global_step
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            self._save(trainer)
        elif number := self._agreed():
            self._stop(trainer, number)

    def on_train_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if self._saved != trainer.global_step:  # max_epochs, max_time and such
            self._save(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._num_valid_batches = 0
        if not trainer.sanity_checking:
            self._listen(trainer)
            batches = int(sum(trainer.num_val_batches))  # ranks may have one more
            self._num_valid_batches = self._of_ranks(batches, dist.ReduceOp.MIN)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx >= self._num_valid_batches:
            return
        if number := self._agreed():
            cast(Validated, model).leave_validation()  # every algorithm has it
            self._stop(trainer, number)
        is_last = batch_idx == self._num_valid_batches - 1
        self._may_cut_off = is_last and trainer.world_size == 1

    def on_validation_epoch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self._may_cut_off = False

    def on_exception(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        error: BaseException,
    ) -> None:
        is_cut_off, self._may_cut_off = self._may_cut_off, False
        if is_cut_off and isinstance(error, SignalReceived):
            cast(Validated, model).leave_validation()
            if trainer.state.fn == "fit":
                self._save(trainer)
        self._listen_no_more()  # there is no teardown behind an exception

    def _save(self, trainer: lightning.Trainer) -> None:
        save_checkpoint(trainer, self.path)
        self._saved = trainer.global_step

    def _stop(self, trainer: lightning.Trainer, number: int) -> None:
        if trainer.state.fn == "fit":  # else there is no step that is not saved
            self._save(trainer)
        name, step = signal.Signals(number).name, trainer.global_step
        if name == "SIGUSR1":
            if slurm_job():  # requeued: its SIGTERM comes too late
                self._handlers[signal.SIGTERM] = signal.SIG_IGN
            requeue()
        raise RunStopped(
            f"stopped by {name} after step {step}; {KEY}={self.path} is of that step",
            status=128 + number,
        )


def slurm_job() -> str:
    """The Slurm job that this process is of, as scontrol calls it; else nothing."""
    array = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    names = array if array[0] in os.environ else ("SLURM_JOB_ID",)
    return "_".join(os.environ.get(name, "") for name in names)


@rank_zero_only
def requeue() -> None:
    """Puts the Slurm job that this process is of into the queue again."""
    job = slurm_job()
    if not job or not shutil.which("scontrol"):
        return
    done = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, text=True, check=False
    )
    if done.returncode:
        log.warning("scontrol requeue %s: %s", job, done.stderr.strip())
