"""Small sets of images in files of every kind that can be read."""

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

NAMES = ["cat", "dog", "ship"]


def images_of(num: int, side: int = 4, seed: int = 0) -> np.ndarray:
    """Images (N, H, W, 3) of bytes."""
    shape = (num, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def labels_of(num: int) -> np.ndarray:
    """Every class, in order."""
    return np.arange(num) * len(NAMES) // num


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture if mode is None else picture.convert(mode)).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, images: np.ndarray, labels: np.ndarray | None) -> Path:
    """A .png file each, in sub-folders by their class if there are any."""
    for number, image in enumerate(images):
        folder = root if labels is None else root / NAMES[labels[number]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(image))
    return root


def write_parquet(
    path: Path, images: np.ndarray, labels: np.ndarray | None, column: str = "img"
) -> Path:
    """As the hub has it, with what its library says of the columns."""
    rows = [{"bytes": png(image), "path": None} for image in images]
    table = {column: rows} | ({} if labels is None else {"label": labels})
    features = {column: {"_type": "Image"}}
    features |= {"label": {"names": NAMES, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pyarrow.table(table).replace_schema_metadata(about)
    pyarrow.parquet.write_table(written, path)
    return path


# ---------------------------------------------------------------- the python archive


def _short(text: str) -> bytes:
    """A text as Python 2 pickles it."""
    return b"U" + bytes([len(text)]) + text.encode()


def _array(rows: np.ndarray) -> bytes:
    """An array of bytes as numpy pickled it under Python 2."""
    data = rows.tobytes()
    kind = b"cnumpy\ndtype\n" + _short("u1") + b"K\x00K\x01\x87R(K\x03" + _short("|")
    kind += b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", x) for x in rows.shape) + b"\x86"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    empty += _short("b") + b"\x87R"
    state = b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<I", len(data)) + data
    return empty + state + b"tb"


def batch_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A file of CIFAR-10's python archive, as Python 2 wrote it."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    numbers = b"](" + b"".join(b"K" + bytes([x]) for x in labels) + b"e"
    names = b"](" + b"".join(_short(f"{n}.png") for n in range(len(rows))) + b"e"
    content = _short("batch_label") + _short("a batch") + _short("labels") + numbers
    content += _short("data") + _array(rows) + _short("filenames") + names
    return b"\x80\x02}(" + content + b"u."


def meta_pickle() -> bytes:
    names = b"](" + b"".join(map(_short, NAMES)) + b"e"
    return b"\x80\x02}(" + _short("label_names") + names + b"u."


def archive_members(
    train: tuple[np.ndarray, np.ndarray], valid: tuple[np.ndarray, np.ndarray]
) -> dict[str, bytes]:
    """Contents of the files, by name: five of training images, one of the others."""
    parts = [np.array_split(x, 5) for x in train]
    members = {
        f"data_batch_{number + 1}": batch_pickle(*both)
        for number, both in enumerate(zip(*parts, strict=True))
    }
    return members | {"test_batch": batch_pickle(*valid), "batches.meta": meta_pickle()}


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    """cifar-10-python.tar.gz."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# ---------------------------------------------------------------- both splits


def write_both(
    kind: str,
    root: Path,
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
) -> Path:
    """The value of `data.source` for a kind of file, both splits in it."""
    root.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        for name, pair in (("train", train), ("test", valid)):
            write_folder(root / name, *pair)
    elif kind == "parquet":
        write_parquet(root / "plain_text" / "train-00000.parquet", *train)
        write_parquet(root / "plain_text" / "test-00000.parquet", *valid)
    elif kind == "npz":
        arrays = dict(zip(("x_train", "y_train"), train, strict=True))
        arrays |= dict(zip(("x_heldout", "y_heldout"), valid, strict=True))
        np.savez(root / "both.npz", **arrays, label_names=np.array(NAMES))
        return root / "both.npz"
    elif kind == "archive":
        return write_archive(root / "set.tar.gz", archive_members(train, valid))
    elif kind == "unpacked":
        folder = root / "cifar-10-batches-py"
        folder.mkdir()
        for name, content in archive_members(train, valid).items():
            (folder / name).write_bytes(content)
    else:
        raise ValueError(kind)
    return root


KINDS = ("folder", "parquet", "npz", "archive", "unpacked")
