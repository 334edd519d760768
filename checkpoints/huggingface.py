"""Reads Hugging Face checkpoints: folders or hub ids with config.json and safetensors.

Nothing of it is executed: modelling files are not even downloaded, pickles are refused.
`docs/checkpoints.md` lists the formats.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.checkpoint import Checkpoint
from checkpoints.keys import check_sizes
from checkpoints.schema import check_config, count, number, optional, text
from checkpoints.schema import fields as fields_of
from utils import ConfigError, first_line, hub_options

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, as safetensors has it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
DOWNLOADED = [CONFIG, INDEX, "*.safetensors", *TOKENIZER_FILES]

# Fields that every config.json must have: whole numbers, and where they go.
SIZES = {
    "vocab_size": None,  # the weights say it
    "model_length": "model.length",
    "hidden_dim": "model.hidden_size",
    "cond_dim": "model.cond_dim",
    "n_blocks": "model.n_blocks",
    "n_heads": "model.n_heads",
}
# Fields that are plain values of our config; those that are not there say nothing.
VALUES = {
    "dropout": "model.dropout",
    "causal": "algo.causal_attention",
    "time_conditioning": "algo.time_conditioning",
}
# The same, in folders of `mode=export` only.
OWN_VALUES = {
    "algorithm": "algo.name",
    "parameterization": "algo.parameterization",
    "T": "algo.T",
    "subs_masking": "algo.subs_masking",
    "ignore_bos": "algo.ignore_bos",
    "block_size": "algo.block_size",  # there with blocks only
    "noise": "noise.type",
    "noise_eps": "noise.eps",
    "noise_sigma_min": "noise.sigma_min",
    "noise_sigma_max": "noise.sigma_max",
    "tokenizer": "data.tokenizer_name_or_path",
    "training_data": "data.train",
    "validation_data": "data.valid",
}
# Field of `Checkpoint` -> field of config.json, likewise.
OWN_ABOUT = {
    "step": "step",
    "val_ppl": "val_ppl",
    "weights_kind": "weights",
    "likelihood": "likelihood",
}

OWN_RULES = dict.fromkeys(OWN_ABOUT.values(), optional(text)) | {
    "step": optional(count),
    "val_ppl": optional(number),
}


class Format(NamedTuple):
    """What a `model_type` means beside the fields of its config.json."""

    fields: dict[str, str]  # field -> key of our config
    known: dict[str, Any]  # key of our config -> value
    likelihood: str | None = None  # what it is worth, where the algorithm does not say


OWN = "discrete_diffusion"
_BIDIRECTIONAL = {"algo.causal_attention": False}  # where there is no field of it
FORMATS = {
    "DUO": Format(
        VALUES,
        _BIDIRECTIONAL | {"algo.name": "duo", "algo.time_conditioning": True},
        "comparable unless distilled, which the folder does not say",
    ),
    "mdlm": Format(VALUES, _BIDIRECTIONAL | {"algo.name": "mdlm"}),
    OWN: Format(VALUES | OWN_VALUES, {}),
}
BD3LM = "bd3lm"  # of the published block diffusion (arXiv:2503.09573)
# Where a format does not tell, but the id does.
DISTILLED_IDS = ("s-sahoo/duo-distilled",)


def read_hub(name_or_path: str, key: str) -> Checkpoint:
    """Reads a folder or hub id to the CPU.

    Args:
        name_or_path: Local folder or hub id.
        key: Config key that held it, for messages.

    Raises:
        ConfigError: If it cannot be had, or is not of a known format.
    """
    folder = downloaded_folder(name_or_path, key)
    about, weights = _about(folder, name_or_path, key), _read_weights(folder, key)
    return replace(about, weights={own_name(k): x for k, x in weights.items()})


def read_about(name_or_path: str, key: str) -> Checkpoint:
    """Reads what config.json says, and no weights; otherwise as `read_hub`.

    Of a hub id nothing large is downloaded, so that the shapes are not known.
    """
    folder = downloaded_folder(name_or_path, key, [CONFIG, *TOKENIZER_FILES])
    return _about(folder, name_or_path, key, has_weights=os.path.isdir(name_or_path))


def _about(
    folder: Path, name_or_path: str, key: str, has_weights: bool = True
) -> Checkpoint:
    fields = _read_json(folder / CONFIG, key)
    kind = fields.get("model_type")
    if kind == BD3LM:
        raise ConfigError(
            f"{key}={name_or_path!r}: {CONFIG} has model_type={kind!r}, a model of "
            "blocks whose network is not known to be ours, and it is not read; give an "
            "export of mode=export, or a .ckpt file of a run with algo.block_size."
        )
    if not isinstance(kind, str) or kind not in FORMATS:
        choices = ", ".join(FORMATS)
        raise ConfigError(
            f"{key}={name_or_path!r}: {CONFIG} has model_type={kind!r}; those that are "
            f"read: {choices}."
        )
    where = f"{key}={name_or_path!r}: {CONFIG}"
    form = FORMATS[kind]
    if kind != OWN and fields.get("block_size") is not None:
        raise ConfigError(
            f"{where} has block_size={fields['block_size']!r} and model_type={kind!r}: "
            "of models that write block by block, exports of mode=export are read "
            "alone; give one, or a .ckpt file of a run with algo.block_size."
        )
    sizes = _sizes(fields, where)
    shapes = _shapes(folder, key) if has_weights else None
    if shapes is not None:
        of_network = {key.removeprefix("model."): x for key, x in sizes.items()}
        check_sizes(shapes, of_network, where)
    values = form.known | sizes | _values(fields, form, where)
    try:
        check_config(config := _nested(values))
        if kind == OWN:
            fields_of(OWN_RULES)(fields, CONFIG)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from None
    is_distilled = name_or_path in DISTILLED_IDS
    if is_distilled:
        config["algo"]["name"] = "distillation"
    about = Checkpoint(
        config=config,
        outline=shapes,
        format=f"Hugging Face, model_type {kind}",
        source=name_or_path,
        folder=folder,
        likelihood=None if is_distilled else form.likelihood,
    )
    if kind == OWN:
        stated: dict[str, Any] = {
            name: fields.get(field) for name, field in OWN_ABOUT.items()
        }
        about = replace(about, **stated)
    return about


def downloaded_folder(
    name_or_path: str, key: str, files: Sequence[str] = DOWNLOADED
) -> Path:
    """The folder itself, or where a hub id was downloaded to.

    Args:
        name_or_path: Local folder or hub id.
        key: Config key that held it, for messages.
        files: Names and patterns of what is downloaded.

    Raises:
        ConfigError: If there is no such folder, here or on the hub.
    """
    if os.path.isdir(name_or_path):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    try:
        options: dict[str, Any] = hub_options(name_or_path)
        return Path(
            snapshot_download(name_or_path, allow_patterns=list(files), **options)
        )
    except Exception as error:  # of many kinds: offline, not there, not allowed
        raise ConfigError(
            f"{key}={name_or_path!r} is no local folder, and cannot be had from the "
            f"Hugging Face hub ({first_line(error)})."
        ) from None


def own_name(name: str) -> str:
    """Name of a weight with exactly one `backbone.` in front."""
    return "backbone." + re.sub(r"^(backbone\.)+", "", name)


# ---------------------------------------------------------------- config.json


def _sizes(fields: dict[str, Any], where: str) -> dict[str, int]:
    for name in SIZES:
        value = fields.get(name)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise ConfigError(f"{where} has {name}={value!r}, not a number above 0.")
    return {key: fields[name] for name, key in SIZES.items() if key is not None}


# Types of values that are not text.
_TYPES = {
    "dropout": (int, float),
    **dict.fromkeys(("noise_eps", "noise_sigma_min", "noise_sigma_max"), (int, float)),
    **dict.fromkeys(("T", "block_size"), (int,)),
    **dict.fromkeys(
        ("causal", "time_conditioning", "subs_masking", "ignore_bos"), (bool,)
    ),
}


def _values(fields: dict[str, Any], form: Format, where: str) -> dict[str, Any]:
    values = {}
    for name, key in form.fields.items():
        value = fields.get(name)
        if value is None:
            continue
        types = _TYPES.get(name, (str,))
        if type(value) not in types:
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ConfigError(f"{where} has {name}={value!r}, not a {wanted}.")
        values[key] = value
    return values


def _nested(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    config: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, name = key.split(".")
        config.setdefault(group, {})[name] = value
    return config


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = "there is none" if not path.exists() else first_line(error)
        raise ConfigError(
            f"{key}={str(path.parent)!r}: {path.name} cannot be read ({reason})."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{key}={str(path.parent)!r}: {path.name} holds no fields.")
    return content


# ---------------------------------------------------------------- weights


def _read_weights(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """All tensors of a folder, of one file or of several with an index."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for name in _weight_files(folder, key):
        try:
            weights |= load_file(folder / name)
        except Exception as error:  # safetensors raises its own kind, and OSError
            raise ConfigError(
                f"{key}={str(folder)!r}: {name} cannot be read ({first_line(error)})."
            ) from None
    return weights


