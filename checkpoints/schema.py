"""What is believed of a checkpoint: types, ranges, shapes of all that is used of it.

A file is somebody's word. What it says is compared with these rules before anything
else looks at it; a misfit is a `ValueError` of one line. `check_content` holds whatever
a file is read for, `check_training` in addition where training goes on from it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:  # what a file says of itself is checked without torch
    import torch
    from torch import Tensor

Rule = Callable[[Any, str], None]  # of a value and what it is called

MAX_COUNT = 1 << 53
MAX_TEXT = 10_000  # characters


def is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a tensor; nothing is where torch has not been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def shown(value: Any) -> str:
    """A value in a message: what is short as it is, of all else the type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    if is_tensor(value):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a tensor {tuple(value.shape)} of {kind}"
    return f"a {type(value).__name__}"


def refuse(value: Any, where: str, wanted: str) -> None:
    """Raises the ValueError of a misfit."""
    raise ValueError(f"its {where} is {shown(value)}, not {wanted}")


# ---------------------------------------------------------------- rules


def count(value: Any, where: str) -> None:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        refuse(value, where, "a whole number of at least 0")


def size(value: Any, where: str) -> None:
    if type(value) is not int or not 1 <= value < 1 << 31:
        refuse(value, where, "a whole number above 0")


def number(value: Any, where: str) -> None:
    is_number = type(value) in (int, float) and abs(value) < 1e300  # false for NaN, too
    if not is_number:
        refuse(value, where, "a finite number")


def share(value: Any, where: str) -> None:
    number(value, where)
    if not 0 <= value <= 1:
        refuse(value, where, "between 0 and 1")


def flag(value: Any, where: str) -> None:
    if type(value) is not bool:
        refuse(value, where, "True or False")


def text(value: Any, where: str) -> None:
    if type(value) is not str or len(value) > MAX_TEXT:
        refuse(value, where, "a text")


def name(value: Any, where: str) -> None:
    """What may stand in the name of a file, without a folder."""
    text(value, where)
    if not re.fullmatch(r"\w[\w .+-]*", value):
        refuse(value, where, "a plain name")


def tensor(value: Any, where: str) -> None:
    if not is_tensor(value):
        refuse(value, where, "a tensor")


def floats(value: Any, where: str) -> None:
    if not is_tensor(value) or not value.is_floating_point():
        refuse(value, where, "a tensor of floats")


def scalar(value: Any, where: str) -> None:
    if not is_tensor(value) or value.numel() != 1 or value.is_complex():
        number(value, where)


def sizes(value: Any, where: str) -> None:
    """A size, or a list of them."""
    for one in value if isinstance(value, (list, tuple)) and value else (value,):
        size(one, where)


def optional(rule: Rule) -> Rule:
    """None, or what the rule says."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return check


def each(rule: Rule) -> Rule:
    """A list of such values."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, (list, tuple)):
            refuse(value, where, "a list")
        for index, inner in enumerate(value):
            rule(inner, f"{where}[{index}]")

    return check


