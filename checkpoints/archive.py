"""The files that `torch.save` writes: a pickle, and the data of its tensors.

    zip archive (since torch 1.6): NAME/data.pkl, NAME/data/KEY for each storage
    older: several pickles and then the storages, one after the other

Each record of an archive is compared with its checksum while it is read. No tensor is
larger than the data that the file has for it.
"""

import io
import math
import re
import zipfile
from collections.abc import Callable
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from data.pickles import Budget, Named, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format
_VERSION = 1001
_CHUNK = 1 << 20
_MAX_AXES = 16

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}


class _Storage:
    """Bytes of the file, as numbers of a type."""

    def __init__(self, data: Tensor, dtype: torch.dtype | None) -> None:
        self.data = data  # uint8, (bytes,)
        self.dtype = dtype  # None: not typed


class _Kind:
    """A type of storages, as files name it."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype
) -> Tensor:
    numbers = (offset, *size, *stride)
    if not all(type(x) is int and 0 <= x < 1 << 62 for x in numbers):
        raise ValueError("a tensor of it has a size that is none")
    if len(size) != len(stride) or len(size) > _MAX_AXES:
        raise ValueError("a tensor of it has strides that do not fit")
    room = len(storage.data) // dtype.itemsize
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (count > room or last >= room):
        raise ValueError("a tensor of it is larger than its data")
    if not count:
        return torch.empty(size, dtype=dtype)
    whole = storage.data.untyped_storage()
    return torch.empty(0, dtype=dtype).set_(whole, offset, size, stride)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise ValueError("a tensor of it has no data")
    return _tensor(storage, offset, size, stride, storage.dtype)


def _rebuild_typed(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    """torch._utils._rebuild_tensor_v3."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of it has no data")
    return _tensor(storage, offset, size, stride, dtype)


def _parameter(data: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_parameter."""
    if not isinstance(data, Tensor):
        raise ValueError("a parameter of it is no tensor")
    return data


_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes: tuple(sizes) if type(sizes) is list else sizes,
}
_STORAGES = {f"torch.{name}Storage": _Kind(dtype) for name, dtype in _DTYPES.items()}
_STORAGES["torch.storage.UntypedStorage"] = _Kind(None)


def torch_name(name: str) -> Any:
    """What stands for a name of torch's in a file; None if there is nothing."""
    if name in _MAKERS:
        return Named(name, _MAKERS[name])
    if name in _STORAGES:
        return _STORAGES[name]
    value = getattr(torch, name.removeprefix("torch."), None)
    return value if isinstance(value, torch.dtype) else None


class _Records(Protocol):
    """Where the data of storages come from."""

    def __call__(self, key: str, num_bytes: int) -> Tensor:
        """Bytes, uint8."""


def _persistent(records: _Records) -> Callable[[Any], _Storage]:
    """Gives the storage that an id of a pickle means, each read once."""
    known: dict[str, Tensor] = {}

    def storage(value: Any) -> _Storage:
        if not (type(value) is tuple and len(value) >= 5 and value[0] == "storage"):
            raise ValueError("it refers to what is no data")
        _, kind, key, _, count, *view = value
        is_whole = view in ([], [None])
        if not isinstance(kind, _Kind) or type(key) is not str or not is_whole:
            raise ValueError("it refers to data of an unknown kind")
        if type(count) is not int or not 0 <= count < 1 << 60:
            raise ValueError("it refers to data of no size")
        if key not in known:
            size = 1 if kind.dtype is None else kind.dtype.itemsize
            known[key] = records(key, count * size)
        return _Storage(known[key], kind.dtype)

    return storage


def read_archive(file: IO[bytes], find: Callable[[str, Budget], Any]) -> Any:
    """The content of a file that `torch.save` has written, on the CPU.

    Args:
        file: Opened, at any position.
        find: Gives what a name stands for that is not torch's; makers of copies spend
            of the budget.

    Raises:
        Exception: If it is damaged, or none; a broken file may raise any kind.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    budget = Budget(2 * size)

    def found(name: str) -> Any:
        value = torch_name(name)
        return find(name, budget) if value is None else value

    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    return _read_zip(file, size, found) if is_zip else _read_older(file, size, found)


# ---------------------------------------------------------------- zip archives


def _read_zip(file: IO[bytes], size: int, find: Callable[[str], Any]) -> Any:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > 2 * size:
            raise ValueError("its records are larger than the file")
        names = {info.filename: info for info in infos}
        if len(names) != len(infos):
            raise ValueError("it has two records of one name")
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("it is of a machine with another order of bytes")

        unread = names.keys() - {pickles[0]}

        def record(key: str, num_bytes: int) -> Tensor:
            info = names.get(f"{folder}data/{key}")
            if info is None or info.file_size != num_bytes:
                raise ValueError(f"its record data/{key[:20]} is not what it says")
            unread.remove(info.filename)
            data = torch.empty(num_bytes, dtype=torch.uint8)
            with archive.open(info) as opened:  # looks at the checksum at the end
                _fill(opened, data)
            return data

        raw = io.BytesIO(archive.read(pickles.pop()))
        content = read_pickle(raw, find, _persistent(record))
        for name in unread:
            with archive.open(name) as opened:
                while opened.read(_CHUNK):
                    pass
        return content


def _fill(opened: IO[bytes], data: Tensor) -> None:
    """Reads into a tensor of bytes.

    Raises:
        ValueError: If the file ends before.
    """
    view, at = memoryview(data.numpy().data), 0
    while at < len(view):
        chunk = opened.read(min(_CHUNK, len(view) - at))
        if not chunk:
            raise ValueError("it ends too early")
        view[at : at + len(chunk)] = chunk
        at += len(chunk)


# ---------------------------------------------------------------- the older format


class _Bounded:
    """A file of which nobody can ask for more than there is.

    Python's own readers make room for as much as they are asked for.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if size < 0 else min(size, left))

    def readline(self) -> bytes:
        return self._file.readline()

    def tell(self) -> int:
        return self._file.tell()


def _read_older(file: IO[bytes], size: int, find: Callable[[str], Any]) -> Any:
    opened: Any = _Bounded(file, size)
    if read_pickle(opened, find) != _MAGIC or read_pickle(opened, find) != _VERSION:
        raise ValueError("it is no checkpoint")
    system = read_pickle(opened, find)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it is of a machine with another order of bytes")
    budget = Budget(size)
    storages: dict[str, Tensor] = {}

    def record(key: str, num_bytes: int) -> Tensor:
        budget.spend(num_bytes)
        storages[key] = torch.empty(num_bytes, dtype=torch.uint8)
        return storages[key]

    content = read_pickle(opened, find, _persistent(record))
    keys = read_pickle(opened, find)
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("its data are not those that it refers to")
    for key in keys:
        data = storages[key]
        count = int.from_bytes(opened.read(8), "little")
        if (count <= 0 and len(data)) or (count and len(data) % count):
            raise ValueError("its data have another size")
        _fill(opened, data)
    return content
