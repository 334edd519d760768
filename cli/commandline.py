"""From the words of the command line to what Hydra reads, and from Hydra's complaints
to one line that helps.
"""

import os
import re
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from cli.known_keys import unknown_key
from cli.older_keys import translated
from utils import CONFIGS, files_named, hydra_quoted, unknown_value


def explain(error: HydraException) -> str:
    """Hydra's complaint about the command line as one line with the choices."""
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", str(error)):
        group, value = found.groups()
        names = (path.stem for path in (CONFIGS / group).glob("*.yaml"))
        choices = [name for name in names if not name.startswith("_")]
        return unknown_value(group, value, choices)
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        return unknown_key(found[1])
    return str(error)


_QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""")


def quoted(argument: str) -> str:
    """A prompt on the command line as Hydra wants it, so that it may hold anything."""
    key, is_pair, text = argument.partition("=")
    if not is_pair or key.lstrip("+") not in ("sampling.prompt", "sampling.infill"):
        return argument
    if text in ("null", "") or _QUOTED.fullmatch(text):
        return argument
    return f"{key}={hydra_quoted(text)}"


def arguments(argv: list[str]) -> list[str]:
    """The command line as Hydra wants it: a sweep's flag in front, prompts quoted, and
    keys in their newer spelling."""
    flags = [argument for argument in argv if argument in ("-m", "--multirun")]
    rest = [argument for argument in argv if argument not in flags]
    return flags[:1] + [quoted(argument) for argument in translated(rest)]


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
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.mauve_references",
    "sampling.prompt_file",
    "training.finetune_path",
)


def find_inputs(config: DictConfig, folder: str) -> None:
    """Makes relative paths to inputs absolute where they lead to something.

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
        is_list = isinstance(value, ListConfig)
        absolute = [found(x) for x in value] if is_list else found(value)
        if absolute != value:
            OmegaConf.update(config, key, absolute)
