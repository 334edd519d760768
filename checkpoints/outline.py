"""What a checkpoint says of its run, and the shapes of its weights, without its weights
and without torch: in a fraction of a second, whatever the size of the file.

All else is looked at when the file is read as a whole (`reading.py`).
"""

import io
import zipfile
from collections.abc import Callable, Collection
from typing import IO, Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.huggingface import own_name
from checkpoints.huggingface import read_about as read_about_hub
from checkpoints.locating import check_checkpoint_path, is_folder_or_hub_id
from checkpoints.reading import make_plain, stand_in
from checkpoints.schema import check_config
from data.pickles import Budget, Named, read_pickle
from utils import ConfigError, first_line, open_file

MAX_PICKLE = 1 << 28  # bytes of what is no tensor
OLDER_PICKLES = 3  # before the content, in files of torch before 1.6


class Outline:
    """In the place of a tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __setstate__(self, state: Any) -> None:
        """What else a file says of a tensor is of no use here."""


def read_about(path: str, key: str, trusted: Collection[str] = ()) -> Checkpoint:
    """What a checkpoint says; arguments and errors are those of `read_checkpoint`.

    Returns:
        One without weights; of a hub id also without their shapes.
    """
    check_checkpoint_path(path, key)
    if is_folder_or_hub_id(path):
        return read_about_hub(path, key)
    try:
        with open_file(path) as file:
            content = _content(file, trusted)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        make_plain(content)
        settings = content.get("hyper_parameters")
        config = settings.get("config") if isinstance(settings, dict) else None
        if isinstance(config, dict):
            check_config(config)
    except Exception as error:  # a broken file may raise anything
        reason = first_line(error)
        raise ConfigError(f"{key}={path!r} cannot be read safely: {reason}") from None
    weights = content.get("state_dict")
    weights = weights if isinstance(weights, dict) else {}
    shapes = {
        own_name(name): x.shape
        for name, x in weights.items()
        if isinstance(x, Outline) and str(name).startswith("backbone.")
    }
    return Checkpoint(
        config=config if isinstance(config, dict) else None,
        outline=shapes,
        is_own=isinstance(content.get("identity"), dict),
    )


def _content(file: IO[bytes], trusted: Collection[str]) -> Any:
    """What `torch.save` was given, with an `Outline` for each tensor."""
    size = file.seek(0, io.SEEK_END)
    budget = Budget(2 * size)

    def find(name: str) -> Any:
        if name.startswith("torch."):
            return Named(name, _MAKERS.get(name, _nothing))
        return stand_in(name, trusted, budget)

    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            infos = [x for x in archive.infolist() if x.filename.endswith("/data.pkl")]
            if len(infos) != 1:
                raise ValueError("it has no data.pkl")
            if infos[0].file_size > min(MAX_PICKLE, 2 * size):
                raise ValueError("its records are larger than the file")
            return read_pickle(io.BytesIO(archive.read(infos[0])), find, _nothing)
    raw = io.BytesIO(file.read(min(MAX_PICKLE, size)))
    for _ in range(OLDER_PICKLES):
        read_pickle(raw, find)
    return read_pickle(raw, find, _nothing)


def _nothing(*_: Any) -> None:
    """In the place of what is of no use here."""


def _outline(_storage: Any, _offset: Any, size: Any, *_: Any) -> Outline:
    if not all(type(x) is int and 0 <= x < 1 << 62 for x in size):
        raise ValueError("a tensor of it has a size that is none")
    return Outline(tuple(size))


_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _outline,
    "torch._utils._rebuild_tensor_v2": _outline,
    "torch._utils._rebuild_tensor_v3": _outline,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}
