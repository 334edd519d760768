"""Which keys of a config something reads; any other is refused, however it was added.

Known are the keys of the files in `configs/`, for a group those of the files of the
same kind as what is chosen, and the arguments of whatever has a `_target_`.
"""

import functools
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf

from cli.hints import key_hint
from utils import ADDED, CONFIGS, ConfigError, did_you_mean, first_line

# Keys that exist in published configs and change nothing in the published code. They
# are accepted at the published value; any other value is refused, not ignored.
INERT_KEYS = {
    "model.tie_word_embeddings": False,
    "model.vocab_lookup": True,
    "model.scale_by_sigma": True,
    "model.temb_strategy": "adaln",
    "model.data_min_max": [0, 255],
    "model.input_channels": 3,
    "model.output_channels": -1,
    "model.time_conditioning": True,
    "prior.type": "none",
    "prior.latent_width": 0,
    "prior.latent_height": 0,
    "algo.posterior_loss_weight": 0.0,
    "data.insert_train_spacial": False,
}
OPTIONAL = (
    *("algo.loss_type", "training.importance_sampling", "training.change_of_variables"),
    *INERT_KEYS,
)  # no file needs them
# Nodes whose keys the user names, or that are for others.
FREE = ("hydra", "wandb", "report.checkpoints")
# By group: the keys by which two of its files are of one kind.
KINDS = {
    "algo": ("_target_",),
    "data": ("train", "valid"),
    "model": ("type",),
    "noise": ("type",),
    "prior": ("type",),
}
BUILT = ("trainer", "strategy", "lr_scheduler")  # from the `_target_` of the node
BUILT_EACH = ("callbacks", "logger")  # each of their nodes
OF_HYDRA = frozenset(("_target_", "_partial_", "_convert_", "_recursive_", "_args_"))
# Where arguments go that these do not name.
FORWARDED = {
    "training.trainer.Trainer": "lightning.Trainer",
    "lightning.pytorch.strategies.DDPStrategy": (
        "torch.nn.parallel.DistributedDataParallel"
    ),
}
TRAINER = "training.trainer.Trainer"
# The arguments of what takes long to import, which are known without that.
ARGUMENTS = {
    TRAINER: frozenset(
        (
            *("accelerator", "strategy", "devices", "num_nodes", "precision", "logger"),
            *("callbacks", "fast_dev_run", "max_epochs", "min_epochs", "max_steps"),
            *("min_steps", "max_time", "limit_train_batches", "limit_val_batches"),
            *("limit_test_batches", "limit_predict_batches", "overfit_batches"),
            *("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
            *("log_every_n_steps", "enable_checkpointing", "enable_progress_bar"),
            *("enable_model_summary", "accumulate_grad_batches", "gradient_clip_val"),
            *("gradient_clip_algorithm", "deterministic", "benchmark"),
            *("inference_mode", "use_distributed_sampler", "profiler"),
            *("detect_anomaly", "barebones", "plugins", "sync_batchnorm"),
            *("reload_dataloaders_every_n_epochs", "default_root_dir"),
            *("enable_autolog_hparams", "model_registry"),
        )
    )
}
# Arguments that would be ignored, because the code gives them, and what does the same.
TAKEN = {
    "lr_scheduler.optimizer": "optim.KEY=...",
    "logger.wandb.config": "wandb.KEY=...",
    "trainer.callbacks": "callbacks=...",
    "trainer.default_root_dir": "hydra.run.dir=...",
    "trainer.logger": "logger=...",
    "trainer.overfit_batches": "trainer.limit_train_batches=...",
    "trainer.plugins": "strategy=... or trainer.precision=...",
    "trainer.strategy": "strategy=...",
    "trainer.use_distributed_sampler": "nothing; devices read rows of their own",
    "wandb.config": "no other config; the whole one is logged",
    "wandb.save_dir": "checkpointing.save_dir=...",
}


class Added(NamedTuple):
    """A key that no file has, and what is built from its node."""

    node: str
    name: str
    target: str | None = None

    @property
    def key(self) -> str:
        return f"{self.node}.{self.name}" if self.node else self.name


def refuse_unread(config: DictConfig) -> None:
    """Refuses keys that nothing reads; see `refuse_arguments` for what is built.

    Raises:
        ConfigError: With the most similar key.
    """
    for key, instead in TAKEN.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(config, group)
        if isinstance(node, DictConfig) and name in node.keys():  # noqa: SIM118
            raise ConfigError(f"{key} would be ignored: give {instead}.")
    for added in added_keys(config):
        if added.target is None:
            raise ConfigError(unknown_key(added.key))
        if added.target in ARGUMENTS:
            _refuse_other(added, ARGUMENTS[added.target])


def refuse_arguments(config: DictConfig) -> None:
    """Refuses arguments that what is built from a node does not have.

    Raises:
        ConfigError: With the most similar argument.
    """
    for added in added_keys(config):
        if added.target is None:
            continue
        names = _arguments_of(added)
        if names is not None:
            _refuse_other(added, names)


def _refuse_other(added: Added, names: Collection[str]) -> None:
    if added.name not in names:
        hint = did_you_mean(added.name, names)
        raise ConfigError(
            f"{added.key}: {added.target} has no argument {added.name!r}.{hint}"
        )


def _arguments_of(added: Added) -> set[str] | None:
    """Names of arguments, or None if any will do."""
    names: set[str] = set()
    path: str | None = added.target
    while path is not None:
        try:
            parameters = inspect.signature(hydra.utils.get_object(path)).parameters
        except ValueError:  # of a class in C, which does not say
            return None
        except Exception as error:  # hydra raises ImportError and others
            raise ConfigError(
                f"{added.node}._target_={path!r}: {first_line(error)}"
            ) from None
        open_kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names |= {x.name for x in parameters.values() if x.kind not in open_kinds}
        is_open = any(x.kind is x.VAR_KEYWORD for x in parameters.values())
        if is_open and path not in FORWARDED:
            return None
        path = FORWARDED.get(path) if is_open else None
    return names


def unknown_key(key: str) -> str:
    """What to say of a key that is not in the config."""
    group = key.rpartition(".")[0]
    if key in TAKEN:
        return f"{key} is not a key: give {TAKEN[key]}."
    if key in known_keys():
        top = key.split(".")[0]
        return f"{key} is a key of another {top}=..., not of the chosen one."
    if group == "trainer" and key.partition(".")[2] in ARGUMENTS[TRAINER]:
        return f"{key} is not in the config: write +{key}=... to add it."
    names = (
        x
        for x in known_keys()
        if not key.startswith(f"{x}.") and not x.startswith("hydra")
    )
    hint = key_hint(key, names)
    top, _, each = group.partition(".")
    if top in (BUILT_EACH if each else BUILT) and group != "trainer":
        hint += f" If {group}._target_ has this argument, write +{key}=..."
    elif group in FREE:
        hint += f" To add one, write +{key}=..."
    return f"Unknown key {key}.{hint}"


# ---------------------------------------------------------------- what the files have


@functools.cache
def _config() -> dict[str, Any]:
    """config.yaml as plain data."""
    content: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "config.yaml"))
    return content


