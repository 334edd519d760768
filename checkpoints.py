"""Reads checkpoints without executing code from them.

Lightning files of the published code hold their config as OmegaConf nodes and their
tokenizer as an object. Here such objects become `Record`s, which hold what the file
says of them and do nothing; the config becomes plain data.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import fsspec
import torch
from omegaconf import DictConfig, OmegaConf
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from hub import is_hub, own_name, read_about, read_hub
from utils import ConfigError, first_line, path_exists

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

    def __new__(cls, *args: Any) -> "Record":  # files do not call __init__
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(
    path: str, key: str, trusted: Collection[str] = ()
) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Args:
        path: Local or fsspec path of a file; or a Hugging Face folder or hub id.
        key: Config key that held the path, for the message.
        trusted: Further classes that the file may name; of their objects there are
            records, too.

    Returns:
        What the file holds. A config among its hyper-parameters is plain data, a
        teacher's weights are left out.

    Raises:
        ConfigError: If there is no such file, it is damaged, or it holds objects of
            other classes.
    """
    if not path:
        raise ConfigError(f"{key} is empty: give the path of a checkpoint.")
    if is_hub(path):
        return read_hub(path, key)
    if not path_exists(path):
        raise ConfigError(f"{key}={path!r}: there is no such file.")
    try:
        with fsspec.open(path, "rb") as file:
            _check_sums(file)
            stand_ins = [_stand_in(name, trusted) for name in _globals_of(file)]
            file.seek(0)
            with safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's text tells to read it without care
        raise ConfigError(
            f"{key}={path!r} cannot be read safely: it is no checkpoint, or it asks "
            "for more than to be read as data"
        ) from None
    except Exception as error:  # a broken file may raise anything
        reason = first_line(error)
        raise ConfigError(f"{key}={path!r} cannot be read safely: {reason}") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise ConfigError(f"{key}={path!r} is no checkpoint: it holds a {kind}.")
    settings = checkpoint.get("hyper_parameters")
    if isinstance(settings, dict) and "config" in settings:
        settings["config"] = plain(settings["config"])
    weights = checkpoint.get("state_dict")
    if isinstance(weights, dict):
        kept = {k: x for k, x in weights.items() if not k.startswith("teacher")}
        if any(name.startswith("backbone.backbone.") for name in kept):
            kept = {own_name(k): x for k, x in kept.items()}  # of algo.backbone=hf_dit
        checkpoint["state_dict"] = kept
    return checkpoint


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


def _stand_in(name: str, trusted: Collection[str]) -> tuple[Any, str]:
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


# ---------------------------------------------------------------- what a file is

# Algorithms whose networks mean the same; a distilled one has its own line.
ALIKE = ({"duo", "duo_base", "distillation"},)
DISTILLED = ("distillation",)
# Keys in which a run should be as the one that made its checkpoint.
COMPARED = (
    "algo.name",
    "algo.time_conditioning",
    "data.tokenizer_name_or_path",
    "model.length",
)


def setting(checkpoint: Mapping[str, Any], key: str) -> Any:
    """A value of the config in a checkpoint; None if it does not say."""
    settings = checkpoint.get("hyper_parameters")
    node = settings.get("config") if isinstance(settings, dict) else None
    for name in key.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(name)
    return node