def _shapes(folder: Path, key: str) -> dict[str, list[int]]:
    """Shapes of all tensors of a folder, which are in the headers of its files."""
    shapes: dict[str, list[int]] = {}
    for name in _weight_files(folder, key):
        try:
            found = _header_shapes(folder / name)
        except Exception as error:  # of a broken file
            raise ConfigError(
                f"{key}={str(folder)!r}: {name} cannot be read ({first_line(error)})."
            ) from None
        shapes |= {own_name(x): shape for x, shape in found.items()}
    return shapes


def _header_shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors of a file: its first 8 bytes tell the length of a JSON object.

    safetensors does the same, but imports numpy or torch for it, at start-up.
    """
    with path.open("rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(MAX_HEADER, path.stat().st_size - 8):
            raise ValueError("its header is larger than the file")
        header = json.loads(file.read(size))
    shapes = {name: x["shape"] for name, x in header.items() if name != "__metadata__"}
    for name, shape in shapes.items():
        if not all(type(x) is int and x >= 0 for x in shape):
            raise ValueError(f"{name} has a shape that is none")
    return shapes


def _weight_files(folder: Path, key: str) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        reason = f"{pickles[0]} is a pickle, which may run code" if pickles else ""
        raise ConfigError(
            f"{key}={str(folder)!r} holds no {WEIGHTS}{reason and f'; {reason}'}."
        )
    names = _read_json(folder / INDEX, key).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or any(name != os.path.basename(str(name)) for name in names):
        raise ConfigError(f"{key}={str(folder)!r}: {INDEX} does not list files.")
    return sorted(set(names))
