"""What a run takes up from an earlier one: which file, and how its state fits a config
that may have changed since.
"""

import logging
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.reading import read_checkpoint
from checkpoints.schema import check_training
from training.callback_states import TEACHER_PREFIX, fit_callbacks
from training.lightning_state import (
    batches_of_epoch,
    begin_at_first_batch,
    begin_epoch,
    begin_validation,
    check_loops,
    data_position,
    epochs_done,
    is_epoch_over,
    is_within_epoch,
    recount_batches,
    set_batches,
    set_data_position,
    validate_first,
    validate_last,
)
from training.row_streams import NOISE_VERSION
from utils import ConfigError, filesystem_of, one_line, path_exists

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

KEY = "checkpointing.resume_ckpt_path"
# What training cannot go on without, as Lightning names it.
NEEDED = ("state_dict", "optimizer_states", "loops", "global_step")


class Resumed(NamedTuple):
    """Where training goes on."""

    path: str
    checkpoint: Checkpoint


def find_checkpoint(config: DictConfig) -> Resumed | None:
    """The checkpoint from which a run goes on; None if it is a new one.

    It is `checkpointing.resume_ckpt_path`; if that cannot be read, the newest file
    beside it that can. A run whose command names a checkpoint of another folder goes
    on from its own ones, once there are some.

    Raises:
        ConfigError: If there are files and none can be read, or if the run would
            overwrite those of another one.
    """
    checkpointing = config.checkpointing
    own = f"{checkpointing.save_dir}/checkpoints"
    own_files, trusted = checkpoint_files(own), checkpointing.trusted_classes
    wanted = checkpointing.resume_ckpt_path
    if not (checkpointing.resume_from_ckpt and wanted):
        if own_files:
            raise ConfigError(
                f"checkpointing.resume_from_ckpt={checkpointing.resume_from_ckpt}, "
                f"{KEY}={wanted!r}: {own_files[0]} of an earlier run would be "
                "overwritten; give another checkpointing.save_dir."
            )
        return None
    folder = posixpath.dirname(wanted)
    if own_files and not _is_same(folder, own):
        found = newest_valid(own_files, trusted)
        if found.checkpoint.setting(KEY) != wanted:
            raise ConfigError(
                f"{KEY}={wanted!r}: {found.path} is of another run and would be "
                "overwritten; give another checkpointing.save_dir."
            )
        return found
    is_there = path_exists(wanted)
    if not is_there and not _is_same(wanted, f"{own}/last.ckpt"):
        warn("%s=%r: there is no such file; training starts at step 0", KEY, wanted)
        return None
    others = [x for x in checkpoint_files(folder) if not _is_same(x, wanted)]
    paths = [wanted] * is_there + others
    if not paths:
        _say_if_restarted(own)
        return None
    return newest_valid(paths, trusted)


