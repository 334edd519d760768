"""The Lightning trainer of every mode."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
import lightning
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import (
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from training.joining import Joining
from training.lightning_state import (
    leave_signals_alone,
    meet_saving_ranks,
    signal_children,
)
from training.progress import Progress, ProgressBar, is_watched
from utils import ConfigError, NotFinite, RunStopped, SignalReceived


class Trainer(lightning.Trainer):
    """Lightning's, of which all ranks end in the same way if one cannot write.

    Every checkpoint of a run is written by `save_checkpoint`, whichever callback or
    algorithm asks for it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        leave_signals_alone(self)

    def fit(self, *args: Any, **options: Any) -> None:
        """Trains.

        Raises:
            ConfigError: If settings contradict each other, or the data.
        """
        try:
            super().fit(*args, **options)
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {error}") from None
        except ValueError as error:
            if "`val_check_interval`" not in str(error):
                raise
            raise ConfigError(
                f"trainer.val_check_interval={self.val_check_interval} is more than an "
                "epoch has batches: give 1.0 for a validation at its end, or leave out "
                "trainer.check_val_every_n_epoch."
            ) from None

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Writes a checkpoint; all ranks call this.

        Raises:
            RunStopped: On all ranks, if that of rank 0 cannot write.
        """
        with stopping_together(self, lambda: meet_saving_ranks(self)):
            super().save_checkpoint(*args, **options)


@contextmanager
def stopping_together(
    trainer: lightning.Trainer, meet: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Stops all ranks where rank 0 has to stop.

    Args:
        trainer: Of a run whose ranks all come here.
        meet: Joins the others where they wait for a rank that has failed.

    Raises:
        RunStopped: On all ranks, as on rank 0.
    """
    problem = None
    try:
        yield
    except NotFinite:  # on all ranks alike
        raise
    except RunStopped as error:
        problem = str(error)
        meet()
    if problem := trainer.strategy.broadcast(problem):
        raise RunStopped(problem, can_go_on=True)


def build_trainer(
    config: DictConfig,
    *,
    callbacks: list[lightning.Callback],
    logger: list[Logger],
    plugins: Sequence[Any] = (),
) -> lightning.Trainer:
    """The Lightning trainer of every mode."""
    alone = config.trainer.devices * config.trainer.num_nodes == 1
    if alone and config.strategy._target_.endswith(".DDPStrategy"):
        strategy = "auto"  # one process needs no process group; Apple GPUs have none
    else:
        strategy = hydra.utils.instantiate(config.strategy)
        if not alone:
            callbacks = [*callbacks, Joining(config, strategy)]
    precision = str(config.trainer.precision)
    is_shown = config.trainer.get("enable_progress_bar", True)
    has_bar = is_shown and is_watched()
    callbacks = [*callbacks, Progress(counts=is_shown and not has_bar)]
    if has_bar:
        callbacks.append(ProgressBar())
    if is_srun():  # RunEnd does what its own handlers would
        plugins = [*plugins, SLURMEnvironment(auto_requeue=False)]
    every = config.trainer.val_check_interval
    if type(every) is int and config.trainer.check_val_every_n_epoch is None:
        every *= config.trainer.accumulate_grad_batches  # Lightning counts batches
    return hydra.utils.instantiate(
        config.trainer,
        plugins=list(plugins),
        val_check_interval=every,
        precision={"bf16": "bf16-mixed", "16": "16-mixed"}.get(precision, precision),
        default_root_dir=os.getcwd(),
        enable_progress_bar=has_bar,
        enable_model_summary=config.trainer.get("enable_model_summary", False),
        strategy=strategy,
        callbacks=[*callbacks, Children()],
        logger=logger,
        use_distributed_sampler=False,
        _convert_="all",
    )


def is_srun() -> bool:
    """Whether tasks of Slurm's are the processes; not where they start torchrun."""
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


class Children(lightning.Callback):
    """Ends the processes that this one has started, if it ends alone."""

    def on_exception(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        error: BaseException,
    ) -> None:
        if isinstance(error, SignalReceived):
            signal_children(trainer, error.number)
        elif not isinstance(error, RunStopped):  # which all ranks raise
            signal_children(trainer, signal.SIGTERM)
