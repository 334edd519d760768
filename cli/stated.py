"""A checkpoint is enough: what it says of its run is taken into the config where the
command does not say otherwise. Where it does, and numbers would change, it is refused.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from checkpoints.about import (
    ALIKE,
    BLOCKS,
    TOLD,
    TRANSFORMERS,
    is_plain,
    missing_plugins,
)
from checkpoints.checkpoint import Checkpoint
from checkpoints.keys import check_sizes
from checkpoints.outline import read_about
from checkpoints.schema import leaves
from cli.checks import SPLITS
from cli.commandline import composed, explain
from cli.known_keys import INERT_KEYS, files_of
from data.registry import check_splits
from data.tokenizers import PIXELS
from utils import CONFIGS, ConfigError, choices_of, require

# By mode: the key of the checkpoint whose words are taken over.
EVALUATED = "eval.checkpoint_path"
KEYS = {
    **dict.fromkeys(("ppl_eval", "sample_eval", "fid_eval", "export"), EVALUATED),
    "train": "training.finetune_path",
}
GROUPS = ("algo", "model", "noise", "data")
TOKENIZER = "data.tokenizer_name_or_path"
# What belongs to the tokenizer or the classes, whatever the data are.
OF_TOKENIZER = (TOKENIZER, "data.vocab_size", "data.bos_token", "data.num_classes")
OF_TRAINING = ("training.sampling_eps", TOLD)
# What an evaluation need not have from the training.
LEFT = (
    *("algo._target_", "algo.name", "algo.curriculum"),
    *("model.name", "model.type", "model.dropout", "model.attention", "model.scan"),
    *("data.cache_dir", "data.num_proc"),
    *INERT_KEYS,
)
# Of an algorithm that is chosen in the place of one that is alike.
OF_ANY_ALGORITHM = (
    *("algo.backbone", "algo.time_conditioning", "algo.subs_masking"),
    *("algo.ignore_bos", BLOCKS),
)
# Where a command may not say otherwise without `eval.differing`; a group stands for its
# keys. What it says of others holds.
BINDING = (
    *OF_ANY_ALGORITHM,
    *("algo.name", "algo.parameterization", "algo.causal_attention", "algo.T"),
    *("model", "noise", *OF_TOKENIZER, *OF_TRAINING),
)
# What `eval.differing` may hold; a group stands for its keys.
MAY_DIFFER = (
    "algo",
    "noise",
    "model.length",
    TOKENIZER,
    "data.bos_token",
    *OF_TRAINING,
)
CALLED = {"algo.name": "algo", "noise.type": "noise"}  # as on the command line
PREDICTORS = {"dimo": "one_step"}  # of algorithms that no other sampler samples from


class Said(NamedTuple):
    """What a command says, and where."""

    groups: Mapping[str, str]  # chosen ones -> "" or the recipe
    keys: Mapping[str, str]

    def where(self, key: str) -> str | None:
        """ "" of the command line, or the recipe; None: it does not say."""
        parts = key.split(".")
        names = [".".join(parts[: i + 1]) for i in range(len(parts))]
        found = (self.keys[name] for name in names if name in self.keys)
        return next(found, None)


def said(overrides: Iterable[str], folders: Sequence[str | Path]) -> Said:
    """What overrides say, and the recipe that they choose.

    Args:
        overrides: Of the command line, without those of Hydra.
        folders: Of configs, in which there may be the recipe.
    """
    groups: dict[str, str] = {}
    keys: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "experiment":
            for name in value.strip("[]").split(","):
                chosen, inner = _recipe(name.strip(), folders)
                recipe = f"experiment={name.strip()}"
                groups |= {x: recipe for x in chosen if x not in groups}
                keys |= {x: recipe for x in inner if x not in keys}
        elif _group(override) in GROUPS:
            groups[_group(override)] = ""
        else:
            keys[key] = ""
    return Said(groups, keys)


def _recipe(name: str, folders: Sequence[str | Path]) -> tuple[set[str], set[str]]:
    """Groups and keys that a file of `experiment/` and those it builds upon set."""
    paths = (Path(folder) / "experiment" / f"{name}.yaml" for folder in folders)
    path = next((x for x in paths if x.is_file()), None)
    if path is None:
        return set(), set()
    node: Any = OmegaConf.to_container(OmegaConf.load(path))
    groups, keys = set(), {key for key, _ in leaves(node) if key != "defaults"}
    for entry in node.get("defaults", ()):
        if isinstance(entry, dict):
            group = str(next(iter(entry))).removeprefix("override ").lstrip("/")
            groups.add(group)
        elif entry != "_self_":
            inner = os.path.join("experiment", os.path.dirname(name), str(entry))
            inner = inner if not entry.startswith("/") else entry.lstrip("/")
            more = _recipe(inner.removeprefix("experiment/"), folders)
            groups, keys = groups | more[0], keys | more[1]
    return groups & set(GROUPS), keys


# ---------------------------------------------------------------- the whole of it


def take_over_as_given(config: DictConfig) -> None:
    """`take_over` with the words of the command line; nothing outside of Hydra's jobs.

    Arguments and errors are those of `take_over`.
    """
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return
    node: Any = HydraConfig.get()
    words = list(node.overrides.task)
    of_hydra = [x for x in node.overrides.hydra if x.startswith("hydra.searchpath")]
    sources = [x.path for x in node.runtime.config_sources if x.schema == "file"]

    def compose(choices: list[str]) -> DictConfig:
        kept = without(words, choices)
        return hydra.compose(node.job.config_name, [*choices, *kept, *of_hydra])

    take_over(config, words, compose, sources or [CONFIGS])


def take_over_from(config: DictConfig, words: Sequence[str]) -> None:
    """`take_over` in a process that Hydra does not run.

    Args:
        config: Composed of `words`; changed in place.
        words: KEY=VALUE each.
    """

    def compose(choices: list[str]) -> DictConfig:
        return composed([*choices, *without(words, choices)])

    take_over(config, words, compose)


def take_over(
    config: DictConfig,
    overrides: Sequence[str],
    compose: Callable[[list[str]], DictConfig],
    folders: Sequence[str | Path] = (CONFIGS,),
) -> None:
    """Gives a config what the checkpoint of its mode says, where the command does not.

    In training these are the sizes of the network alone.

    Args:
        config: Composed of `overrides`; changed in place. Its checkpoint's path is
            absolute.
        overrides: What the command says.
        compose: Composes a config of further choices of groups and the same overrides.
        folders: Of configs.

    Raises:
        ConfigError: If both say something, not the same, and numbers would change; or
            if the checkpoint cannot be read.
    """
    key = KEYS.get(config.mode)
    path = OmegaConf.select(config, key) if key else None
    if key is None or not isinstance(path, str) or not path:
        return
    given = said(overrides, folders)
    trusted = config.checkpointing.trusted_classes
    about = read_about(path, key, tuple(trusted))
    if config.mode != "train":
        where = f"{key}={path!r}"
        if take(config, about, given, compose, where) and config.mode in SPLITS:
            _check_data(config, where)
        return
    stated = dict(_stated(about))
    if stated.get("model.type", config.model.type) == config.model.type:
        _take(config, {x: y for x, y in stated.items() if _is_size(x)}, given)


def take(
    config: DictConfig,
    about: Checkpoint,
    given: Said,
    compose: Callable[[list[str]], DictConfig],
    where: str,
    refuses: bool = True,
) -> bool:
    """Gives a config what a checkpoint says, as `take_over` does.

    Args:
        config: Changed in place.
        about: The checkpoint.
        given: What the command says.
        compose: As in `take_over`.
        where: What the checkpoint is called in messages.
        refuses: Whether contradictions are refused; else what is given holds.

    Returns:
        Whether the data are the checkpoint's, too.
    """
    stated = dict(_stated(about))
    advice = missing_plugins(about, config)
    if refuses:
        of_choices = {x: y for x, y in stated.items() if x in CALLED}
        _refuse_contradictions(config, of_choices, given, where)
    if choices := _choices(config, stated, given):
        try:
            other = compose(choices)
        except (HydraException, ConfigError) as error:
            chosen = " ".join(choices)
            reason = explain(error) if isinstance(error, HydraException) else str(error)
            raise ConfigError(
                f"{where} was trained with {chosen}: {reason}{advice}"
            ) from None
        for group in map(_group, choices):
            OmegaConf.update(config, group, other[group], merge=False)
    if refuses:
        _refuse_contradictions(config, stated, given, where)
    takes_data = about.is_own and "data" not in given.groups
    names = [x for x in stated if _is_taken(x, config, stated, takes_data)]
    _take(config, {x: stated[x] for x in names}, given)
    if about.shapes and config.algo.backbone in TRANSFORMERS:
        sizes = {x.removeprefix("model."): stated[x] for x in names if _is_size(x)}
        check_sizes(about.shapes, sizes, where)
    if given.where("sampling.predictor") is None and config.algo.name in PREDICTORS:
        config.sampling.predictor = PREDICTORS[config.algo.name]
    return takes_data


def _check_data(config: DictConfig, where: str) -> None:
    """Refuses data of a checkpoint that are not here."""
    try:
        check_splits(config, SPLITS[config.mode](config))
    except ConfigError as error:
        raise ConfigError(
            f"{where} was trained on data that are not here ({error}). Give data=..., "
            "such as data=text_files data.path=FILES."
        ) from None


# ---------------------------------------------------------------- what is stated


def _stated(about: Checkpoint) -> Iterator[tuple[str, Any]]:
    """Keys and plain values that a checkpoint states of its run."""
    for key, value in leaves(about.config or {}):
        if key in OF_TRAINING or key.split(".")[0] in GROUPS:
            is_open = value is None and not key.startswith("data.")
            if key not in (TOKENIZER, BLOCKS) and is_plain(value) and not is_open:
                yield key, value
    size = about.setting(BLOCKS)
    if about.setting("algo.name") is not None and is_plain(size):
        yield BLOCKS, size
    tokenizer = tokenizer_of(about)
    if tokenizer is not None:
        yield TOKENIZER, tokenizer


def tokenizer_of(about: Checkpoint) -> str | None:
    """That of a run by its name, else the one in the checkpoint's own folder."""
    stated = about.setting(TOKENIZER)
    if isinstance(stated, str) and is_plain(stated):
        return stated
    folder = about.folder
    has_own = folder is not None and (folder / "tokenizer_config.json").exists()
    return about.source if has_own else None


