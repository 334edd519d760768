"""Reads images and their classes, of folders, CIFAR-10's archive, parquet and npz.

Files are read as data: arrays without pickles, pickles by `pickled_arrays`, archives
without unpacking them, and of an image nothing before its size is known to be right.
"""

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.files import by_number
from data.image_sources import (
    ARRAYS,
    FIRST_BATCH,
    WHOLE,
    ImageSource,
    images_below,
    sub_folders,
)
from data.packing import Block
from data.pickled_arrays import load
from data.pixels import pixel_ids
from utils import CHANNELS, ConfigError, one_line, open_file

AT_A_TIME = 512  # images of a block
OPENED = ("PNG", "JPEG")  # by Pillow, which knows many more
COLUMNS = (("img", "image"), ("label", "labels", "fine_label"))  # of tables
TRAINING_BATCHES = 5
MOST = 2**31  # bytes of a member of an archive


class Images(NamedTuple):
    """The images of a split, not read yet."""

    blocks: Iterator[Block]
    class_names: list[str]  # none where nothing says them


class Asked(NamedTuple):
    """What images have to be like."""

    source: ImageSource
    side: int  # H
    class_names: list[str]  # of folders


def read_images(asked: Asked) -> Images:
    """The images of a file or folder, in order.

    Raises:
        ConfigError: If one cannot be read or is not as it should be; also while the
            blocks are read.
    """
    return READERS[asked.source.kind](asked)


