"""What callbacks take over from a checkpoint, above all: which files are theirs."""

import re
from collections.abc import Iterable
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from checkpoints.schema import Rule, fields, like, optional, scalar, table, text
from utils import ConfigError, filesystem_of

TEACHER_PREFIX = "round_"  # of the names of files that hold a distillation's teachers


def fit_callbacks(
    states: dict[str, Any], callbacks: Iterable[lightning.Callback], key: str
) -> None:
    """Makes the state of callbacks what a run of this folder may take over, in place.

    Files that a callback is said to have written are those in its own folder, by their
    names; what is not there is forgotten.

    Args:
        states: By the callbacks' keys, of a checkpoint.
        callbacks: Of the run.
        key: Config key that named the checkpoint, for messages.

    Raises:
        ConfigError: If a state is not of its callback's kind.
    """
    for callback in callbacks:
        state = states.get(callback.state_key)
        if state is None:
            continue
        rules = {name: like(x) for name, x in callback.state_dict().items()}
        if isinstance(callback, ModelCheckpoint):
            rules |= OF_BEST
        try:
            where = f"state of {type(callback).__name__}"
            fields(rules, tuple(rules))(state, where)
        except ValueError as error:
            raise ConfigError(f"{key}: it cannot be resumed: {error}.") from None
        if isinstance(callback, ModelCheckpoint) and not _rebase(state, callback):
            del states[callback.state_key]


# State of Lightning's `ModelCheckpoint`: files, and the metric of each.
OF_BEST: dict[str, Rule] = {
    "monitor": optional(text),
    "best_model_score": optional(scalar),
    "best_model_path": text,
    "current_score": optional(scalar),
    "dirpath": optional(text),
    "best_k_models": table(scalar),
    "kth_best_model_path": text,
    "kth_value": scalar,
    "last_model_path": text,
}


def _rebase(state: dict[str, Any], callback: ModelCheckpoint) -> bool:
    """Gives files the paths that they have in the callback's folder.

    Returns:
        Whether the best one is there.
    """
    folder, theirs = str(callback.dirpath), state["dirpath"] or ""
    filesystem, inner = filesystem_of(folder)

    def path_of(path: str) -> str:
        before, _, name = path.rpartition("/")
        is_of_it = before.rstrip("/") == theirs.rstrip("/") and _is_its(name, callback)
        is_there = is_of_it and filesystem.isfile(f"{inner}/{name}")
        return f"{folder}/{name}" if is_there else ""

    models = {path_of(path): x for path, x in state["best_k_models"].items()}
    models.pop("", None)
    state |= {"dirpath": callback.dirpath, "best_k_models": models}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = path_of(state[key])
    return bool(state["best_model_path"] and state["kth_best_model_path"] in models)


def _is_its(name: str, callback: ModelCheckpoint) -> bool:
    """Whether a callback gives such names to files, and nothing else of ours does."""
    stem = callback.filename or "{}"
    if "{" not in stem:
        return bool(re.fullmatch(rf"{re.escape(stem)}(-v\d+)?\.ckpt", name))
    of_others = name == "last.ckpt" or name.startswith(TEACHER_PREFIX)
    return bool(re.fullmatch(r"\w[\w=.,+-]*\.ckpt", name)) and not of_others