def _say_if_restarted(folder: str) -> None:
    """A job that Slurm has started again should have found a checkpoint."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    if count.isdecimal() and int(count):
        warn(
            "this job was started again (SLURM_RESTART_COUNT=%s), but %s has no "
            "checkpoint: training starts at step 0. Give the run a folder of its own, "
            "hydra.run.dir=FOLDER; by default each start has a new one",
            *(count, folder),
        )


def with_all_it_needs(resumed: Resumed, model: Any) -> Resumed:
    """The checkpoint, or the newest one beside it whose other files can be read.

    Args:
        resumed: From `find_checkpoint`.
        model: Takes up what is in other files.

    Raises:
        ConfigError: If none can be resumed.
    """
    try:
        model.take_up_needed(resumed.checkpoint)
    except ConfigError:
        beside = checkpoint_files(posixpath.dirname(resumed.path))
        others = [x for x in beside if not _is_same(x, resumed.path)]
        trusted = model.config.checkpointing.trusted_classes
        check = model.take_up_needed
        return newest_valid([resumed.path, *others], trusted, check)
    return resumed


def newest_valid(
    paths: Sequence[str],
    trusted: Iterable[str] = (),
    check: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Resumed:
    """The first file that can be read and resumed; others are named in one line each.

    Args:
        paths: At least one, the best first.
        trusted: As for `read_checkpoint`.
        check: Raises a ConfigError if a checkpoint cannot be resumed for other reasons.

    Raises:
        ConfigError: With the reason of the first, if there is none.
    """
    reasons = []
    for path in paths:
        try:
            checkpoint = read_checkpoint(path, KEY, tuple(trusted))
            _check_resumable(path, checkpoint)
            check(checkpoint)
        except ConfigError as error:
            reasons.append(one_line(str(error)))
            continue
        for reason in reasons:
            warn("%s", reason)
        if reasons:
            warn("going on from %s (step %d) instead", path, checkpoint.step)
        return Resumed(path, checkpoint)
    others = f" Of {len(paths) - 1} files beside it none can be." if paths[1:] else ""
    raise ConfigError(
        f"{reasons[0]}{others} To train anew give another checkpointing.save_dir."
    )


def _check_resumable(path: str, checkpoint: Checkpoint) -> None:
    for name in NEEDED:
        value = checkpoint.lightning.get(name)
        if not isinstance(value, Tensor) and not value:  # tensors: `check_state`
            raise ConfigError(
                f"{KEY}={path!r} cannot be resumed: no {name} in it. Its weights can "
                "be fine-tuned: training.finetune_path."
            )
    if found := checkpoint.not_finite():
        raise ConfigError(f"{KEY}={path!r} cannot be resumed: {found}.")


def check_state(resumed: Resumed, model: Any) -> None:
    """Refuses state that is not that of a run with this model, before it is used.

    Args:
        resumed: Where training goes on.
        model: Whole, with parameters and the optimiser that the config gives it.

    Raises:
        ConfigError: With the entry that does not fit.
    """
    content = resumed.checkpoint.lightning
    optimizer = model.make_optimizer()
    schedule = model.make_schedule(optimizer).state_dict()
    try:
        check_training(content, optimizer, schedule)
        if (version := noise_version(content)) > NOISE_VERSION:
            raise ValueError(
                f"its noise is of version {version}, this code has {NOISE_VERSION}"
            )
        check_loops(content)
    except ValueError as error:
        raise ConfigError(
            f"{KEY}={resumed.path!r} cannot be resumed: {error}. Its weights can be "
            "fine-tuned: training.finetune_path."
        ) from None


def noise_version(content: Mapping[str, Any]) -> int:
    """Of the draws of the run that wrote a file; see `row_streams.NOISE_VERSION`."""
    version: int = content.get("training", {}).get("noise", 1)
    return version


def checkpoint_files(folder: str) -> list[str]:
    """Paths of the checkpoints of a run in its folder, the newest first."""
    filesystem, inner = filesystem_of(folder)
    if not filesystem.exists(inner):
        return []
    names = [x for x in filesystem.ls(inner, detail=False) if x.endswith(".ckpt")]
    names.sort(key=lambda x: (filesystem.modified(x), x), reverse=True)
    paths = [f"{folder}/{posixpath.basename(name)}" for name in names]
    return [
        path
        for path in paths
        if not posixpath.basename(path).startswith(TEACHER_PREFIX)
    ]


def _is_same(path: str, other: str) -> bool:
    """Whether two local or fsspec paths lead to the same place."""
    names = []
    for x in (path, other):
        filesystem, inner = filesystem_of(x)
        names.append(filesystem.unstrip_protocol(posixpath.normpath(inner)))
    return names[0] == names[1]


# ---------------------------------------------------------------- state


class Bookkeeping(lightning.Callback):
    """What has to happen around checkpoints, whoever writes them.

    Logs what a training batch gives before other callbacks save it, keeps the state
    of training that Lightning does not know of, restores the raw weights if a
    validation dies. Ends training where the model says that it is done.
    """

    def on_train_start(self, trainer: lightning.Trainer, model: Any) -> None:
        begin_at_first_batch(trainer)
        validate_last(trainer)
        trainer.should_stop |= model.is_done() and not model.validation_due

    def on_train_batch_end(
        self, trainer: lightning.Trainer, model: Any, *args: Any
    ) -> None:
        model.check_updates()
        model.log_training()
        trainer.should_stop |= model.is_done()

    def on_validation_end(self, trainer: lightning.Trainer, model: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            trainer.should_stop |= model.is_done()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, model: Any, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            checkpoint["training"] = model.training_state()

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, model: Any, checkpoint: dict[str, Any]
    ) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # a connector's
        fit_callbacks(checkpoint["callbacks"], callbacks, KEY)
        if "training" in checkpoint and not trainer.enable_validation:
            checkpoint["training"]["validation_due"] = False
        adapt(checkpoint, model.config, model.make_optimizer().param_groups)
        if "training" in checkpoint:  # not in files of the published code
            if (version := noise_version(checkpoint)) != NOISE_VERSION:
                warn(
                    "the run had noise of version %d and goes on with that of version "
                    "%d: other draws, of the same law",
                    *(version, NOISE_VERSION),
                )
            model.load_training_state(checkpoint["training"])
        if is_validation_next(checkpoint, model.config):
            model.validation_due = True
            validate_first(trainer, checkpoint["global_step"])

    def on_exception(
        self, trainer: lightning.Trainer, model: Any, error: BaseException
    ) -> None:
        model.leave_validation()


def adapt(
    checkpoint: dict[str, Any],
    config: DictConfig,
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Makes the state of a checkpoint that of a run with this config, in place.

    What the command line says holds: the learning rate and its schedule, the settings
    of AdamW, the size of micro-batches. Where nothing has changed, nothing does.

    Args:
        checkpoint: What a file holds, for Lightning to restore.
        config: The run's.
        groups: Parameter groups of a new optimiser of the run.
    """
    for state in checkpoint["optimizer_states"]:
        if len(state["param_groups"]) == len(groups):
            for theirs, ours in zip(state["param_groups"], groups, strict=True):
                _adapt_group(theirs, ours)
    for state in checkpoint.get("lr_schedulers", []):
        _adapt_schedule(state, config.lr_scheduler, [group["lr"] for group in groups])
    _adapt_position(checkpoint, config)


