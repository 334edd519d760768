"""The commands that evaluate a checkpoint and that sample from it."""

import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig

from checkpoints.about import own_algorithms, plugins_of
from checkpoints.checkpoint import Checkpoint
from cli.again import for_hydra
from cli.known_keys import files_of
from cli.stated import PREDICTORS
from data.tokenizers import PIXELS
from utils import CONFIGS

# Of few steps, so that a first look takes seconds.
LOOK = (
    "sampling.steps=64",
    "loader.eval_batch_size=8",
    "sampling.num_sample_batches=1",
)


def commands(checkpoint: Checkpoint, path: str, plugins: Any = ()) -> Iterator[str]:
    """Lines for the screen: what each command is for, and the command for a shell.

    Args:
        checkpoint: One that has been read.
        path: Of the checkpoint, absolute unless it is a hub id.
        plugins: Those that this command names.
    """
    algo = checkpoint.setting("algo.name")
    words = [f"eval.checkpoint_path={for_hydra(path)}"]
    given = [plugins] if isinstance(plugins, str) else plugins
    if names := plugins_of(checkpoint) or list(given):
        words.append(f"plugins=[{','.join(names)}]")
    if algo not in own_algorithms() and not names:
        yield "The file does not say which algorithm it is of: add algo=NAME to these."
    is_image = checkpoint.setting("data.tokenizer_name_or_path") in PIXELS
    data = _data(checkpoint)
    if data is None:
        yield "to evaluate it, with files of yours in the place of FILES:"
        data = ["data=images", "data.source=FILES"]
        data = data if is_image else ["data=text_files", "data.path=FILES"]
    else:
        yield "to evaluate it:"
    yield f"  {_command('ppl_eval', *words, *data)}"
    yield "to sample from it:"
    look = LOOK[1:] if algo in PREDICTORS else LOOK
    yield f"  {_command('sample_eval', *words, *look)}"


def _data(checkpoint: Checkpoint) -> list[str] | None:
    """Words that choose the data of a checkpoint; None if they are not known."""
    if checkpoint.is_own:
        return []  # it says all of it
    train, valid = (checkpoint.setting(f"data.{x}") for x in ("train", "valid"))
    for name, file in sorted(files_of("data").items()):
        of_file = [file.get("train"), file.get("valid", "${.train}")]
        of_file = [of_file[0] if x == "${.train}" else x for x in of_file]
        if train is not None and of_file == [train, valid or train]:
            return [f"data={name}"]
    return None


def _command(mode: str, *words: str) -> str:
    """The whole command, from any folder."""
    program = os.path.realpath(CONFIGS.parent / "main.py")
    folder = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else os.getcwd()
    command = [sys.executable or "python", os.path.relpath(program, folder)]
    if command[1].startswith(os.pardir):
        command[1] = program
    return shlex.join([*command, f"mode={mode}", *words])
