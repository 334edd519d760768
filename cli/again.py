"""The command that goes on with a run that was stopped."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from report.sweep import is_sweep
from utils import hydra_quoted

_PLAIN = re.compile(r"[\w./:+@-]+")
_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p"),
)
# What the command must not say again: where a run goes, and how a sweep is run.
_DROPPED = (
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode"),
    *("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper"),
)
RESUME = "checkpointing.resume_from_ckpt"
PATH = "checkpointing.resume_ckpt_path"


def command_again(config: DictConfig, argv: Sequence[str] | None = None) -> str:
    """The whole command for a shell, from any folder; nothing outside of Hydra's jobs.

    It is the one that was given, with the folder of the run; of a job of a sweep, that
    of this job alone.

    Args:
        config: The run's.
        argv: Program and words of the command line; None: of this process.
    """
    if not HydraConfig.initialized():
        return ""
    hydra: Any = HydraConfig.get()
    program, *words = sys.argv if argv is None else argv
    flags, overrides = split(words)
    if is_sweep(hydra):
        of_hydra = [x for x in overrides if _key(x).startswith("hydra")]
        # Texts, which are not resolved; OmegaConf's types do not say so.
        task = cast(list[str], OmegaConf.to_container(hydra.overrides.task))
        overrides = [*task, *of_hydra]
    kept = [x for x in overrides if not _key(x).startswith(_DROPPED)]
    if not config.checkpointing.resume_from_ckpt:
        kept = [x for x in kept if _key(x) != RESUME] + [f"{RESUME}=True"]
    if not config.checkpointing.resume_ckpt_path:
        own_path = f"{config.checkpointing.save_dir}/checkpoints/last.ckpt"
        kept = [x for x in kept if _key(x) != PATH] + [f"{PATH}={for_hydra(own_path)}"]
    if is_sweep(hydra) and any("hydra:job" in x for x in kept):
        kept.append(f"hydra.job.num={hydra.job.num}")
    kept.append(f"hydra.run.dir={for_hydra(hydra.runtime.output_dir)}")
    program = os.path.join(hydra.runtime.cwd, program)
    command = [sys.executable or "python", program, *flags, *kept]
    return f"cd {shlex.quote(hydra.runtime.cwd)} && {shlex.join(command)}"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides; what makes a sweep is left out."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("-m", "--multirun"):
            continue
        if word in _WITH_VALUE:
            flags += [word, *([value] if (value := next(rest, None)) else [])]
        else:
            (flags if word.startswith("-") else overrides).append(word)
    return flags, overrides


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def for_hydra(value: str) -> str:
    """A value as Hydra reads it."""
    return value if _PLAIN.fullmatch(value) else hydra_quoted(value)