def table(rule: Rule, key: Rule = text) -> Rule:
    """A dict of such values."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(value, where, "a dict")
        for inner, entry in value.items():
            key(inner, f"{where}'s key")
            rule(entry, f"{where}[{shown(inner)}]")

    return check


def fields(rules: Mapping[str, Rule], needed: tuple[str, ...] = ()) -> Rule:
    """A dict with entries of these names, and others.

    Args:
        rules: Of the entries that are there.
        needed: Those that have to be.
    """

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(value, where, "a dict")
        for entry in needed:
            if entry not in value:
                raise ValueError(f"its {where} has no {entry}")
        for entry, rule in rules.items():
            if entry in value:
                rule(value[entry], f"{where}.{entry}")

    return check


def like(template: Any, whole: Rule | None = None) -> Rule:
    """What has the types of another value, all the way down.

    Args:
        template: None stands for any value; so does an empty dict or list.
        whole: Of the whole numbers in it, if not any will do.
    """

    def check(value: Any, where: str) -> None:
        if isinstance(template, dict):
            inner = {key: like(entry, whole) for key, entry in template.items()}
            fields(inner, tuple(inner))(value, where)
            if template and value.keys() != template.keys():  # may become attributes
                refuse(value, where, f"a dict of {', '.join(template)} alone")
        elif isinstance(template, (list, tuple)):
            each(like(template[0], whole) if template else _anything)(value, where)
        elif is_tensor(template):
            same = is_tensor(value) and value.shape == template.shape
            if not same or value.is_complex() != template.is_complex():
                refuse(value, where, shown(template))
        elif type(template) is int and whole is not None:
            whole(value, where)
        elif type(template) in _OF_TYPE:
            _OF_TYPE[type(template)](value, where)

    return check


def _anything(value: Any, where: str) -> None:
    pass


def _whole(value: Any, where: str) -> None:
    if type(value) is not int or abs(value) >= MAX_COUNT:
        refuse(value, where, "a whole number")


_OF_TYPE: dict[type, Rule] = {
    bool: flag,
    int: _whole,
    float: scalar,
    str: text,
}

# ---------------------------------------------------------------- whatever it is for

EMA = fields(
    {
        "decay": share,
        "num_updates": optional(count),
        "shadow_params": each(floats),
    },
    needed=("decay", "num_updates", "shadow_params"),
)
# What tells a run from others; see `training.identity`.
IDENTITY = fields(
    {"settings": table(_anything), "course": table(_anything), "data": table(text)},
    needed=("settings", "course", "data"),
)
CONTENT: dict[str, Rule] = {
    "ema": optional(EMA),
    "identity": optional(IDENTITY),
    "global_step": optional(count),
    "epoch": optional(count),
    "teacher": optional(fields({"round": optional(count), "sha256": text})),
    "pytorch-lightning_version": optional(text),
}
# Of the run's config: what is taken over or compared.
CONFIG: dict[str, Rule] = {
    "algo.name": name,
    "algo.backbone": name,
    "algo.parameterization": name,
    "algo.compat": name,
    "algo.T": count,
    "algo.time_conditioning": flag,
    "algo.causal_attention": flag,
    "algo.subs_masking": flag,
    "algo.ignore_bos": flag,
    "algo.block_size": sizes,
    "algo.update_teacher_every": size,
    "algo.grow_dt_every": size,
    "algo.teacher_ema": flag,
    "data.tokenizer_name_or_path": text,
    "data.train": text,
    "data.valid": text,
    "data.vocab_size": size,
    "model.length": size,
    "model.hidden_size": size,
    "model.cond_dim": size,
    "model.n_blocks": size,
    "model.n_heads": size,
    "model.dropout": share,
    "noise.type": name,
    "noise.eps": share,
    "noise.sigma_min": number,
    "noise.sigma_max": number,
    "loader.batch_size": size,
    "trainer.devices": size,
    "trainer.num_nodes": size,
}


def check_content(content: Mapping[Any, Any]) -> None:
    """Whatever a file is read for: its weights, and what it says that it is.

    Args:
        content: Of the file; its config is plain data. What is there in the place of
            weights or of a config, but is none, is passed over: then it has none.

    Raises:
        ValueError: With a line that names the entry.
    """
    for entry, rule in CONTENT.items():
        if entry in content:
            rule(content[entry], entry)
    weights = content.get("state_dict")
    if isinstance(weights, dict):
        table(tensor)(weights, "state_dict")
    settings = content.get("hyper_parameters")
    config = settings.get("config") if isinstance(settings, dict) else None
    if isinstance(config, dict):
        check_config(config)


def check_config(config: Mapping[str, Any]) -> None:
    """What is taken over or compared of a run's config, as far as it is stated."""
    for key, rule in CONFIG.items():
        value = setting(config, key)
        is_open = isinstance(value, str) and is_reference(value)
        if value is not None and not is_open:
            rule(value, f"config's {key}")


def setting(config: Any, key: str) -> Any:
    """A value of a nested dict by a dotted key; None if it does not say."""
    for entry in key.split("."):
        if not isinstance(config, dict):
            return None
        config = config.get(entry)
    return config


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of a nested dict with their dotted keys; lists are values, and an empty
    dict has none."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, node


def is_reference(value: Any) -> bool:
    """Whether this holds a text that OmegaConf would replace by another value."""
    if isinstance(value, dict):
        return any(map(is_reference, [*value.keys(), *value.values()]))
    if isinstance(value, (list, tuple)):
        return any(map(is_reference, value))
    return isinstance(value, str) and "${" in value


# ---------------------------------------------------------------- to go on training

_VERSION = re.compile(
    r"([2-9]|\d\d)(\.\d{1,4}){1,2}(\.?(a|b|rc|post|dev)\d{0,4})?(\+[a-z0-9]{1,20})?"
)