@functools.cache
def top() -> dict[str, Any]:
    """What config.yaml says outside of groups, and plug-ins of samplers."""
    content = {key: x for key, x in _config().items() if key != "defaults"}
    return content | {"sampling": content["sampling"] | ADDED.get("sampling", {})}


@functools.cache
def chosen_by_default() -> dict[str, str]:
    """By group: what config.yaml chooses, a list as Hydra writes it."""
    entries = [entry for entry in _config()["defaults"] if isinstance(entry, dict)]
    return {
        key.strip("/"): f"[{', '.join(x)}]" if isinstance(x, list) else str(x)
        for entry in entries
        for key, x in entry.items()
        if x is not None
    }


def files_of(group: str) -> dict[str, dict[str, Any]]:
    """What the files of a group say, and what they extend, by name."""
    return _groups().get(group, {})


def file_of(group: str, name: str) -> dict[str, Any]:
    """What a file of a group says, and what it extends; empty if there is none."""
    return files_of(group).get(name, {})


@functools.cache
def _groups() -> dict[str, dict[str, dict[str, Any]]]:
    """Every file's content, by group, with that of the files that it extends."""
    groups = {}
    for folder in CONFIGS.iterdir():
        if folder.is_dir() and folder.name != "experiment":
            files: dict[str, Any] = {
                path.stem: OmegaConf.to_container(OmegaConf.load(path))
                for path in folder.glob("*.yaml")
            } | ADDED.get(folder.name, {})
            groups[folder.name] = {name: _extended(files, name) for name in files}
    return groups


def _extended(files: dict[str, Any], name: str) -> dict[str, Any]:
    """A file over those of its `defaults`."""
    content = files.get(name, {})
    merged: dict[str, Any] = {}
    for base in content.get("defaults", ()):
        if base != "_self_":
            merged |= _extended(files, base)
    return merged | {key: x for key, x in content.items() if key != "defaults"}


