"""Lightning's private and undocumented state: all that this project knows of it.

It was tested with lightning 2.6.6. All other versions are untested: where one of them
arranges its state in another way, this file is what has to follow, and
`tests/integration/test_resumed_runs.py` shows whether it does.

What is used here, and is not in Lightning's documentation:

- The entry `loops` of a checkpoint: the state of the loops over epochs and batches.
- Attributes of the trainer's loops, from which the position of a run is read; and how
  they go on from a state, which decides whether a validation comes first.
- The trainer's `log_every_n_steps`, which its type does not declare.
- The barrier at which `Trainer.save_checkpoint` brings all ranks together.
- The function by which its loggers and callbacks find the file system of a path.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning
from lightning.fabric.utilities import cloud_io
from lightning.pytorch.loops import progress
from lightning.pytorch.trainer.connectors import checkpoint_connector

from checkpoints.schema import count, each, fields, like, table
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


def check_loops(content: dict[str, Any]) -> None:
    """Whether the counters are all there, and are counts that go together.

    Raises:
        ValueError: With a line that names the entry.
    """
    fields({"loops": _LOOPS, "global_step": count}, ("loops",))(content, "content")
    loop = _loop(content)
    for name in ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        for counts in (loop[name][x] for x in ("current", "total")):
            ordered = [counts[x] for x in ("completed", "processed", "started")]
            if sorted(ordered) != ordered or ordered[-1] > counts["ready"]:
                raise ValueError(f"its loops.fit_loop.{name} counts more than there is")
    steps = loop[_OPTIMIZER]["optimizer"]["step"]["total"]["completed"]
    ended = loop["epoch_progress"]["current"]["completed"]  # with all that ends them
    if content["global_step"] != steps or content["epoch"] != ended:
        raise ValueError("its loops have other steps and epochs than it says")
    position = data_position(content)
    if "stream" in position:
        readers, following = position["stream"], position.get("next", -1)
        number = len(readers[0]) if readers else 0
        states = [state for rank in readers for state in rank]
        is_whole = all(len(rank) == number for rank in readers)
        has_numbers = all(len(state) == _NUMBERS for state in states)
        if not (0 <= following < number and is_whole and has_numbers):
            raise ValueError("its position in the data is none")


def _counts(of: progress._BaseProgress) -> Any:
    return like(asdict(of), count)


_NUMBERS = 6  # of a reader's position in a stream
_OPTIMIZER = "epoch_loop.automatic_optimization.optim_progress"
_PROGRESS = {
    "epoch_loop.batch_progress": progress._BatchProgress(),
    "epoch_loop.scheduler_progress": progress._SchedulerProgress(),
    _OPTIMIZER: progress._OptimizationProgress(),
    "epoch_loop.manual_optimization.optim_step_progress": progress._Progress(
        *(progress._ReadyCompletedTracker() for _ in range(2))
    ),
    "epoch_loop.val_loop.batch_progress": progress._BatchProgress(),
    "epoch_progress": progress._Progress(),
}
_POSITION = fields(
    {
        "epoch": count,
        "rows": count,
        "stream": each(each(each(count))),
        "next": count,
    }
)
_LOOPS = fields(
    {
        "fit_loop": fields(
            {name: _counts(value) for name, value in _PROGRESS.items()}
            | {
                "state_dict": fields({"combined_loader": each(_POSITION)}),
                "epoch_loop.state_dict": table(count),
            },
            needed=(
                "epoch_loop.batch_progress",
                "epoch_loop.val_loop.batch_progress",
                _OPTIMIZER,
                "epoch_progress",
                "state_dict",
                "epoch_loop.state_dict",
            ),
        )
    },
    needed=("fit_loop",),
)


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
    if not of_epoch:
        _set_logged_steps(content)


def recount_batches(content: dict[str, Any], theirs: int, ours: int) -> None:
    """Counts the same rows in batches of another size.

    Args:
        content: Its batches had `theirs` rows.
        theirs: Rows of a batch of the run that wrote it.
        ours: Rows of a batch of the run that goes on.
    """
    for counts in (_batches(content)["current"], _batches(content)["total"]):
        _count(counts, counts["ready"] * theirs // ours)


def begin_epoch(content: dict[str, Any]) -> None:
    """Makes the state after an epoch's last batch that before the next one's first.

    Lightning goes on from the former, too, but then counts an epoch too few.
    """
    loop, batches = _loop(content), _batches(content)
    for counts in loop["epoch_progress"].values():
        counts |= dict.fromkeys(counts, counts["ready"])
    batches["total"] |= dict.fromkeys(batches["total"], batches["total"]["ready"])
    batches["current"] |= dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    _set_logged_steps(content)


def is_within_epoch(content: dict[str, Any]) -> bool:
    """Whether what belongs to the end of its epoch has not been done yet."""
    counts = _loop(content)["epoch_progress"]["current"]
    return counts["processed"] < counts["ready"]


def begin_validation(content: dict[str, Any]) -> None:
    """Makes the state after a batch that of a validation that has just begun.

    Args:
        content: `is_within_epoch` holds. `validate_first` has it run on.
    """
    for counts in (_batches(content)["current"], _batches(content)["total"]):
        counts |= dict.fromkeys(counts, counts["ready"])
    validation = _loop(content)["epoch_loop.val_loop.batch_progress"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    for name in ("current", "total"):
        validation[name] |= begun


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


def _set_logged_steps(content: dict[str, Any]) -> None:
    """Sets the step that loggers are told, for a run that goes on with a new epoch."""
    steps = {"_batches_that_stepped": content["global_step"]}
    _loop(content)["epoch_loop.state_dict"] |= steps


def _count(counts: dict[str, int], batches: int) -> None:
    """Sets counters of batches; a batch that was not completed stays so."""
    unfinished = counts["processed"] - counts["completed"]
    counts |= dict.fromkeys(counts, batches)
    counts["completed"] -= unfinished


# ---------------------------------------------------------------- of a trainer

_IS_DUE = "_should_check_val_fx"  # of the loop over batches: does a validation come?
_SIGNALS = "_signal_connector"  # of the trainer: its handlers of signals


def is_validation_due(trainer: lightning.Trainer) -> bool:
    """Whether Lightning validates after the training batch that has just ended."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not every or every == float("inf") or not trainer.limit_val_batches:
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    in_epoch = (trainer.current_epoch + 1) % epochs == 0
    return in_epoch and (trainer.fit_loop.batch_idx + 1) % every == 0


