"""The dialect of MDLM's code: its keys and names, and what they are called here.

There the keys of an algorithm are at the top of the config, and one name,
`parameterization`, chooses it. `cli.mdlm` translates command lines, `own_config` what
is in checkpoints.
"""

from collections.abc import Mapping
from typing import Any

PARAMETERIZATION = "parameterization"
# By `parameterization`: the file of `configs/algo`, and `algo.parameterization` there.
ALGORITHMS: Mapping[str, str] = {
    "subs": "mdlm",
    "d3pm": "d3pm",
    "sedd": "sedd",
    "ar": "ar",
}
OWN_PARAMETERIZATIONS: Mapping[str, str] = {
    "mdlm": "subs",
    "d3pm": "mean",
    "sedd": "score",
    "ar": "ar",
}
DEFAULT = "subs"
CAUSAL = "ar"  # the algorithm
# Keys at the top that are keys of `algo` here, under the same name.
MOVED = ("backbone", "time_conditioning", "T", "subs_masking")
# Keys at the top that nothing reads, and their only value.
UNREAD: Mapping[str, str] = {"diffusion": "absorbing_state"}
BACKBONES: Mapping[str, str] = {"ar": "dit"}  # causal by the algorithm
MODELS: Mapping[str, str] = {"small-ar": "small", "tiny-ar": "tiny"}
LOGLINEAR = "loglinear"
NOISES: Mapping[str, str] = {LOGLINEAR: "log-linear"}
# Keys of its file that nothing reads.
UNREAD_OF_LOGLINEAR = ("sigma_min", "sigma_max")
# Names of schedules that are those of others here.
OTHER_NOISES: Mapping[str, str] = {"cosine": "cosine-mdlm"}


def own_config(config: Mapping[Any, Any]) -> dict[Any, Any] | None:
    """The config of a run of MDLM's code in the keys of this one.

    Args:
        config: Plain data of a checkpoint, which may be anything.

    Returns:
        A new one, in which `algo` is a node and the keys at the top that became it are
        gone; None if the config is not in that dialect.
    """
    if PARAMETERIZATION not in config or "algo" in config:
        return None
    gone = (PARAMETERIZATION, *MOVED, *UNREAD)
    own = {key: value for key, value in config.items() if key not in gone}
    stated = {key: config[key] for key in MOVED if config.get(key) is not None}
    if "backbone" in stated:
        stated["backbone"] = renamed(BACKBONES, stated["backbone"])
    given = config[PARAMETERIZATION]
    name = renamed(ALGORITHMS, given)
    own["algo"] = {"name": name, **stated}
    if isinstance(given, str) and given in ALGORITHMS:
        parameterization = OWN_PARAMETERIZATIONS[name]
        causal = name == CAUSAL
        more = {"parameterization": parameterization, "causal_attention": causal}
        own["algo"] |= more
    noise = own.get("noise")
    if isinstance(noise, dict) and "type" in noise:
        own["noise"] = _own_noise(noise)
    return own


def _own_noise(noise: dict[Any, Any]) -> dict[Any, Any]:
    kind = renamed({**NOISES, **OTHER_NOISES}, noise["type"])
    unread = UNREAD_OF_LOGLINEAR if noise["type"] == LOGLINEAR else ()
    read = {key: value for key, value in noise.items() if key not in unread}
    return {**read, "type": kind}


def renamed(names: Mapping[str, str], value: Any) -> Any:
    """A value by its name here, if it is one of those that have another."""
    return names.get(value, value) if isinstance(value, str) else value
