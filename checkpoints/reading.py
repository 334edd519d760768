"""Reads checkpoints without executing code from them.

Lightning files of the published code hold their config as OmegaConf nodes and their
tokenizer as an object. Here such objects become `Record`s, which hold what the file
says of them and do nothing; the config becomes plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from checkpoints.checkpoint import Checkpoint
from checkpoints.huggingface import own_name, read_hub
from checkpoints.locating import check_checkpoint_path, is_folder_or_hub_id
from checkpoints.mdlm import own_config
from checkpoints.schema import check_content, is_tensor
from data.pickles import MAX_DEPTH, Budget, Named, check_extent
from utils import ConfigError, first_line, open_file

if TYPE_CHECKING:
    from torch import Tensor

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


# Plain types of Python's that files name, and the one that each makes.
PLAIN: dict[str, type] = {
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.str": str,
    "builtins.bool": bool,
    "collections.OrderedDict": dict,
    "collections.defaultdict": dict,
    "_codecs.encode": bytes,
    "builtins.bytes": bytes,
}


# The same, as protocol 2 has it.
_OLDER = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}


class Record:
    """What a file says of an object: the arguments of its making, and its state."""

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name  # of the object's class
        self.args = args
        self.state: Any = {}

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
    from checkpoints.archive import read_archive

    check_checkpoint_path(path, key)
    if is_folder_or_hub_id(path):
        return read_hub(path, key)

    def find(name: str, budget: Budget) -> Named:
        return stand_in(name, trusted, budget)

    try:
        with open_file(path) as file:
            content = read_archive(file, find)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        make_plain(content)
        check_extent(content)
        check_content(content)
    except Exception as error:  # a broken file may raise anything
        reason = first_line(error)
        raise ConfigError(f"{key}={path!r} cannot be read safely: {reason}") from None
    weights = content.get("state_dict")
    if isinstance(weights, dict):
        kept = {k: x for k, x in weights.items() if not k.startswith("teacher")}
        if any(name.startswith("backbone.backbone.") for name in kept):
            kept = {own_name(k): x for k, x in kept.items()}  # of algo.backbone=hf_dit
        content["state_dict"] = kept
    return Checkpoint.of_lightning(content)


def read_weights(path: str, key: str) -> dict[str, Tensor]:
    """The tensors of a state dict, of whatever network, on the CPU.

    Args:
        path: Local or fsspec path of a file of safetensors, or of one that `torch.save`
            has written: of a dict of tensors, or of one with that under `state_dict`.
        key: Config key that held the path, for the message.

    Raises:
        ConfigError: If it is damaged, or holds anything but tensors.
    """

    from checkpoints.archive import read_archive

    def find(name: str, budget: Budget) -> Named:
        return stand_in(name, (), budget)

    try:
        with open_file(path) as file:
            if path.endswith(".safetensors"):
                from safetensors.torch import load

                return load(file.read())
            content = read_archive(file, find)
        if isinstance(content, dict):
            content = content.get("state_dict", content)
        if not isinstance(content, dict) or not content:
            raise ValueError("it holds no weights by name")
        check_extent(content)
        for name, tensor in content.items():
            if not isinstance(name, str) or not is_tensor(tensor):
                raise ValueError(f"{name!r} in it is no tensor")
    except Exception as error:  # a broken file may raise anything
        reason = first_line(error)
        raise ConfigError(f"{key}={path!r} cannot be read safely: {reason}") from None
    return content


def stand_in(name: str, trusted: Collection[str], budget: Budget) -> Named:
    """What to put in place of a name in the file.

    Raises:
        ValueError: If it is not known.
    """
    name = _OLDER.get(name, name.replace("__builtin__.", "builtins.", 1))
    if name in PLAIN:
        return Named(name, _maker(name, budget))
    if name not in trusted and not name.startswith(KNOWN):
        raise ValueError(
            f"it holds an object of class {name} (if you trust the file, "
            f"checkpointing.trusted_classes=[{name}] reads it as a plain record)"
        )
    return Named(name, lambda *args: Record(name, args))


def _maker(name: str, budget: Budget) -> Callable[..., Any]:
    """Makes a plain value: an empty dict, bytes, or a copy of a list."""
    kind = PLAIN[name]

    def make(*args: Any) -> Any:
        if name == "collections.defaultdict" or not args:
            return kind()
        given, *more = args
        if name == "_codecs.encode" and type(given) is str and more == ["latin1"]:
            budget.spend(len(given))
            return given.encode("latin1")
        if kind not in (list, tuple, set) or type(given) not in (list, tuple, set):
            raise ValueError(f"it calls {name}")
        budget.spend(len(given))
        if kind is set and not all(isinstance(x, (str, int, float)) for x in given):
            raise ValueError("it has a set of no plain values")
        return kind(given)

    return make


def make_plain(content: dict[Any, Any]) -> None:
    """Makes the config of a file's content plain data in the keys of this code."""
    settings = content.get("hyper_parameters")
    if isinstance(settings, dict) and "config" in settings:
        settings["config"] = _own(plain(settings["config"]))


def plain(node: Any) -> Any:
    """OmegaConf nodes that were read as records, as dicts, lists and values.

    Raises:
        ValueError: If they do not end.
    """
    known: dict[int, Any] = {}  # one that is there twice is the same one

    def value_of(node: Any, depth: int) -> Any:
        if not isinstance(node, Record):
            return node
        if depth > MAX_DEPTH:
            raise ValueError(f"its config nests more than {MAX_DEPTH} deep")
        if id(node) not in known:
            known[id(node)] = _content_of(node, partial(value_of, depth=depth + 1))
        return known[id(node)]

    return value_of(node, 0)


def _own(config: Any) -> Any:
    """A run's config, in the keys of this code if it is one of MDLM's."""
    own = own_config(config) if isinstance(config, dict) else None
    return config if own is None else own


def _content_of(node: Record, value_of: Callable[[Any], Any]) -> Any:
    state = node.state if isinstance(node.state, dict) else {}
    content = state.get("_content")
    if isinstance(content, dict):
        return {key: value_of(value) for key, value in content.items()}
    if isinstance(content, list):
        return [value_of(value) for value in content]
    return value_of(state.get("_val"))


# ---------------------------------------------------------------- building blocks


def read_evaluated(config: DictConfig) -> Checkpoint:
    """The checkpoint that `eval.checkpoint_path` names."""
    trusted = config.checkpointing.trusted_classes
    return read_checkpoint(config.eval.checkpoint_path, "eval.checkpoint_path", trusted)
