"""What makes a run this run and no other one: a record that its checkpoints hold, and
that is compared where training goes on.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from checkpoints.checkpoint import Checkpoint
from checkpoints.schema import leaves, shown
from data.marks import OTHER, SAME, compared
from training.resume import KEY, Resumed
from utils import ConfigError

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

NAME = "identity"  # of the record in a checkpoint
# What may not change: algorithm and loss, network, noise. A group stands for its keys.
SETTINGS = (
    *("algo", "model", "noise", "training.sampling_eps"),
    "training.change_of_variables",  # what the network is told of the noise
)
# What may: how the same model is trained.
COURSE = (
    *("seed", "optim", "lr_scheduler", "training", "model.dropout", "algo._target_"),
    *("loader.global_batch_size", "loader.batch_size", "trainer.accelerator"),
    *("trainer.max_steps", "trainer.devices", "trainer.num_nodes", "trainer.precision"),
    *("trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
    *("strategy._target_", "data.shuffle_rows", "data.flip"),
)
# Of neither: names, places, and what computes the same in another way.
OF_NEITHER = (
    *("model.name", "model.attention", "model.scan", "algo.backbone"),
    "training.finetune_path",
    *("algo.curriculum.cache_dir", "algo.curriculum.integral_cache_path"),
)
# Of which a line of its own says what holds (`training.resume.adapt`).
SAID_ELSEWHERE = (
    *("optim.lr", "loader.batch_size", "trainer.devices", "trainer.num_nodes"),
    *("trainer.accumulate_grad_batches", "trainer.accelerator"),
)
MOST = 3  # differences in a line


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The keys that make a run another run, with their values."""
    return _values(config, SETTINGS, COURSE)


def course_of(config: DictConfig) -> dict[str, Any]:
    """The keys that a run may change on its way, with their values."""
    return _values(config, COURSE, SETTINGS)


def _values(
    config: DictConfig, keys: Iterable[str], others: Iterable[str]
) -> dict[str, Any]:
    """Values below some keys, by dotted keys, but for others; lists as they are."""
    left_out = {*others, *OF_NEITHER}
    found: dict[str, Any] = {}
    for key in keys:
        node = OmegaConf.select(config, key)
        if OmegaConf.is_config(node):
            node = OmegaConf.to_container(node, resolve=True)
        found |= ((k, x) for k, x in leaves(node, key) if k not in left_out)
    return found


def record_of(config: DictConfig, data: Mapping[str, str]) -> dict[str, Any]:
    """The record, plain data.

    Args:
        config: The run's.
        data: What tells the tokenizer and the rows from others, by names of DATA.
    """
    settings, course = settings_of(config), course_of(config)
    return {"settings": settings, "course": course, "data": dict(data)}


# What the data's marks are of, by their names in the record.
DATA = {
    "tokenizer": "the tokenizer",
    "train": "the training data",
    "valid": "the validation data",
}

SAID = {
    "tokenizer": "going on with them",
    "train": "going on at the same place of these",
    "valid": "val/* and best.ckpt of before and after cannot be compared",
}

# ---------------------------------------------------------------- comparing


def refuse_other_settings(resumed: Resumed, config: DictConfig) -> None:
    """Refuses to go on with a run of another algorithm, network, noise or loss.

    Raises:
        ConfigError: With the differences and both ways on.
    """
    theirs = _record(resumed.checkpoint).get("settings", {})
    changes = _changes(theirs, settings_of(config))
    changes.sort(key=lambda change: not change.startswith("algo.name="))
    if changes:
        raise _another(resumed, config, _some(changes))


def refuse_other_data(
    resumed: Resumed, config: DictConfig, data: Mapping[str, str]
) -> None:
    """Refuses to go on with other rows, and says what else is another.

    Args:
        resumed: Where training goes on.
        config: The run's.
        data: As in `record_of`.

    Raises:
        ConfigError: If tokenizer or training data are not those of the checkpoint.
    """
    record, theirs = _record(resumed.checkpoint), data_marks(resumed.checkpoint)
    found = {x: compared(theirs[x], data[x]) for x in DATA if x in theirs and x in data}
    for name in ("tokenizer", "train"):
        if found.get(name) == OTHER:
            verb = "differs" if name == "tokenizer" else "differ"
            here = f"{DATA[name]} {verb} ({_place(config, name)} here)"
            raise _another(resumed, config, here)
    for name, result in found.items():
        if result != SAME:
            warn("%s differ from those of %s: %s", DATA[name], resumed.path, SAID[name])
    changes = [
        f"{key}={shown(value)} holds, {shown(record['course'][key])} does not"
        for key, value in course_of(config).items()
        if key not in SAID_ELSEWHERE
        and key in record.get("course", {})
        and record["course"][key] != value
    ]
    if changes:
        warn("what has changed since %s: %s", resumed.path, _some(changes, 8))


def data_marks(checkpoint: Checkpoint) -> Mapping[str, str]:
    """What a checkpoint says of tokenizer and data, by names of DATA."""
    marks: Mapping[str, str] = _record(checkpoint).get("data", {})
    return marks


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of older files, and of those of the published code, there is none."""
    record = checkpoint.lightning.get(NAME)
    return record if isinstance(record, dict) else {}


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Of keys that both have: a version of the code may know further ones."""
    return [
        f"{key}={shown(value)} here, {shown(theirs[key])} there"
        for key, value in ours.items()
        if key in theirs and theirs[key] != value
    ]


def _some(changes: list[str], most: int = MOST) -> str:
    more = f"; and {len(changes) - most} more" if changes[most:] else ""
    return "; ".join(changes[:most]) + more


def _place(config: DictConfig, name: str) -> str:
    data = config.data
    is_tokenizer = name == "tokenizer"
    keys = ["tokenizer_name_or_path"] if is_tokenizer else ["path", "source", "train"]
    key = next(key for key in keys if data.get(key) is not None)
    return f"data.{key}={data[key]}"


def _another(resumed: Resumed, config: DictConfig, difference: str) -> ConfigError:
    own = f"{config.checkpointing.save_dir}/"
    way = f"leave out {KEY}"
    if resumed.path.startswith(own):
        way = "give another hydra.run.dir or checkpointing.save_dir"
    return ConfigError(
        f"{resumed.path} is of another run: {difference}. To train this one from its "
        f"beginning {way}; to start it from those weights give another folder and "
        f"training.finetune_path={resumed.path}."
    )