def forget() -> None:
    """Has what was read be read again, now that a plug-in has added something."""
    for kept in (top, _groups, known_keys, _in_files, nodes):
        kept.cache_clear()


@functools.cache
def known_keys() -> frozenset[str]:
    """Every dotted key of every file; experiments only set what is there."""
    files = ((group, x) for group, named in _groups().items() for x in named.values())
    return frozenset(key for node in (("", top()), *files) for key in _dotted(*node))


def _dotted(prefix: str, node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _dotted(f"{prefix}.{key}" if prefix else str(key), value)
    yield prefix


@functools.cache
def _in_files() -> dict[str, frozenset[str]]:
    """By `_target_`: the arguments that the files give it."""
    found: dict[str, frozenset[str]] = {}
    files = [x for named in _groups().values() for x in named.values()]
    nodes: list[Any] = [top(), *files]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if target := node.get("_target_"):
                found[target] = found.get(target, frozenset()) | set(node)
            nodes += node.values()
    return found


@functools.cache
def nodes() -> tuple[str, ...]:
    """Keys that hold other keys."""
    parents = {key.rpartition(".")[0] for key in known_keys()} - {""}
    within = tuple(f"{name}." for name in (*FREE, *BUILT_EACH))
    names = {x for x in parents if x not in FREE and not x.startswith(within)}
    return tuple(sorted(names, key=lambda x: (x.count("."), x)))


# ---------------------------------------------------------------- what a config has


def added_keys(config: DictConfig) -> list[Added]:
    """The keys that no file has for what is chosen, without those that are free.

    Args:
        config: The composed config, resolved or not.
    """
    content: Any = OmegaConf.to_container(config)
    texts = [x for x in _leaves(content) if isinstance(x, str) and "${" in x]
    has_plugins = bool(content.get("plugins"))
    found = [
        x for key, value in content.items() for x in _of_group(key, value, has_plugins)
    ]
    return [x for x in found if x.key not in OPTIONAL and not _is_named(x, texts)]


def _of_group(group: str, node: Any, has_plugins: bool) -> Iterator[Added]:
    if group in FREE:
        return
    if group in BUILT_EACH and isinstance(node, dict):
        for name, value in node.items():
            if isinstance(value, dict) and "_target_" in value:
                yield from _of_built(f"{group}.{name}", value)
            else:
                yield Added(group, str(name))
    elif group in BUILT and isinstance(node, dict):
        yield from _of_built(group, node)
    elif group in KINDS and isinstance(node, dict):
        yield from _beyond(node, _kind(group, node, has_plugins), group)
    elif group in top() or group in _groups():
        yield from _beyond(node, top().get(group), group)
    else:
        yield Added("", group)


def _of_built(path: str, node: dict[str, Any]) -> Iterator[Added]:
    target = str(node.get("_target_"))
    for name, value in node.items():
        if name not in OF_HYDRA | _in_files().get(target, frozenset()):
            yield Added(path, str(name), target)
        elif isinstance(value, dict) and "_target_" in value:
            yield from _of_built(f"{path}.{name}", value)


def _kind(group: str, node: dict[str, Any], has_plugins: bool) -> dict[str, Any] | None:
    """What files of a node's kind hold; None for a kind that the user has made."""
    kinds = {x for key in KINDS[group] if "${" not in (x := str(node.get(key)))}
    files = list(_groups()[group].values())
    same = [x for x in files if kinds & {str(x.get(key)) for key in KINDS[group]}]
    if not same and (group == "algo" or has_plugins):
        return None
    return {key: value for file in same or files for key, value in file.items()}


def _beyond(node: Any, known: Any, path: str) -> Iterator[Added]:
    """What a node has beyond a known one, which may hold anything if it is no node."""
    if path in FREE or not (isinstance(node, dict) and isinstance(known, dict)):
        return
    for name, value in node.items():
        if name in known:
            yield from _beyond(value, known[name], f"{path}.{name}")
        else:
            yield Added(path, str(name))


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _leaves(value)
    else:
        yield node


def _is_named(added: Added, texts: list[str]) -> bool:
    """Whether another value is made of it, as in `lr: ${my_rate}`."""
    paths = rf"\.*{re.escape(added.name)}|{re.escape(added.key)}"
    name = re.compile(rf"\$\{{({paths})[.}}\[]")
    return any(name.search(text) for text in texts)
