"""Lightning's private and undocumented state: all that this project knows of it.

It was tested with lightning 2.6.6. All other versions are untested: where one of them
arranges its state in another way, this file is what has to follow, and
`tests/integration/test_resumed_runs.py` shows whether it does.

What is used here, and is not in Lightning's documentation:

- The entry `loops` of a checkpoint: the state of the loops over epochs and batches.
- Attributes of the trainer's loops, from which the position of a run is read.
- The trainer's `log_every_n_steps`, which its type does not declare.
- The barrier at which `Trainer.save_checkpoint` brings all ranks together.
- The function by which its loggers and callbacks find the file system of a path.
"""

from typing import Any

import lightning
from lightning.fabric.utilities import cloud_io
from lightning.pytorch.trainer.connectors import checkpoint_connector

from utils import filesystem_of

# ---------------------------------------------------------------- paths


def share_paths() -> None:
    """Has Lightning find files where `utils.filesystem_of` does.

    By itself it reads "::" in the name of a local folder as fsspec writes chains, and
    writes to the file before it.
    """
    for module in (cloud_io, checkpoint_connector):
        module.url_to_fs = filesystem_of  # type: ignore[attr-defined]


# ---------------------------------------------------------------- in a checkpoint
#
# `content` is what a file holds, as Lightning writes it and restores from it; the
# functions change it in place. Counters of batches have "ready", "started", "processed"
# and "completed", each for the epoch ("current") and for the run ("total").


def epochs_done(content: dict[str, Any]) -> int:
    """How many epochs were trained on to their end."""
    return _loop(content)["epoch_progress"]["current"]["processed"]


def batches_of_epoch(content: dict[str, Any]) -> int:
    """How many batches of its epoch the run was trained on."""
    return _batches(content)["current"]["ready"]


def is_epoch_over(content: dict[str, Any]) -> bool:
    """Whether the last batch was the last one of its epoch."""
    return _batches(content)["is_last_batch"]


def set_batches(content: dict[str, Any], *, of_epoch: int, of_run: int) -> None:
    """Sets how many batches have been trained on."""
    _count(_batches(content)["current"], of_epoch)
    _count(_batches(content)["total"], of_run)


def recount_batches(content: dict[str, Any], theirs: int, ours: int) -> None:
    """Counts the same rows in batches of another size.

    Args:
        content: Its batches had `theirs` rows.
        theirs: Rows of a batch of the run that wrote it.
        ours: Rows of a batch of the run that goes on.
    """
    for counts in (_batches(content)["current"], _batches(content)["total"]):
        _count(counts, counts["ready"] * theirs // ours)


def begin_epoch(content: dict[str, Any], is_validation_next: bool) -> None:
    """Makes the state after an epoch's last batch that before the next one's first.

    Lightning goes on from the former, too, but then counts an epoch too few.

    Args:
        content: `is_epoch_over` holds.
        is_validation_next: Whether a validation belongs to its step, by a number of
            steps; Lightning then counts the step itself.
    """
    loop, batches = _loop(content), _batches(content)
    for counts in loop["epoch_progress"].values():
        counts |= dict.fromkeys(counts, counts["ready"])
    batches["total"] |= dict.fromkeys(batches["total"], batches["total"]["ready"])
    batches["current"] |= dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    steps = content["global_step"] - is_validation_next
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def data_position(content: dict[str, Any]) -> dict[str, Any]:
    """What the loader of the training data said of its position; nothing if nothing."""
    (position, *_) = _loop(content)["state_dict"].get("combined_loader") or [{}]
    return position


def set_data_position(content: dict[str, Any], position: dict[str, Any]) -> None:
    """Sets what the loader of the training data is told when the run goes on."""
    _loop(content)["state_dict"]["combined_loader"] = [position]


def _loop(content: dict[str, Any]) -> dict[str, Any]:
    return content["loops"]["fit_loop"]


def _batches(content: dict[str, Any]) -> dict[str, Any]:
    return _loop(content)["epoch_loop.batch_progress"]


def _count(counts: dict[str, int], batches: int) -> None:
    """Sets counters of batches; a batch that was not completed stays so."""
    unfinished = counts["processed"] - counts["completed"]
    counts |= dict.fromkeys(counts, batches)
    counts["completed"] -= unfinished


# ---------------------------------------------------------------- of a trainer


def is_validation_due(trainer: lightning.Trainer) -> bool:
    """Whether Lightning validates after the training batch that has just ended."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not every or every == float("inf") or not trainer.limit_val_batches:
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    in_epoch = (trainer.current_epoch + 1) % epochs == 0
    return in_epoch and (trainer.fit_loop.batch_idx + 1) % every == 0


def validate_before_training(trainer: lightning.Trainer) -> None:
    """Validates in `on_train_start`: on all batches, as in the middle of training."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # from its first batch, wherever the checkpoint left it
    trainer.validating = True
    loop.run()
    trainer.training = True


def meet_saving_ranks(trainer: lightning.Trainer) -> None:
    """Joins the other ranks where they wait for one whose save has failed."""
    trainer.strategy.barrier("Trainer.save_checkpoint")


def is_logged(trainer: lightning.Trainer, step: int) -> bool:
    """Whether metrics are logged at a step, by `trainer.log_every_n_steps`."""
    # One of its connectors sets it.
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step % every == 0