def _version(value: Any, where: str) -> None:
    text(value, where)
    if not _VERSION.fullmatch(value):
        refuse(value, where, "a version of Lightning from 2.0 on")


def _entry(value: Any, where: str) -> None:
    """Of a parameter's state."""
    if not is_tensor(value) or not value.is_floating_point():
        number(value, where)


GROUP = fields(
    {"params": each(count), "lr": scalar, "initial_lr": scalar},
    needed=("params", "lr"),
)
OPTIMIZER = fields(
    {"state": table(table(optional(_entry)), key=count), "param_groups": each(GROUP)},
    needed=("state", "param_groups"),
)
TRAINING: dict[str, Rule] = {
    "state_dict": table(tensor),
    "global_step": count,
    "epoch": count,
    "pytorch-lightning_version": _version,
    "optimizer_states": each(OPTIMIZER),
    "lr_schedulers": each(table(_anything)),
    "callbacks": table(table(_anything, key=_anything)),
    "training": fields(
        {
            "validation_due": flag,
            "logged_step": count,
            "likelihood": floats,
            "noise": count,
        },
        needed=("validation_due", "logged_step", "likelihood"),
    ),
    "MixedPrecision": table(scalar),
}
OF_TRAINING = (
    "global_step",
    "epoch",
    "pytorch-lightning_version",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
)
# Entries of Adam's state; without them its step reads beyond its memory.
_ADAM = {"step", "exp_avg", "exp_avg_sq"}


def check_training(
    content: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    schedule: Mapping[str, Any],
) -> None:
    """What training goes on with, beside the weights.

    Args:
        content: Of a file, after `check_content`.
        optimizer: A new one of the run.
        schedule: State of a new schedule of the learning rate of the run.

    Raises:
        ValueError: With a line that names the entry.
    """
    fields(TRAINING, OF_TRAINING)(content, "content")
    states = content["optimizer_states"]
    if len(states) != 1 or len(content["lr_schedulers"]) > 1:
        raise ValueError(f"it has the state of {len(states)} optimisers, not of one")
    check_optimizer(states[0], optimizer)
    for state in content["lr_schedulers"]:
        known = {key: like(value) for key, value in schedule.items()}
        fields(known)(state, "lr_schedulers[0]")
        count(state.get("last_epoch"), "lr_schedulers[0].last_epoch")
        for key in state.keys() - known.keys():  # would become an attribute
            del state[key]
    if "training" in content:
        sums = content["training"]["likelihood"]
        if sums.dim() != 2 or sums.shape[1] != 6 or not 1 <= len(sums) < 1 << 20:
            refuse(sums, "training.likelihood", "of shape (ranks, 6)")
        settings = content.get("hyper_parameters")
        config = settings.get("config") if isinstance(settings, dict) else None
        for key in ("loader.batch_size", "trainer.devices", "trainer.num_nodes"):
            size(setting(config, key), f"config's {key}")


def check_optimizer(state: Any, optimizer: torch.optim.Optimizer) -> None:
    """Whether the tensors of a state have the shapes of the optimiser's parameters.

    Kernels of optimisers trust them, and write beyond the memory of those that do not.
    """
    from torch.optim import Adam

    where = "optimizer_states[0]"
    theirs = [group["params"] for group in state["param_groups"]]
    ours = [group["params"] for group in optimizer.param_groups]
    if list(map(len, theirs)) != list(map(len, ours)):
        raise ValueError(f"its {where} is of another number of parameters")
    numbers = [number for group in theirs for number in group]
    if len(set(numbers)) != len(numbers) or not state["state"].keys() <= {*numbers}:
        raise ValueError(f"its {where} numbers its parameters twice or not at all")
    parameters = [parameter for group in ours for parameter in group]
    is_adam = isinstance(optimizer, Adam)  # AdamW is one
    for number, parameter in zip(numbers, parameters, strict=True):
        entries = state["state"].get(number, {})
        if is_adam and entries and not entries.keys() >= _ADAM:
            raise ValueError(f"its {where} lacks a part of parameter {number}")
        for key, value in entries.items():
            place = f"{where}.state[{number}].{key}"
            if key == "step":
                scalar(value, place)
                if not 0 <= float(value) < MAX_COUNT:
                    refuse(float(value), place, "a number of steps")
            elif is_tensor(value) and value.shape != parameter.shape:
                refuse(value, place, f"of shape {tuple(parameter.shape)}")
            elif is_adam and key in _ADAM:
                floats(value, place)