@contextlib.contextmanager
def _reading(asked: Asked, where: object) -> Iterator[None]:
    """Whatever goes wrong with a file is a line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of a broken file the libraries raise any kind
        reason = one_line(str(error)) or type(error).__name__
        key = asked.source.key
        raise ConfigError(f"{key}: {where} cannot be read: {reason}.") from None


def _block(images: list[np.ndarray], labels: list[int] | None) -> Block:
    """Images (H, W, 3) of bytes, and their labels."""
    ids = pixel_ids(np.stack(images))
    return _of_ids(ids, None if labels is None else np.array(labels))


def _of_ids(ids: np.ndarray, labels: np.ndarray | None) -> Block:
    full = np.full(len(ids), ids.shape[1], dtype=np.int32)
    return Block(ids, full, None if labels is None else labels.astype(np.int32))


# ---------------------------------------------------------------- single images


def decoded(file: str | Path | IO[bytes], asked: Asked, where: object) -> np.ndarray:
    """The bytes of an image file, (H, W, 3).

    Raises:
        ConfigError: If it is no image of `data.size` in red, green and blue.
    """
    from PIL import Image

    key = asked.source.key
    with _reading(asked, where), Image.open(file, formats=OPENED) as image:
        check_shape(asked, where, image.height, image.width)  # before it is unpacked
        is_palette = image.mode == "P" and "transparency" not in image.info
        if image.mode != "RGB" and not is_palette:
            raise ConfigError(
                f"{key}: {where} is of mode {image.mode}, not RGB: convert it first, "
                "as in Image.open(FILE).convert('RGB').save(FILE) with Pillow. Of grey "
                "images each value counts three times then."
            )
        return np.asarray(image.convert("RGB"))


def check_shape(asked: Asked, where: object, height: int, width: int) -> None:
    """Refuses images of another size than the configured one."""
    side = asked.side
    if (height, width) != (side, side):
        raise ConfigError(
            f"{asked.source.key}: {where} has {height} x {width} pixels, not "
            f"{side} x {side} as data.size={side**2} says; all images have one size, "
            "with as many rows as columns."
        )


def folder_images(asked: Asked) -> Images:
    """Files of a folder: a class for each sub-folder, or none at all."""
    root = Path(asked.source.files[0])
    files = ordered_files(asked.source)
    numbers = {name: number for number, name in enumerate(asked.class_names)}
    has_classes = bool(sub_folders_of_images(root))

    def blocks() -> Iterator[Block]:
        for start in range(0, len(files), AT_A_TIME):
            some = files[start : start + AT_A_TIME]
            images = [decoded(file, asked, file) for file in some]
            labels = None
            if has_classes:
                labels = [numbers[file.relative_to(root).parts[0]] for file in some]
            yield _block(images, labels)

    return Images(blocks(), asked.class_names if has_classes else [])


def ordered_files(source: ImageSource) -> list[Path]:
    """The image files of a folder by their names and numbers.

    Raises:
        ConfigError: If some are beside the folders of the classes.
    """
    root = Path(source.files[0])
    found = images_below(root)
    files = sorted(found, key=lambda x: by_number(str(x.relative_to(root))))
    beside = [file for file in files if file.parent == root]
    if beside and len(beside) < len(files):
        raise ConfigError(
            f"{source.key}: {root} has images in sub-folders, which are classes, and "
            f"{beside[0].name} beside them; put each image into the folder of its "
            "class, or all into one."
        )
    return files


def sub_folders_of_images(root: Path) -> list[Path]:
    return [x for x in sub_folders(root) if next(images_below(x), None) is not None]


# ---------------------------------------------------------------- the python archive


def archive_images(asked: Asked) -> Images:
    """CIFAR-10 as its authors publish it: pickles of rows in our order already."""
    (path,) = asked.source.files
    is_training = asked.source.part == "train"
    first = FIRST_BATCH.removesuffix("1")
    train = [f"{first}{number + 1}" for number in range(TRAINING_BATCHES)]
    wanted = train if is_training else ["test_batch"]
    with _reading(asked, path):
        members = dict(_members(path, [*wanted, "batches.meta"]))
        missing = [name for name in wanted if name not in members]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        meta = members.pop("batches.meta", None)
        content = {} if meta is None else _pickled(meta)
        names = [str(_text(x)) for x in content.get("label_names", ())]

    def blocks() -> Iterator[Block]:
        for name in wanted:
            with _reading(asked, f"{name} of {path}"):
                batch = _pickled(members[name])
                ids, labels = batch["data"], np.array(batch["labels"])
                if ids.dtype != np.uint8 or ids.ndim != 2 or labels.ndim != 1:
                    raise ValueError("its data are no rows of bytes with a label each")
                rows, length = ids.shape
                if len(labels) != rows:
                    raise ValueError(f"it has {rows} images and {len(labels)} labels")
                if length != CHANNELS * asked.side**2:
                    raise ValueError(
                        f"its rows have {length} values, not 3 * data.size="
                        f"{CHANNELS * asked.side**2}"
                    )
            yield _of_ids(ids, labels)

    return Images(blocks(), names)


def _members(path: str, wanted: list[str]) -> Iterator[tuple[str, bytes]]:
    """Content of the files of these names, of a folder or an archive in any order."""
    if Path(path).is_dir():
        for name in wanted:
            with contextlib.suppress(FileNotFoundError):
                yield name, (Path(path) / name).read_bytes()
        return
    with open_file(path) as opened, tarfile.open(fileobj=opened) as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            if name in wanted and member.isfile() and member.size < MOST:
                file = archive.extractfile(member)
                if file is not None:
                    yield name, file.read()


def _pickled(raw: bytes) -> dict[str, Any]:
    content = load(io.BytesIO(raw))
    if not isinstance(content, dict):
        raise ValueError("it holds no dict")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


# ---------------------------------------------------------------- arrays


def npz_images(asked: Asked) -> Images:
    """Arrays (N, H, W, 3) of bytes, with or without labels (N,)."""
    (path, *more) = asked.source.files
    if more:
        raise ConfigError(f"{asked.source.key}: of .npz give one file for a split.")
    pairs = (WHOLE,) if asked.source.part is None else ARRAYS[asked.source.part]
    with _reading(asked, path), np.load(path, allow_pickle=False) as content:
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array; save it as np.savez(images=...)")
        pair = next((x for x in pairs if x[0] in content), None)
        if pair is None:
            wanted = " or ".join(x for x, _ in pairs)
            held = ", ".join(content.files)
            raise ValueError(f"it has no array {wanted} of this split, but {held}")
        images = content[pair[0]]
        labels = content.get(pair[1])
        names = np.asarray(content.get("label_names", ()))
        class_names = [str(x) for x in names.ravel()]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != CHANNELS:
            raise ValueError(
                f"{pair[0]} is {images.dtype} of shape {images.shape}, not uint8 of "
                "shape (images, rows, columns, 3)"
            )
        if labels is not None and (
            labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"{pair[1]} is {labels.dtype} of shape {labels.shape}, not a whole "
                f"number for each of {len(images)} images"
            )
    check_shape(asked, f"{pair[0]} of {path}", *images.shape[1:3])
    starts = range(0, len(images), AT_A_TIME)
    return Images(
        (
            _of_ids(
                pixel_ids(images[start : start + AT_A_TIME]),
                None if labels is None else labels[start : start + AT_A_TIME],
            )
            for start in starts
        ),
        class_names,
    )


# ---------------------------------------------------------------- tables


def parquet_images(asked: Asked) -> Images:
    """Files with a column of encoded images, as the hub's, and perhaps of labels."""
    import pyarrow.parquet

    paths = asked.source.files
    with _reading(asked, paths[0]), open_file(paths[0]) as opened:
        schema = pyarrow.parquet.read_schema(opened)
    image, label = columns_of(asked, paths[0], schema.names)
    about = (schema.metadata or {}).get(b"huggingface", b"{}")
    with _reading(asked, paths[0]):
        features = json.loads(about).get("info", {}).get("features", {})
        names = features.get(label, {}).get("names", []) if label else []

    def rows() -> Iterator[tuple[str, Any, Any]]:
        for path in paths:
            with _reading(asked, path), open_file(path) as opened:
                parquet = pyarrow.parquet.ParquetFile(opened)
                wanted = [x for x in (image, label) if x is not None]
                number = 0
                for batch in parquet.iter_batches(AT_A_TIME, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        where = f"{path}, row {number}"
                        yield where, row[image], row[label] if label else None

    return Images(
        _table_blocks(asked, rows(), label is not None), list(map(str, names))
    )


def columns_of(
    asked: Asked, where: object, names: Iterable[str]
) -> tuple[str, str | None]:
    """The column of the images, and that of the labels if there is one."""
    names = list(names)
    image, label = (next((x for x in some if x in names), None) for some in COLUMNS)
    if image is None:
        raise ConfigError(
            f"{asked.source.key}: {where} has no column {' or '.join(COLUMNS[0])}; it "
            f"has {', '.join(names)}."
        )
    return image, label


def _table_blocks(
    asked: Asked, rows: Iterable[tuple[str, Any, Any]], has_labels: bool
) -> Iterator[Block]:
    """Blocks of rows: where one is, its encoded image, its label."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for where, image, label in rows:
        raw = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(raw, bytes):
            raise ConfigError(f"{asked.source.key}: {where} holds no encoded image.")
        images.append(decoded(io.BytesIO(raw), asked, where))
        if has_labels:
            if not isinstance(label, int):
                raise ConfigError(f"{asked.source.key}: {where} has no label.")
            labels.append(label)
        if len(images) == AT_A_TIME:
            yield _block(images, labels if has_labels else None)
            images, labels = [], []
    if images:
        yield _block(images, labels if has_labels else None)


def table_images(asked: Asked, rows: Any, where: object) -> Images:
    """The rows of a `datasets` data set."""
    import datasets

    image, label = columns_of(asked, where, rows.column_names)
    wanted = [x for x in (image, label) if x is not None]
    names = getattr(rows.features[label], "names", None) if label else None
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    table = rows.select_columns(wanted)

    def all_rows() -> Iterator[tuple[str, Any, Any]]:
        for start in range(0, len(table), AT_A_TIME):
            some = table[start : start + AT_A_TIME]
            for number, one in enumerate(some[image]):
                at = f"{where}, row {start + number + 1}"
                yield at, one, some[label][number] if label else None

    blocks = _table_blocks(asked, all_rows(), label is not None)
    return Images(blocks, list(names or ()))


READERS: dict[str, Callable[[Asked], Images]] = {
    "archive": archive_images,
    "folder": folder_images,
    "npz": npz_images,
    "parquet": parquet_images,
}


def files_read(source: ImageSource) -> list[Path]:
    """The files of a source that is no folder of images, for what depends on them."""
    if source.kind == "folder":
        return ordered_files(source)
    paths = [Path(file) for file in source.files]
    if paths[0].is_dir():
        return sorted(x for x in paths[0].iterdir() if x.is_file())
    return paths
