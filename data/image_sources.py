"""Where the images of a split lie: the hub, or a file or folder of `data.source` and
`data.valid_source`; and what can be refused about them before one is read.
"""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from data.files import by_number, check_apart, state_of
from data.published import IMAGE_SETS
from data.sources import SPLIT_NAMES, is_hub, is_of_split, topmost
from utils import CHANNELS, ConfigError, files_named

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
ARCHIVE_FOLDER = "cifar-10-batches-py"
FIRST_BATCH = "data_batch_1"
# Arrays of an .npz file: images and labels of a split, the first that are there.
ARRAYS = {
    "train": (("x_train", "y_train"),),
    "valid": tuple((f"x_{x}", f"y_{x}") for x in ("heldout", "valid", "val", "test")),
}
WHOLE = ("images", "labels")  # of a file that is one split
FORMATS = (
    f"a folder of images ({', '.join(IMAGE_SUFFIXES)}), a sub-folder for each class; "
    f"CIFAR-10's python archive (.tar.gz) or its folder; .parquet; .npz with {WHOLE[0]}"
)


class ImageSource(NamedTuple):
    """The images of one split."""

    kind: str  # archive | folder | parquet | npz | hub
    key: str  # config key that named it, for messages
    files: tuple[str, ...] = ()  # or one folder
    part: str | None = None  # which split of files that hold several; None: all

    def __str__(self) -> str:
        return ", ".join(self.files)


# ---------------------------------------------------------------- finding


def source_of(data: DictConfig, split: str) -> ImageSource:
    """Where the images of 'train' or 'valid' lie.

    Raises:
        ConfigError: If nothing fits.
    """
    key = source_key(data, split)
    if key is None or is_hub(data[key.removeprefix("data.")]):
        if key is None and not IMAGE_SETS[data[split]].sources:
            raise _no_source(data, split)
        return ImageSource("hub", key or f"data.{split}")
    return found(data[key.removeprefix("data.")], key, split, split_names(data, split))


def source_key(data: DictConfig, split: str) -> str | None:
    """The config key that says where a split comes from; None: the table."""
    if split == "valid" and data.valid_source is not None:
        return "data.valid_source"
    if data.source is not None and (split == "train" or data.train == data.valid):
        return "data.source"
    return None


def _no_source(data: DictConfig, split: str) -> ConfigError:
    is_alone = split == "valid" and data.train != data.valid
    key = "data.valid_source" if is_alone else "data.source"
    return ConfigError(f"{key} is empty: data.{split}={data[split]!r} needs {FORMATS}.")


def split_names(data: DictConfig, split: str) -> tuple[str, ...]:
    """What the files or folders of a split may be called, the most fitting first."""
    if split == "train":
        return SPLIT_NAMES["train"]
    first = IMAGE_SETS[data[split]].valid or "validation"
    other = {"test": "validation", "validation": "test"}[first]
    return SPLIT_NAMES[first] + SPLIT_NAMES[other]


def found(path: Any, key: str, split: str, names: tuple[str, ...]) -> ImageSource:
    """What a path, a glob or a list of files means for a split.

    Args:
        path: The value of `key`.
        key: Config key, for messages.
        split: 'train' or 'valid'.
        names: Of the split.
    """
    if isinstance(path, str) and os.path.isdir(path):
        return _of_folder(Path(path), key, split, names)
    asked = [path] if isinstance(path, str) else list(path)
    files = sorted({x for one in asked for x in files_named(str(one))}, key=by_number)
    if not files:
        raise ConfigError(f"{key}={path!r}: there is no such file or folder.")
    if len(files) == 1 and files[0].lower().endswith(ARCHIVE_SUFFIXES):
        return ImageSource("archive", key, (files[0],), split)
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    for suffix in (".parquet", ".npz"):
        if suffixes == {suffix}:
            return _of_files(files, suffix, key, split)
    raise ConfigError(f"{key}={path!r} is none of: {FORMATS}.")


def _of_files(files: list[str], suffix: str, key: str, split: str) -> ImageSource:
    kind = suffix.removeprefix(".")
    part = split if kind == "npz" and _has_splits(files[0]) else None
    return ImageSource(kind, key, tuple(files), part)


