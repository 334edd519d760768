"""Where a checkpoint is: a file, a folder, or a repository of the Hugging Face hub."""

import os
import re

from utils import ConfigError, path_exists

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LAST = "last.ckpt"
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def is_folder_or_hub_id(name_or_path: str) -> bool:
    """Whether this is a folder, or what can only be a hub id ("owner/name")."""
    if os.path.isdir(name_or_path):
        return True
    is_id = is_hub_id(name_or_path) and not name_or_path.endswith(_FILES)
    return is_id and not path_exists(name_or_path)


def checkpoint_in(path: str, key: str) -> str:
    """The file that the folder of a run means, its last checkpoint; else the path.

    Args:
        path: Local or fsspec path, or a hub id.
        key: Config key that held it, for the message.

    Raises:
        ConfigError: If a folder is neither of a run nor a Hugging Face folder.
    """
    is_local = os.path.isdir(path)
    if not is_local and ("://" not in path or path.endswith(_FILES)):
        return path
    if is_local and os.path.exists(os.path.join(path, "config.json")):
        return path
    folder = path.rstrip("/")
    places = (f"{folder}/checkpoints/{LAST}", f"{folder}/{LAST}")
    found = next((place for place in places if path_exists(place)), None)
    if found is None and is_local:
        others = sorted(x for x in os.listdir(path) if x.endswith(_FILES))
        hint = f"; give a file, such as {folder}/{others[0]}" if others else ""
        raise ConfigError(
            f"{key}={path!r} is a folder without checkpoints/{LAST} of a run and "
            f"without config.json of a Hugging Face model{hint}."
        )
    return found or path


def is_hub_id(name: str) -> bool:
    """Whether this has the form of a hub id, "owner/name"."""
    return _HUB_ID.fullmatch(name) is not None


def check_checkpoint_path(path: str, key: str) -> None:
    """Refuses what is no file, no folder and no hub id.

    Args:
        path: Local or fsspec path of a file; or a Hugging Face folder or hub id.
        key: Config key that held the path, for the message.

    Raises:
        ConfigError: If there is nothing under that name.
    """
    if not path:
        raise ConfigError(f"{key} is empty: give the path of a checkpoint.")
    if not is_folder_or_hub_id(path) and not path_exists(path):
        raise ConfigError(f"{key}={path!r}: there is no such file.")