def _is_size(key: str) -> bool:
    is_kind = key in ("model.type", "model.length")
    return key.startswith("model.") and not is_kind and not _in(key, LEFT)


def _in(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of these, or inside of one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


# ---------------------------------------------------------------- contradictions


def _differing(config: DictConfig) -> list[str]:
    """The keys of `eval.differing`, a list or a single one."""
    value = config.eval.differing
    names = list(value) if isinstance(value, ListConfig) else [value]
    for name in names:
        if not (isinstance(name, str) and _in(name, MAY_DIFFER) and _has(config, name)):
            require(name, MAY_DIFFER, "eval.differing")
    return names


def _refuse_contradictions(
    config: DictConfig, stated: Mapping[str, Any], given: Said, where: str
) -> None:
    """Refuses values of the command that would change the numbers of a checkpoint."""
    differing = _differing(config)
    for key, theirs in stated.items():
        origin = given.where(key)
        if key in CALLED and origin is None:
            origin = given.groups.get(key.split(".")[0])
        ours = OmegaConf.select(config, key)
        if origin is None or _in(key, differing):
            continue
        if _is_same(key, ours, theirs) or not _is_binding(key, config, stated):
            continue
        name = CALLED.get(key, key)
        of_recipe = f" ({origin})" if origin else ""
        may = f"; if it is meant, add eval.differing=[{name}]"
        raise ConfigError(
            f"{name}={_shown(ours)}{of_recipe} contradicts {where}, which was trained "
            f"with {name}={_shown(theirs)}: leave it out, or give {name}="
            f"{_shown(theirs)}{may if _in(name, MAY_DIFFER) else ''}."
        )


def _is_binding(key: str, config: DictConfig, stated: Mapping[str, Any]) -> bool:
    """Whether a value of the command has to be the checkpoint's."""
    if key == TOLD:  # else the network is told nothing
        return bool(config.algo.time_conditioning)
    if key.startswith("noise.") and key != "noise.type":
        return bool(config.noise.type == stated.get("noise.type"))
    if key == "algo.T":  # of a distillation it is the first gap
        return bool(config.algo.name == stated.get("algo.name"))
    return _in(key, BINDING) and (key in CALLED or not _in(key, LEFT))


def _is_same(key: str, ours: Any, theirs: Any) -> bool:
    ours = OmegaConf.to_container(ours) if OmegaConf.is_config(ours) else ours
    if ours == theirs:
        return True
    if key == BLOCKS and isinstance(theirs, list):
        return ours in theirs  # each row of the training had one of them
    if key == "algo.name":
        return any({ours, theirs} <= names for names in ALIKE)
    if key == "algo.backbone":
        return {ours, theirs} <= set(TRANSFORMERS)
    if key == TOKENIZER:
        return _may_be_one(str(ours), str(theirs))
    return False


def _may_be_one(one: str, other: str) -> bool:
    """Whether two names may be of one tokenizer: only loading a folder tells."""
    if {one, other} <= set(PIXELS):
        return True
    names = {os.path.basename(x.rstrip("/")) for x in (one, other)}
    return len(names) == 1 or any(os.path.exists(x) for x in (one, other))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


# ---------------------------------------------------------------- taking over


def _choices(config: DictConfig, stated: Mapping[str, Any], given: Said) -> list[str]:
    """Files of groups that the checkpoint needs, as overrides."""
    found = []
    name = stated.get("algo.name")
    if name not in (None, config.algo.name) and "algo" not in given.groups:
        found.append(f"algo={name}")
    for group in ("noise", "model"):
        kind = stated.get(f"{group}.type")
        if kind in (None, config[group].type):
            continue
        if group == "noise" and group in given.groups:
            continue  # the same, or another on purpose
        files = files_of(group)
        stems = [x for x in choices_of(group) if files[x].get("type") == kind]
        stems.sort(key=lambda name: (name[0].isdigit(), name))  # sizes come last
        found.append(f"{group}={stems[0] if stems else kind}")
    return found


def _is_taken(
    key: str, config: DictConfig, stated: Mapping[str, Any], takes_data: bool
) -> bool:
    group = key.split(".")[0]
    if _in(key, LEFT):
        return False
    if group == "data":
        return takes_data or key in OF_TOKENIZER
    if group == "noise":
        return bool(config.noise.type == stated.get("noise.type"))
    is_alike = config.algo.name != stated.get("algo.name", config.algo.name)
    return group != "algo" or not is_alike or key in OF_ANY_ALGORITHM


def _take(config: DictConfig, stated: Mapping[str, Any], given: Said) -> None:
    """Sets values that the command does not give; of data also keys that are new."""
    for key, value in stated.items():
        is_there = key.startswith("data.") or _has(config, key)
        if is_there and given.where(key) is None:
            OmegaConf.update(config, key, value, force_add=True)


def without(overrides: Iterable[str], choices: Iterable[str]) -> list[str]:
    """Overrides but for choices of the groups of others."""
    groups = set(map(_group, choices))
    return [x for x in overrides if _group(x) not in groups]


def _group(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].lstrip("/")


def _has(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in node.keys()  # noqa: SIM118