def adopt(
    config: DictConfig, checkpoint: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Gives keys of a run's config the values that a checkpoint states.

    Args:
        config: Changed in place.
        checkpoint: As for `setting`.
        keys: Those that the checkpoint does not state stay as they are.
    """
    for key in keys:
        value = setting(checkpoint, key)
        is_reference = isinstance(value, str) and "${" in value
        if value is not None and not is_reference:
            OmegaConf.update(config, key, value, force_add=True)


# What `algo.backbone=hf_dit` takes from a checkpoint.
NETWORK = (
    "model.hidden_size",
    "model.cond_dim",
    "model.n_blocks",
    "model.n_heads",
    "model.dropout",
)


def adopt_network(config: DictConfig) -> None:
    """With `algo.backbone=hf_dit` the checkpoint says how large the network is.

    Args:
        config: Changed in place: `model`, but for its length. In training without
            `training.finetune_path` that becomes `eval.checkpoint_path`.

    Raises:
        ConfigError: If there is no checkpoint, or its attention is of the other kind.
    """
    if config.algo.backbone != "hf_dit":
        return
    key = "eval.checkpoint_path"
    if config.mode == "train":
        if not config.training.finetune_path:
            config.training.finetune_path = config.eval.checkpoint_path
        key = "training.finetune_path"
    path = OmegaConf.select(config, key)
    if not path:
        raise ConfigError(
            f"{key} is empty: algo.backbone=hf_dit takes the network from there; give "
            "a Hugging Face folder or hub id, or use algo.backbone=dit."
        )
    trusted = config.checkpointing.trusted_classes
    is_folder = is_hub(path)
    about = read_about(path, key) if is_folder else read_checkpoint(path, key, trusted)
    adopt(config, about, NETWORK)
    causal = setting(about, "algo.causal_attention")
    if causal not in (None, config.algo.causal_attention):
        raise ConfigError(
            f"{key}={path!r} is of a network with causal={causal}, which "
            f"algo={config.algo.name} cannot use."
        )


def describe(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint is, as lines of a table."""
    weights = checkpoint.get("state_dict", {})
    embedding = weights.get("backbone.vocab_embed.embedding")
    buffers = ("inv_freq",)
    sizes = [x.numel() for name, x in weights.items() if not name.endswith(buffers)]
    ema = checkpoint.get("ema")
    algo = setting(checkpoint, "algo.name")
    teacher = checkpoint.get("teacher")
    lines = {
        "format": checkpoint.get("format"),
        "algorithm": algo,
        "likelihood": checkpoint.get("likelihood") or likelihood(algo),
        "tokenizer": setting(checkpoint, "data.tokenizer_name_or_path"),
        "training data": setting(checkpoint, "data.train"),
        "length": setting(checkpoint, "model.length"),
        "vocabulary": None if embedding is None else len(embedding),
        "parameters": f"{sum(sizes):,}" if sizes else None,
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "EMA": "none" if ema is None else _ema(ema),
        "weights": checkpoint.get("weights"),
        "distillation round": teacher.get("round") if teacher else None,
        "optimiser state": "yes" if checkpoint.get("optimizer_states") else "no",
        "lightning": checkpoint.get("pytorch-lightning_version"),
    }
    always = ("algorithm", "tokenizer", "length", "vocabulary", "parameters", "step")
    return {
        name: "not stated" if value is None else str(value)
        for name, value in lines.items()
        if value is not None or name in always
    }


def likelihood(algo: str | None) -> str | None:
    """What the likelihood of an algorithm's models is worth."""
    if algo is None:
        return None
    if algo in DISTILLED:
        return "not comparable: distilled for few steps"
    return "exact" if algo == "ar" else "an upper bound, comparable"


def _ema(ema: Mapping[str, Any]) -> str:
    return f"decay {ema['decay']}, {ema['num_updates']} updates"


def disagreements(checkpoint: Mapping[str, Any], config: DictConfig) -> list[str]:
    """Where a checkpoint's own config says other things than a run's, one line each.

    Args:
        checkpoint: From `read_checkpoint`.
        config: The run's config.
    """
    lines = []
    for key in COMPARED:
        theirs, ours = setting(checkpoint, key), OmegaConf.select(config, key)
        alike = theirs == ours or any({theirs, ours} <= names for names in ALIKE)
        alike |= ours == checkpoint.get("source")  # the tokenizer in its folder
        if theirs is not None and not alike:
            shown = key.removesuffix(".name")
            lines.append(f"the file was made with {shown}={theirs}, not {ours}")
    distilled = setting(checkpoint, "algo.name") in DISTILLED
    if distilled and config.mode == "ppl_eval":
        lines.append(
            "the file is of a distilled model, whose likelihood is not comparable with "
            "that of other models"
        )
    return lines