def is_validating(trainer: lightning.Trainer) -> bool:
    """Whether a validation of a run that trains is under way."""
    return trainer.state.fn == "fit" and trainer.validating


def validate_first(trainer: lightning.Trainer, step: int) -> None:
    """Has a run that goes on at a step begin with the validation that belongs to it.

    What comes behind the validation comes then, too, such as the end of an epoch or of
    the run: `trainer.max_steps` does not end it before.

    Args:
        trainer: One that validates; its loops are about to take over what
            `begin_validation` made.
        step: Updates that were made.
    """
    loop = trainer.fit_loop.epoch_loop
    last = loop.max_steps
    if last != -1:
        loop.max_steps = max(last, step + 1)

    def is_first() -> bool:
        if loop.restarting:  # its first iteration, which trains on nothing
            loop.max_steps = last
        return loop.restarting

    _validate_also(loop, is_first)


def begin_at_first_batch(trainer: lightning.Trainer) -> None:
    """Has an epoch of which no batch was trained on begin, and not go on.

    The two differ in how Lightning counts what it logs. Call this in `on_train_start`.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.batch_progress.current.ready == 0:
        loop.restarting = False


def is_last_update(trainer: lightning.Trainer) -> bool:
    """Whether a run ends after the training batch that has just ended.

    Not where a signal ends it, or a callback at the end of an epoch.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    is_last_batch = (
        batches.is_last_batch or batches.current.ready == trainer.num_training_batches
    )
    is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    may_stop = trainer.global_step >= (trainer.min_steps or 0)
    may_stop &= trainer.current_epoch >= (trainer.min_epochs or 0)
    is_stopped = trainer.should_stop and may_stop
    is_over = trainer.global_step == trainer.max_steps or is_stopped
    return is_over or (is_last_batch and is_last_epoch)


def validate_last(trainer: lightning.Trainer) -> None:
    """Has a run end with a validation, also where none is due."""
    _validate_also(
        trainer.fit_loop.epoch_loop,
        lambda: trainer.enable_validation and is_last_update(trainer),
    )


def _validate_also(loop: Any, is_due: Callable[[], bool]) -> None:
    """Has the loop over batches validate where this holds, and where it did before."""
    was_due = getattr(loop, _IS_DUE)
    setattr(loop, _IS_DUE, lambda fetcher: is_due() or was_due(fetcher))


def meet_saving_ranks(trainer: lightning.Trainer) -> None:
    """Joins the other ranks where they wait for one whose save has failed."""
    trainer.strategy.barrier("Trainer.save_checkpoint")


def leave_signals_alone(trainer: lightning.Trainer) -> None:
    """Keeps the trainer from putting its own handlers in the place of the process's.

    Its handler of SIGTERM notes the signal, for the loops of training to look at, and
    waits for other ranks; whatever else runs goes on.
    """
    connector = getattr(trainer, _SIGNALS)
    vars(connector)[connector.register_signal_handlers.__name__] = lambda: None


def signal_children(trainer: lightning.Trainer, number: int) -> None:
    """Passes a signal on to the processes of other ranks that this one has started."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(number)


def is_logged(trainer: lightning.Trainer, step: int) -> bool:
    """Whether metrics are logged at a step, by `trainer.log_every_n_steps`."""
    # One of its connectors sets it.
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step % every == 0
