"""Where what a run writes goes: relative paths mean the folder where the command was
given, no two jobs of a sweep write to one place, and what cannot be written is said.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from utils import ConfigError, filesystem_of, is_local, path_exists

# What a mode makes, by the key of its path.
MADE = {
    "train": "checkpointing.save_dir",
    "ppl_eval": "eval.results_path",
    "sample_eval": "eval.generated_samples_path",
    "fid_eval": "eval.generated_samples_path",
    "export": "export.path",
    "report": "report.path",
    "view": "view.out",
}
MADE_TOO = {  # beside it
    "fid_eval": "eval.results_path",
    "sample_eval": "sampling.save_trajectory",
}
CACHES = ("data.cache_dir", "algo.curriculum.cache_dir")
# Keys that are paths of this machine or of fsspec, never the id of something else.
# Those of what is read, or is something else where there is no such file, are in
# `commandline.INPUTS`.
PATHS = (
    *(*MADE.values(), *MADE_TOO.values(), *CACHES),
    "checkpointing.resume_ckpt_path",
)
FILE_KEYS = (
    *("eval.results_path", "eval.generated_samples_path"),
    *("sampling.save_trajectory", "view.out"),
)
# The same in every node of a group: callbacks and loggers have folders of their own.
OF_NODES = (("callbacks", "dirpath"), ("logger", "save_dir"))
# Errors that giving another folder, or a right to this one, ends.
NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Errors of a path on which nothing can be written, whatever the right to it.
UNUSABLE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
INPUT_KEYS = ("checkpointing.resume_ckpt_path",)


def place_outputs(config: DictConfig, folder: str) -> None:
    """Makes relative paths absolute.

    A run works in a folder of its own; its command was given in another one.

    Args:
        config: The run's config; changed in place.
        folder: Where the command was given.
    """
    for key in _path_keys(config):
        value = OmegaConf.select(config, key)
        if not isinstance(value, str) or not value or "://" in value:
            continue
        path = os.path.normpath(os.path.join(folder, os.path.expanduser(value)))
        if not os.path.isabs(value):
            OmegaConf.update(config, key, path)


def _path_keys(config: DictConfig) -> Iterator[str]:
    """PATHS and the same of callbacks and loggers, as far as the config has them."""
    yield from (key for key in PATHS if OmegaConf.select(config, key) is not None)
    for group, name in OF_NODES:
        nodes = OmegaConf.select(config, group)
        for node in nodes if isinstance(nodes, DictConfig) else ():
            if isinstance(nodes[node], DictConfig) and name in nodes[node]:
                yield ".".join((group, str(node), name))


# ---------------------------------------------------------------- finished files

DRAWING = ("sample_eval", "fid_eval")
ABOUT = "settings.json"  # in the folder of the batches, as long as it is needed


def refuse_finished(path: str) -> None:
    """Refuses a file that is there and is not the beginning of a run.

    Raises:
        ConfigError: If it is; nothing is overwritten.
    """
    if path_exists(path) and not path_exists(f"{parts_of(path)}/{ABOUT}"):
        raise ConfigError(
            f"eval.generated_samples_path={path!r} exists; it is not overwritten. Move "
            "it away or give another path."
        )


def parts_of(path: str) -> str:
    """Where the finished batches behind a file are."""
    return f"{path}.parts"


# ---------------------------------------------------------------- sweeps

_jobs: dict[str, int] = {}  # of the sweep in this process, by what they make


def refuse_shared(config: DictConfig, job: int) -> None:
    """Refuses a job of a sweep that would write where an earlier one has written.

    Args:
        config: The job's config, with absolute paths.
        job: Its number.
    """
    key = MADE.get(config.mode)
    path = OmegaConf.select(config, key) if key else None
    if isinstance(path, str) and _jobs.setdefault(path, job) != job:
        raise ConfigError(
            f"{key}={path!r} is that of job {_jobs[path]} of this sweep, too. Leave "
            "it out, or put into it what differs: '${hydra:job.num}' is the number of "
            "the job."
        )


# ---------------------------------------------------------------- permissions


def check_writable(config: DictConfig) -> None:
    """Refuses a place that this user may not write to, before anything is done.

    Caches are not among them: one that holds all that is needed may be read-only.
    """
    made = MADE.get(config.mode), MADE_TOO.get(config.mode), MADE["train"]
    for key in dict.fromkeys(made):
        if key is None:
            continue
        path = OmegaConf.select(config, key)
        if not isinstance(path, str) or not path or not is_local(path):
            continue
        _, folder = filesystem_of(path)
        if key in FILE_KEYS or (key == "export.path" and os.path.isfile(folder)):
            folder = os.path.dirname(folder)
        while folder != os.path.dirname(folder) and not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if os.path.exists(folder) and not os.path.isdir(folder):
            reason = "is no folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = "may not be written to by this user"
        else:
            continue
        raise ConfigError(f"{key}={path!r}: {folder} {reason}; give another path.")


def not_permitted(error: BaseException | None) -> OSError | None:
    """The refusal of the operating system in an error or behind it, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NOT_PERMITTED:
            return error
        error = error.__cause__ or error.__context__
    return None


def no_folder(argv: Sequence[str], error: Exception) -> str:
    """One line for a folder of the command line in which Hydra cannot make a run's."""
    if not isinstance(error, OSError):
        return ""
    for word in argv:
        key, _, value = word.lstrip("+").partition("=")
        value = value.strip("'\"")
        if key not in ("hydra.run.dir", "hydra.sweep.dir"):
            continue
        if not value:
            return f"{key} is empty: give a folder."
        path, at = os.path.abspath(value), os.path.abspath(str(error.filename or "/"))
        if path.startswith(at) or at.startswith(path):
            is_file = error.errno in (errno.EEXIST, errno.ENOTDIR)
            reason = "this is no folder" if is_file else error.strerror
            return f"{key}={value!r}: {reason} ({at}); give another folder."
    return ""


def unusable(error: OSError, config: DictConfig) -> OSError | None:
    """An error that says that no folder can be made where a key wants one."""
    keys = [key for key in _path_keys(config) if key not in INPUT_KEYS]
    path = str(error.filename2 or error.filename or "")
    is_ours = any(_is_within(path, OmegaConf.select(config, key)) for key in keys)
    return error if error.errno in UNUSABLE and path and is_ours else None


def permission_line(error: OSError, config: DictConfig | None = None) -> str:
    """One line that names the path and the key that leads there.

    Args:
        error: One of `NOT_PERMITTED`.
        config: The run's; None where Hydra has not made the run's folder yet.
    """
    path = str(error.filename2 or error.filename or "")
    key = "hydra.run.dir"
    if config is not None:
        keys = _path_keys(config)
        within = (x for x in keys if _is_within(path, OmegaConf.select(config, x)))
        key = next(within, "")
    advice = f"give another {key}" if key else "give another path"
    reason = error.strerror or type(error).__name__
    return f"{path or 'a file'}: {reason}; {advice}, or this user the right to use it."


def _is_within(path: str, folder: Any) -> bool:
    if not isinstance(folder, str) or not folder or not is_local(folder):
        return False
    _, inner = filesystem_of(folder)
    return path == inner or path.startswith(f"{inner.rstrip('/')}/")
