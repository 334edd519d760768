"""What becomes of updates whose loss or gradients are not finite.

Such an update is left out on the device itself, so that no weight, moment or average
ever takes it up. The host learns of it without a wait: on CUDA when the next update has
been queued, elsewhere at once; and in any case before a checkpoint is written and
before a validation.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from models.ema import ExponentialMovingAverage
from models.finite import summary
from training.resume import checkpoint_files
from utils import NotFinite

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

LEFT_OUT = 20  # most updates in a row that are left out before training stops


class Update(NamedTuple):
    """What the host is told of an update."""

    step: int  # that it leads to
    loss: float  # summed over its micro-batches and ranks, nats per token
    norm: float  # of its gradients before clipping

    def complaint(self) -> str | None:
        """What is not finite; None: all is."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if not math.isfinite(self.norm):
            return f"the norm of the gradients is {self.norm}"
        return None


class Updates:
    """Updates on their way from the device to the host."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def note(self, step: int, values: Tensor) -> None:
        """Sends loss and norm, (2,), on their way; waits for nothing on CUDA."""
        if values.device.type != "cuda":
            self._pending.append((step, values.cpu(), None))
            return
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))

    def arrived(self, everything: bool = False) -> Iterator[Update]:
        """Those that the host may know of, each once, in order.

        Args:
            everything: Whether to wait for the newest one, too.
        """
        while self._pending:
            step, values, event = self._pending[0]
            if event is not None:
                if len(self._pending) == 1 and not everything:
                    return
                event.synchronize()
            self._pending.popleft()
            yield Update(step, *values.tolist())


def leave_out(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Has the next step of an optimiser change nothing where `is_bad`, a scalar, holds.

    Fused optimisers look at it on the device; others have the host wait for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # What `torch.amp.GradScaler` sets, too; 1 leaves the step out.
        vars(optimizer)["found_inf"] = is_bad.float()
    elif is_bad:
        optimizer.zero_grad(set_to_none=True)


class FiniteTraining(lightning.LightningModule):
    """Stops training, or leaves updates out, as `training.nonfinite` says."""

    config: DictConfig
    ema: ExponentialMovingAverage | None
    bound: str  # what begins the names of a validation's likelihood

    def __init__(self) -> None:
        super().__init__()
        self._updates = Updates()
        self._num_left_out = 0  # updates in a row
        self._is_in_doubt = False
        self._losses: Tensor | None = None  # of the micro-batches since the last update

    def note_loss(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch to those of its update."""
        loss = loss.detach()
        self._losses = loss if self._losses is None else self._losses + loss

    def judge_update(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Has an update whose numbers are not finite left out, on all ranks.

        Args:
            optimizer: About to step.
            norm: Of the gradients, the same on all ranks.
        """
        losses, self._losses = self._losses, None
        losses = torch.zeros_like(norm) if losses is None else losses
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(losses)
        values = torch.stack([losses, norm.to(losses)])
        leave_out(optimizer, ~values.isfinite().all())
        self._updates.note(self.global_step + 1, values)

    def check_updates(self, everything: bool = False) -> None:
        """Answers to updates that were left out; all ranks call this.

        Args:
            everything: Whether to wait for the newest update.

        Raises:
            NotFinite: If training has to stop.
        """
        for update in self._updates.arrived(everything):
            what = update.complaint()
            self._num_left_out = 0 if what is None else self._num_left_out + 1
            # With float16 gradients overflow now and then; the scaler answers to that.
            is_scaled = self._has_scaler() and math.isfinite(update.loss)
            self._is_in_doubt = what is not None and not is_scaled
            if what is None:
                continue
            if self._num_left_out > LEFT_OUT:
                raise self.diverged(update.step, f"{what}, as in {LEFT_OUT} before")
            if self._is_in_doubt:
                self.answer(update.step, what, self._num_left_out)

    def is_in_doubt(self) -> bool:
        """Whether the last update was left out: the weights may be of no use."""
        self.check_updates(everything=True)
        return self._is_in_doubt

    def check_weights_finite(self) -> None:
        """Refuses to write a checkpoint with weights that are not finite.

        Raises:
            NotFinite: On all ranks.
        """
        self.check_updates(everything=True)
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        if self.ema is not None:
            tensors |= {f"EMA {i}": x for i, x in enumerate(self.ema.shadow_params)}
        found = summary(tensors)
        if getattr(self._trainer, "world_size", 1) > 1:  # shards differ
            strategy = self.trainer.strategy
            if strategy.reduce_boolean_decision(found is None):
                return
            found = found or "those of another process"
        if found is not None:
            raise self.diverged(self.global_step, f"weights are not finite ({found})")

    def check_validation(self, nll: float) -> bool:
        """Whether the likelihood that a validation has found is finite.

        Raises:
            NotFinite: If it is not, unless training leaves out what is not finite.
        """
        if math.isfinite(nll):
            return True
        what = f"{self.bound}nll is {nll}"
        if self.trainer.state.fn != "fit":
            raise NotFinite(f"{what}, so there are no numbers: the network overflows.")
        self.answer(self.global_step, what)
        return False

    def diverged(self, step: int, what: str) -> NotFinite:
        """The end of training at a step, in one line."""
        files = checkpoint_files(f"{self.config.checkpointing.save_dir}/checkpoints")
        good = f"the last good checkpoint is {files[0]}" if files else "there is none"
        return NotFinite(
            f"step {step}: {what}. Training has stopped before any checkpoint was "
            f"overwritten; {good}. A lower optim.lr or trainer.gradient_clip_val may "
            f"help; training.nonfinite=skip leaves out up to {LEFT_OUT} such updates "
            "in a row."
        )

    def answer(self, step: int, what: str, number: int | None = None) -> None:
        """Stops training, or warns, where something is not finite; on all ranks.

        Args:
            step: Where.
            what: Is not finite, and which value it has.
            number: Of the update among those that are left out in a row.
        """
        if self.config.training.nonfinite == "stop":
            raise self.diverged(step, what)
        if number is None:
            warn("step %d: %s", step, what)
        else:
            left = f"the update is left out ({number} in a row of at most {LEFT_OUT})"
            warn("step %d: %s; %s", step, what, left)

    def _has_scaler(self) -> bool:
        plugin: Any = self.trainer.precision_plugin
        return getattr(plugin, "scaler", None) is not None