def _adapt_group(theirs: dict[str, Any], ours: Mapping[str, Any]) -> None:
    base = theirs.get("initial_lr", theirs["lr"])
    if base != ours["lr"]:
        warn("optim.lr=%g holds, %g of the checkpoint does not", ours["lr"], base)
        theirs["lr"] *= ours["lr"] / base if base else 0.0
    theirs |= {k: x for k, x in ours.items() if k not in ("params", "lr")}
    theirs["initial_lr"] = ours["lr"]


def _adapt_schedule(
    state: dict[str, Any], schedule: Mapping[str, Any], rates: list[float]
) -> None:
    """Leaves the schedule's position in it; what the config gives comes from there."""
    for name in schedule:
        state.pop(name, None)
    if "base_lrs" in state:
        state["base_lrs"] = rates
    state["lr_lambdas"] = [None] * len(rates)  # LambdaLR needs it, others do not mind


def _adapt_position(checkpoint: dict[str, Any], config: DictConfig) -> None:
    """Counts batches of the run's size, and tells the data where to go on.

    NOTE(compat): files of the published code do not tell its order of the data, so
    for them an epoch of ours starts.
    """
    step = checkpoint["global_step"]
    ours = rows_per_batch(config.loader, config.trainer)
    rows = 0
    if "training" not in checkpoint:
        batches = step * config.trainer.accumulate_grad_batches
        set_batches(checkpoint, of_epoch=0, of_run=batches)
    else:
        settings = checkpoint["hyper_parameters"]["config"]
        theirs = rows_per_batch(settings["loader"], settings["trainer"])
        if ours != theirs:
            warn("batches of %d rows hold, %d of the checkpoint do not", ours, theirs)
            recount_batches(checkpoint, theirs, ours)
        is_over = is_epoch_over(checkpoint)
        if not is_over:
            rows = batches_of_epoch(checkpoint) * ours
        if is_validation_next(checkpoint, config):
            begin_validation(checkpoint)
        elif is_over:
            begin_epoch(checkpoint)
    # The position in data that are streamed, which no number of rows tells.
    saved = data_position(checkpoint)
    stream = {name: saved[name] for name in ("stream", "next") if name in saved}
    position = {"epoch": epochs_done(checkpoint), "rows": rows}
    set_data_position(checkpoint, stream | position)


def is_validation_next(checkpoint: dict[str, Any], config: DictConfig) -> bool:
    """Whether the run had a validation before it, with which it can go on; also that
    at the end of the run."""
    training = checkpoint.get("training", {})
    is_over = checkpoint["global_step"] >= config.trainer.max_steps
    is_due = training.get("validation_due", False) or (training and is_over)
    return bool(is_due) and is_within_epoch(checkpoint)


def rows_per_batch(loader: Mapping[str, Any], trainer: Mapping[str, Any]) -> int:
    """Rows of one micro-batch of all ranks."""
    return loader["batch_size"] * trainer["devices"] * trainer["num_nodes"]
