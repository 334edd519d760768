"""From the words of the command line to what Hydra reads, and from Hydra's complaints
to one line that helps.
"""

import os
import re
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError

from checkpoints.locating import checkpoint_in
from cli.known_keys import known_keys, unknown_key
from cli.mdlm import from_mdlm
from cli.older_keys import translated
from cli.paths import PATHS
from cli.plugins import as_added, import_named, import_plugins, with_settings
from cli.words import groups, refuse_words
from data.tokenizers import PIXELS, TOKENIZERS
from utils import (
    CONFIGS,
    ConfigError,
    choices_of,
    did_you_mean,
    files_named,
    hydra_quoted,
    one_line,
    register_resolvers,
    unknown_value,
)

# What may be missing where a choice is like no other.
OWN = dict.fromkeys(
    ("algo", "data", "model", "noise"), " One of your own comes with plugins=[MODULE]."
)


def explain(error: HydraException) -> str:
    """Hydra's complaint about the command line as one line with the choices."""
    if found := re.search(r"Could not (?:find|load) '([^'/]+)/([^']*)'", str(error)):
        return no_such_choice(*found.groups())
    if found := re.search(r"Ambiguous value for .*?'([^=]+)=(.*?)'\n", str(error)):
        key, value = found.groups()
        return (
            f"{key}={value} is several values: add -m for a run with each of them, or "
            f"write {key}=[{value}] for a list, \"{key}='{value}'\" for a text."
        )
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        return unknown_key(found[1])
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        reason = str(error.__cause__ or error).splitlines()[0]
        return (
            f"{error.override} cannot be read ({reason}); if that is one text, put it "
            f"into quotes for Hydra inside those of the shell: \"{key}='...'\"."
        )
    return str(error)


def missing_key(error: Exception) -> str:
    """One line for a key that was removed and is read; empty for another error."""
    key = getattr(error, "full_key", None)
    if not isinstance(error, ConfigAttributeError) or key not in known_keys():
        return ""
    return f"{key} is not there, and is needed: leave ~{key} out, or give {key}=VALUE."


def no_such_choice(group: str, value: str) -> str:
    """One line for a name that no file of a group has."""
    if group == "data" and ("/" in value or os.path.isfile(value)):
        return (
            f"data={value!r} is no data set of configs/data/; to read your own files "
            f"write data=text_files data.path={value}."
        )
    names = choices_of(group)
    own = "" if did_you_mean(value, names) else OWN.get(group, "")
    return unknown_value(group, value, names) + own


def no_choice(argv: list[str], error: Exception) -> str:
    """One line for a group that is given no name, at which Hydra raises `error`."""
    if not str(error).startswith("Config group override"):
        return ""
    for word in argv:
        key, _, value = word.lstrip("+").partition("=")
        names = choices_of(key)
        if names and value not in names and not value.startswith("["):
            return unknown_value(key, value, names)
    return str(error)


_QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""")
_TEXTS = ("sampling.prompt", "sampling.infill")  # whatever is in them


def quoted(argument: str, is_sweep: bool = False) -> str:
    """A prompt or a path on the command line as Hydra wants it, so that it may hold
    anything.

    Args:
        argument: KEY=VALUE, with or without + before it.
        is_sweep: Whether commas may stand between the values of several jobs.
    """
    key, is_pair, text = argument.partition("=")
    name = key.lstrip("+")
    is_text = name in _TEXTS
    if not is_pair or not (is_text or _is_path(name)):
        return argument
    if text in ("null", "") or _QUOTED.fullmatch(text):
        return argument
    if is_text or not _is_read(argument, is_sweep):
        values = text.split(",") if is_sweep and not is_text else [text]
        return f"{key}={','.join(map(hydra_quoted, values))}"
    return argument


def _is_path(name: str) -> bool:
    """Whether a key names a file or a folder."""
    last = name.rpartition(".")[2]
    nodes = ("callbacks.", "logger.")
    return (
        name in (*INPUTS, *PATHS, "hydra.run.dir", "hydra.sweep.dir", "report.runs")
        or name.startswith("report.checkpoints.")
        or (name.startswith(nodes) and last in ("dirpath", "save_dir"))
    )


def _is_read(argument: str, is_sweep: bool) -> bool:
    """Whether Hydra reads a text, a list or null, as it stands."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    if override.is_sweep_override():
        return is_sweep
    value = override.value()
    return isinstance(value, str | list | dict | None)


def arguments(argv: list[str]) -> list[str]:
    """The command line as Hydra wants it: a sweep's flag in front, prompts and paths
    quoted, and keys in their newer spelling.

    Raises:
        ConfigError: If it says two things at once, in MDLM's words and in these.
    """
    refuse_words(argv)
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    rest = [argument for argument in argv if argument not in flags]
    words = from_mdlm(translated(rest), bool(flags))
    given = (may_be_there(as_added(quoted(word, bool(flags)))) for word in words)
    return [*flags[:1], *given]


def composed(argv: list[str]) -> DictConfig:
    """The config of a command line, in a process that Hydra does not run.

    Args:
        argv: KEY=VALUE each.

    Raises:
        ConfigError: If there is no such key or choice, or a plug-in cannot be imported.
    """
    folder = os.getcwd()
    import_named(argv, folder)
    register_resolvers()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config = hydra.compose("config", arguments(argv))
    except HydraException as error:
        raise ConfigError(one_line(explain(error))) from None
    import_plugins(config.plugins, folder)
    with_settings(config)
    return config


def may_be_there(word: str) -> str:
    """+KEY=VALUE as Hydra wants it where the config may have the key already."""
    key = word.lstrip("+").partition("=")[0]
    is_choice = "@" in key or key in groups() or key.startswith("hydra")
    return f"+{word}" if re.match(r"\+[\w.]+=", word) and not is_choice else word


# ---------------------------------------------------------------- files

# Keys that name files or folders to read, some of them instead of a hub id.
INPUTS = (
    "algo.curriculum.integral_cache_path",
    "checkpointing.resume_ckpt_path",
    "data.path",
    "data.source",
    "data.valid_path",
    "data.valid_source",
    "data.tokenizer_name_or_path",
    "eval.checkpoint_path",
    "eval.fid_features",
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.mauve_references",
    "sampling.prompt_file",
    "sampling.refine_path",
    "training.finetune_path",
)


# Those of them where the folder of a run means its last checkpoint.
CHECKPOINTS = ("eval.checkpoint_path", "sampling.refine_path", "training.finetune_path")


def find_inputs(config: DictConfig, folder: str) -> None:
    """Makes relative paths to inputs absolute where they lead to something, and finds
    the last checkpoint in the folder of a run.

    A run works in a folder of its own; its command was given in another one.

    Args:
        config: The run's config; changed in place.
        folder: Where the command was given.
    """

    def found(value: Any) -> Any:
        if not isinstance(value, str) or not value or "://" in value:
            return value
        path = os.path.join(folder, value)  # value itself where that is absolute
        return path if files_named(path) else value

    for key in INPUTS:
        value = OmegaConf.select(config, key)
        if key == "data.tokenizer_name_or_path" and value in (*TOKENIZERS, *PIXELS):
            continue  # one of ours, whatever lies in the folder
        is_list = isinstance(value, ListConfig)
        absolute = [found(x) for x in value] if is_list else found(value)
        if absolute != value:
            OmegaConf.update(config, key, absolute)
    for key in CHECKPOINTS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value:
            OmegaConf.update(config, key, checkpoint_in(value, key))