def _has_splits(path: str) -> bool:
    """Whether an .npz file holds arrays of several splits."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # of a broken file the library raises any kind
        return True  # whoever reads it says why
    arrays = {pair[0] for pairs in ARRAYS.values() for pair in pairs}
    return WHOLE[0] not in names and bool(names & arrays)


def _of_folder(root: Path, key: str, split: str, names: tuple[str, ...]) -> ImageSource:
    for folder in (root, root / ARCHIVE_FOLDER):
        if (folder / FIRST_BATCH).is_file():
            return ImageSource("archive", key, (str(folder),), split)
    below = sub_folders(root)
    by_name = {folder.name.lower(): folder for folder in below}
    every = {name for several in SPLIT_NAMES.values() for name in several}
    if by_name and by_name.keys() <= every:
        for name in names:
            if name in by_name:
                return _of_one(by_name[name], key, split, names)
        raise _no_split(root, key, names)
    return _of_one(root, key, split, names)


def _of_one(root: Path, key: str, split: str, names: tuple[str, ...]) -> ImageSource:
    """The same of a folder without folders for splits."""
    if next(images_below(root), None) is not None:
        return ImageSource("folder", key, (str(root),))
    for suffix in (".parquet", ".npz"):
        files = [file for file in root.rglob(f"*{suffix}") if file.is_file()]
        if not files:
            continue
        where = {file: str(file.relative_to(root)) for file in files}
        for name in names:
            fitting = [x for x in files if is_of_split(where[x], (name,))]
            if fitting:
                return _of_files(topmost(fitting), suffix, key, split)
        if any(is_of_split(x, n) for x in where.values() for n in SPLIT_NAMES.values()):
            raise _no_split(root, key, names)
        return _of_files(topmost(files), suffix, key, split)
    raise ConfigError(f"{key}={str(root)!r} holds none of: {FORMATS}.")


def _no_split(root: Path, key: str, names: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"{key}={str(root)!r} has no images of this split: nothing in it is called "
        f"{', '.join(names)}."
    )


# ---------------------------------------------------------------- folders


def sub_folders(root: Path) -> list[Path]:
    """Those that are not hidden, in the order of their names and numbers."""
    below = [x for x in root.iterdir() if x.is_dir() and not x.name.startswith(".")]
    return sorted(below, key=lambda x: by_number(x.name))


def images_below(root: Path) -> Iterator[Path]:
    """Image files in a folder and its sub-folders, in any order."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def class_folders(data: DictConfig) -> list[str]:
    """Names of the classes of image folders, the same for every split.

    A class is the name of a sub-folder; its number is its place among the names of all
    splits, so that a class that one split lacks does not shift the others.
    """
    names: set[str] = set()
    for split in ("train", "valid"):
        try:
            source = source_of(data, split)
        except (ConfigError, KeyError):
            continue  # the split is not there, and perhaps not needed
        if source.kind == "folder":
            below = sub_folders(Path(source.files[0]))
            names |= {x.name for x in below if next(images_below(x), None)}
    return sorted(names, key=by_number)


# ---------------------------------------------------------------- checks


def check_images(config: DictConfig, split: str) -> None:
    """Refuses, before an image is read, a split that cannot be had."""
    source_of(config.data, split)


def check_sizes(config: DictConfig) -> None:
    """Refuses keys that contradict each other about the size of images."""
    data, model = config.data, config.model
    size, length = data.get("size"), data.get("length")
    if size is None or length is None:
        key = "data.size" if size is None else "data.length"
        raise ConfigError(
            f"{key} is empty: data.modality=image needs the pixels of an image, "
            "data.size=H*W, and its tokens, data.length=3*H*W."
        )
    side = round(size**0.5)
    if side**2 != size:
        raise ConfigError(
            f"data.size={size} is no square: images have as many rows as columns; give "
            f"the pixels of one, such as {side**2} for {side} x {side}."
        )
    if length != CHANNELS * size:
        raise ConfigError(
            f"data.length={length} is not {CHANNELS} * data.size={size}: give "
            f"data.length={CHANNELS * size}, one token for each value of a pixel."
        )
    if model.length != length:
        raise ConfigError(
            f"model.length={model.length} is not data.length={length}, the tokens of "
            f"an image: give model.length={length}."
        )


def check_images_apart(data: DictConfig) -> None:
    """Refuses to validate on what is trained on.

    Raises:
        ConfigError: If the same files give the same images to both.
    """
    train, valid = source_of(data, "train"), source_of(data, "valid")
    if "hub" in (train.kind, valid.kind) or train.part != valid.part:
        return
    places = [{os.path.realpath(file) for file in x.files} for x in (train, valid)]
    roots = [f"{next(iter(x))}/" for x in places]
    is_within = train.kind == valid.kind == "folder" and (
        roots[0].startswith(roots[1]) or roots[1].startswith(roots[0])
    )
    if places[0] == places[1] or is_within:
        raise ConfigError(
            f"{train.key}={str(train)!r} gives the same images to train and to "
            "validate on; give data.valid_source, or a folder with folders called "
            "train and valid or test."
        )
    if {train.kind, valid.kind} <= {"parquet", "npz"}:
        check_apart(list(train.files), list(valid.files), (train.key, valid.key))


def state(source: ImageSource, files: list[Path]) -> Any:
    """What changes when the files of a source do, for JSON."""
    return [source.kind, source.part, state_of(files)]
