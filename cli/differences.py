"""What a run's config has that its files do not say, as words of a command line.

Of a key whose default is made of others, such as `${trainer.devices}`, that is what the
others make of it in this run.
"""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from checkpoints.schema import leaves
from cli.again import for_hydra
from cli.known_keys import (
    BUILT_EACH,
    KINDS,
    chosen_by_default,
    file_of,
    files_of,
    top,
)
from utils import printable

ALWAYS = ("algo", "data", "model")  # groups whose choice is said, also the usual one
SHOWN_ELSEWHERE = ("print_config",)


def differences(config: DictConfig) -> list[str]:
    """Lines of words KEY=VALUE, one for each part of the config that has some.

    Args:
        config: The run's, resolved.
    """
    defaults, groups = chosen_by_default(), chosen()
    groups |= taken_over(config, groups)
    lines = [[f"mode={config.mode}"]]
    if groups.get("experiment"):
        lines[0].append(f"experiment={groups['experiment']}")
    lines[0] += [
        f"{group}={groups.get(group, default)}"
        for group, default in defaults.items()
        if group in ALWAYS or groups.get(group, default) != default
    ]
    usual = usual_values(config, groups)
    whole: Any = OmegaConf.to_container(config, resolve=True)
    for name, node in whole.items():
        words = [
            word(key, value)
            for key, value in leaves(node, str(name))
            if key in usual and usual[key] != value and key != "mode"
        ]
        lines += [words] if words else []
    return [printable(" ".join(line), keep="") for line in lines]


def chosen() -> dict[str, str]:
    """By group: the name of its file in this run; lists as Hydra writes them."""
    if not HydraConfig.initialized():
        return {}
    runtime = HydraConfig.get().runtime.choices
    return {str(k): str(x).replace("'", "") for k, x in runtime.items() if x}


def taken_over(config: DictConfig, groups: dict[str, str]) -> dict[str, str]:
    """By group: the file of what a checkpoint has put in the place of the choice."""
    found = {}
    for group, (key, *_) in KINDS.items():
        kind = OmegaConf.select(config, f"{group}.{key}")
        files = files_of(group)
        usual = groups.get(group, chosen_by_default().get(group, ""))
        names = [name for name, file in files.items() if file.get(key) == kind]
        if names and usual not in names:
            found[group] = names[0]
    return found


def usual_values(config: DictConfig, groups: dict[str, str]) -> dict[str, Any]:
    """By dotted key: what the run would have if nobody had said anything of it."""
    raw: dict[str, Any] = {key: x for key, x in top().items() if key != "hydra"}
    for group, default in chosen_by_default().items():
        names = [groups.get(group, default)]
        if group in BUILT_EACH:
            names = names[0].strip("[]").replace(" ", "").split(",")
        node: dict[str, Any] = {}
        for name in names:
            node |= file_of(group, name)
        raw[group] = node
    content: Any = OmegaConf.to_container(config)
    copy = OmegaConf.create(content)
    usual = {}
    for key, value in leaves(raw):
        if (isinstance(value, str) and "${" in value) or isinstance(value, list):
            value = _made(copy, key, value)
        if value is not _UNKNOWN and key not in SHOWN_ELSEWHERE:
            usual[key] = value
    return usual


_UNKNOWN = object()


def _made(copy: DictConfig, key: str, value: Any) -> Any:
    """What a default becomes beside the other values of a run."""
    try:
        now = OmegaConf.select(copy, key)
        OmegaConf.update(copy, key, value)
        made = OmegaConf.select(copy, key)
        if OmegaConf.is_config(made):
            made = OmegaConf.to_container(made, resolve=True)
        OmegaConf.update(copy, key, now)
    except OmegaConfBaseException:  # of a group that is not chosen
        return _UNKNOWN
    return made


def word(key: str, value: Any) -> str:
    """KEY=VALUE for a command line."""
    return f"{key}={_text(value)}"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(x)}" for k, x in value.items()) + "}"
    return for_hydra(value) if isinstance(value, str) else str(value)
