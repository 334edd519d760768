"""What a run says of itself while it goes: a bar on a terminal, a line now and then
where nobody sees a bar, and a line for every validation.
"""

import datetime
import logging
import math
import sys
import time
from typing import Any, Protocol, cast

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm.auto import tqdm

from metrics.numbers import measured
from training.sample_logging import SampleLogging

log = logging.getLogger(__name__)

# Seconds between two lines: a tenth of those that have passed, within these.
LEAST, MOST = 5.0, 600.0
SHOWN = 100  # characters of a sample on the way


class Measured(Protocol):
    """What a line of a validation is made of; every algorithm is one."""

    bound: str  # before the names of the likelihood
    valid_results: dict[str, Any]


def is_watched() -> bool:
    """Whether a bar that overwrites itself is seen as one."""
    return sys.stderr.isatty()


class ProgressBar(TQDMProgressBar):
    """Counts the updates of the whole run where their number is known, however short or
    long an epoch is, and is drawn with the first update and then twice a second."""

    INTERVAL = 0.5  # seconds

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._drawn = -math.inf  # when, in seconds

    def _is_due(self, is_last: bool = False) -> bool:
        now = time.monotonic()
        if not is_last and now - self._drawn < self.INTERVAL:
            return False
        self._drawn = now
        return True

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        if self.trainer.max_steps >= 0:
            bar = self.train_progress_bar
            bar.total = self.trainer.max_steps
            bar.initial = bar.n = self.trainer.global_step  # of a run that goes on

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.max_steps < 0:
            super().on_train_epoch_start(trainer, *args)
        else:
            bar = self.train_progress_bar
            bar.set_description(f"epoch {trainer.current_epoch}", refresh=False)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, *args: Any
    ) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if not self._is_due(step == trainer.max_steps):
            return
        if trainer.max_steps < 0:
            super().on_train_batch_end(trainer, model, *args)
            return
        bar.n = step
        bar.set_postfix(self.get_metrics(trainer, model))

    def on_train_epoch_end(self, *args: Any) -> None:
        if self.trainer.max_steps < 0:
            super().on_train_epoch_end(*args)

    def on_validation_batch_end(self, *args: Any) -> None:
        if self._is_due():
            super().on_validation_batch_end(*args)

    def on_predict_batch_end(self, *args: Any) -> None:
        if self._is_due():
            super().on_predict_batch_end(*args)

    def get_metrics(
        self, trainer: lightning.Trainer, model: lightning.LightningModule
    ) -> dict[str, Any]:
        """The loss; the number of a logger's version tells nobody anything."""
        metrics = super().get_metrics(trainer, model)
        metrics.pop("v_num", None)
        return {name.removeprefix("trainer/"): x for name, x in metrics.items()}


class Progress(lightning.Callback):
    """Lines in the log: of the run, of updates, of validations.

    Args:
        counts: Whether there are lines of updates, which a bar replaces.
    """

    def __init__(self, counts: bool) -> None:
        self.counts = counts
        self._begun = self._due = 0.0
        self._first = self._seen = 0

    def on_train_start(
        self, trainer: lightning.Trainer, model: lightning.LightningModule
    ) -> None:
        self._begun, self._due = time.monotonic(), 0.0
        self._first = self._seen = trainer.global_step
        trained = [x for x in model.parameters() if x.requires_grad]
        number, devices = sum(x.numel() for x in trained), trainer.world_size
        where = model.device.type + (f", {devices} devices" if devices > 1 else "")
        goal = "" if trainer.max_steps < 0 else f" of {trainer.max_steps}"
        say(
            trainer,
            f"training {number:,} parameters on {where}, precision "
            f"{trainer.precision}, from step {self._first}{goal}",
        )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, *args: Any
    ) -> None:
        step, passed = trainer.global_step, time.monotonic() - self._begun
        if not self.counts or step == self._seen or passed < self._due:
            return  # gradients accumulate, or it is too early
        self._seen = step
        self._due = next_line(passed)
        say(trainer, self.line(trainer, passed))

    def line(self, trainer: lightning.Trainer, passed: float) -> str:
        """Where a run is, `passed` seconds after its start."""
        step, goal = trainer.global_step, trainer.max_steps
        rate = (step - self._first) / max(passed, 1e-9)
        loss = trainer.callback_metrics.get("trainer/loss")
        parts = [] if loss is None else [f"loss {float(loss):.4g}"]
        parts.append(f"{rate:.3g} steps/s")
        if goal > 0 and step - self._first > 1:  # the first one is slower than others
            left = datetime.timedelta(seconds=round((goal - step) / rate))
            parts.append(f"{left} left")
        return f"step {step}{f' of {goal}' if goal > 0 else ''}: {', '.join(parts)}"

    def on_predict_start(self, *args: Any) -> None:
        self._begun, self._due = time.monotonic(), LEAST

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count(trainer, "drew", batch_idx + 1, sum(trainer.num_predict_batches))

    def on_validation_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.state.fn != "fit":
            self._begun, self._due = time.monotonic(), LEAST

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit":
            total = sum(trainer.num_val_batches)
            self._count(trainer, "measured", batch_idx + 1, total)

    def _count(
        self, trainer: lightning.Trainer, what: str, done: int, total: float
    ) -> None:
        """A line of batches that are done, if it is time for one."""
        passed = time.monotonic() - self._begun
        if not self.counts or passed < self._due:
            return
        self._due = next_line(passed)
        left = datetime.timedelta(seconds=round((total - done) * passed / done))
        say(trainer, f"{what} batch {done} of {total}: {left} left")

    def on_validation_end(
        self, trainer: lightning.Trainer, model: lightning.LightningModule
    ) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return  # no result, or one that is reported whole
        one = cast(Measured, model)
        results = one.valid_results
        if results.get("step") != trainer.global_step:
            return  # it is not finite, of which there is another line
        names = [x for x in ("nll", "bpd", "ppl") if x in results]
        numbers = [
            f"{one.bound}{x} {measured(results[x], results.get(f'{x}_stderr'))}"
            for x in names
        ]
        for name in ("val/sample_entropy", "val/gen_ppl"):
            if name in trainer.callback_metrics:
                numbers.append(
                    f"{name} {measured(float(trainer.callback_metrics[name]))}"
                )
        say(trainer, f"step {trainer.global_step}: {', '.join(numbers)}")
        for one_of in cast(Any, trainer).callbacks:
            if isinstance(one_of, SampleLogging) and one_of.texts:
                say(trainer, f"a sample: {one_of.texts[0][:SHOWN]!r}")


def next_line(passed: float) -> float:
    """When the line after one is due, in seconds from the start."""
    return passed + min(max(passed / 10, LEAST), MOST)


def say(trainer: lightning.Trainer, line: str) -> None:
    """A line in the log, which no bar overwrites."""
    if trainer.is_global_zero:
        with tqdm.external_write_mode(file=sys.stdout):
            log.info(line)
