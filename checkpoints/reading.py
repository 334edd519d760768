"""Reads checkpoints without executing code from them.

Lightning files of the published code hold their config as OmegaConf nodes and their
tokenizer as an object. Here such objects become `Record`s, which hold what the file
says of them and do nothing; the config becomes plain data.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection
from typing import Any

import fsspec
import torch
from omegaconf import DictConfig
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from checkpoints.checkpoint import Checkpoint
from checkpoints.huggingface import own_name, read_hub
from checkpoints.locating import check_checkpoint_path, is_folder_or_hub_id
from utils import ConfigError, first_line

# Where classes may come from whose objects are read as records.
KNOWN = (
    "omegaconf.",
    "transformers.",
    "tokenizers.",
    "dataloader.",
    "typing.",
    "lightning.",
    "pytorch_lightning.",
)


def _new_dict(factory: Any = None) -> dict:
    """In place of a defaultdict, of which torch would not take the entries."""
    return {}


# Plain types of Python's that files name.
PLAIN: dict[str, Callable[..., Any]] = {
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.str": str,
    "builtins.bool": bool,
    "collections.defaultdict": _new_dict,
}


class Record:
    """What a file says of an object: the arguments of its making, and its state."""

    name = ""  # of the object's class
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":  # files do not call __init__
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(path: str, key: str, trusted: Collection[str] = ()) -> Checkpoint:
    """Reads a checkpoint to the CPU.

    Args:
        path: Local or fsspec path of a file; or a Hugging Face folder or hub id.
        key: Config key that held the path, for the message.
        trusted: Further classes that the file may name; of their objects there are
            records, too.

    Returns:
        What the file holds. Its config is plain data, a teacher's weights are left out.

    Raises:
        ConfigError: If there is no such file, it is damaged, or it holds objects of
            other classes.
    """
    check_checkpoint_path(path, key)
    if is_folder_or_hub_id(path):
        return read_hub(path, key)
    try:
        with fsspec.open(path, "rb") as file:
            _check_sums(file)
            names = _globals_of(file)
            allowed = safe_globals([_stand_in(name, trusted) for name in names])
            file.seek(0)
            with allowed, warnings.catch_warnings(action="ignore"):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's text tells to read it without care
        raise ConfigError(
            f"{key}={path!r} cannot be read safely: it is no checkpoint, or it asks "
            "for more than to be read as data"
        ) from None
    except Exception as error:  # a broken file may raise anything
        reason = first_line(error)
        raise ConfigError(f"{key}={path!r} cannot be read safely: {reason}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"{key}={path!r} is no checkpoint: it holds a {kind}.")
    settings = content.get("hyper_parameters")
    if isinstance(settings, dict) and "config" in settings:
        settings["config"] = plain(settings["config"])
    weights = content.get("state_dict")
    if isinstance(weights, dict):
        kept = {k: x for k, x in weights.items() if not k.startswith("teacher")}
        if any(name.startswith("backbone.backbone.") for name in kept):
            kept = {own_name(k): x for k, x in kept.items()}  # of algo.backbone=hf_dit
        content["state_dict"] = kept
    return Checkpoint.of_lightning(content)


def _check_sums(file: Any) -> None:
    """Compares every record of the archive with its checksum, which torch does not.

    Raises:
        ValueError: If one differs.
    """
    if file.read(4) == b"PK\x03\x04":  # else: written before torch 1.6, no checksums
        with zipfile.ZipFile(file) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f"it is damaged (checksum of {name})")
    file.seek(0)


def _globals_of(file: Any) -> list[str]:
    """Names in the file that torch does not know to be harmless."""
    try:
        return get_unsafe_globals_in_checkpoint(file)
    except ValueError:  # not of the format that can be searched: torch decides
        return []


def _stand_in(name: str, trusted: Collection[str]) -> tuple[Callable[..., Any], str]:
    """What to put in place of a name in the file.

    Raises:
        ValueError: If it is not known.
    """
    if name in PLAIN:
        return PLAIN[name], name
    if name not in trusted and not name.startswith(KNOWN):
        raise ValueError(
            f"it holds an object of class {name} (if you trust the file, "
            f"checkpointing.trusted_classes=[{name}] reads it as a plain record)"
        )
    return type("Record", (Record,), {"name": name}), name


def plain(node: Any) -> Any:
    """OmegaConf nodes that were read as records, as dicts, lists and values."""
    if not isinstance(node, Record):
        return node
    content = node.state.get("_content")
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [plain(value) for value in content]
    return plain(node.state.get("_val"))


# ---------------------------------------------------------------- building blocks


def read_evaluated(config: DictConfig) -> Checkpoint:
    """The checkpoint that `eval.checkpoint_path` names."""
    trusted = config.checkpointing.trusted_classes
    return read_checkpoint(config.eval.checkpoint_path, "eval.checkpoint_path", trusted)
