"""Reads pickled dicts of numbers and numpy arrays; nothing of the file is executed.

An unpickler that hands out numpy's own functions can be made to change them, or to take
bytes for addresses. This one hands out the records below, which hold what the file
says, and makes arrays of them itself, of plain numbers only.
"""

import io
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

import numpy as np

from data.pickles import Named, read_pickle

_NUMBERS = ("f8", "f4", "i8", "i4", "u1")


def load(file: BinaryIO) -> Any:
    """The content of a pickle, its arrays by `np.frombuffer`.

    Raises:
        Exception: If it holds anything else; a broken file may raise any kind.
    """
    content = read_pickle(io.BytesIO(file.read()), _named)
    if not isinstance(content, dict):
        return content
    return {
        key: value.array() if isinstance(value, _Array) else value
        for key, value in content.items()
    }


def _named(name: str) -> Named:
    name = name.replace("numpy.core.", "numpy._core.")  # before numpy 2
    if name not in _RECORDS:
        raise ValueError(f"it asks for {name}")
    return Named(name, _RECORDS[name])


class _NDArray:
    """What numpy names as the class of its arrays."""

    __slots__ = ()


class _DType:
    """np.dtype(name, ...) of the file."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *flags: Any) -> None:
        if name not in _NUMBERS:
            raise ValueError(f"it holds numbers of type {name!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class _Array:
    """An array as numpy pickles it: version, shape, type, whether Fortran's, bytes."""

    __slots__ = ("state",)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, kind, is_fortran, data = self.state
        if isinstance(data, str):  # of Python 2, whose texts are bytes
            data = data.encode("latin-1")
        if not isinstance(data, bytes):  # with numbers inside, it could be made of such
            raise ValueError("an array of it does not hold bytes")
        order: Literal["F", "C"] = "F" if is_fortran else "C"
        return np.frombuffer(data, kind.dtype()).reshape(shape, order=order)


class _Buffer(_Array):
    """The same as pickle's protocol 5 has it."""

    __slots__ = ()

    def __init__(self, data: bytes, kind: _DType, shape: tuple, order: str) -> None:
        if not isinstance(data, (bytes, bytearray)):
            raise ValueError("an array of it does not hold bytes")
        self.state = (1, shape, kind, order == "F", bytes(data))


class _Scalar(_Array):
    """A single number of numpy's."""

    __slots__ = ()

    def __init__(self, kind: _DType, data: bytes) -> None:
        self.state = (1, (), kind, False, data)


_RECORDS: dict[str, Callable[..., Any]] = {
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray.scalar": _Scalar,
    "numpy._core.numeric._frombuffer": _Buffer,
    "numpy.ndarray": _NDArray,
    "numpy.dtype": _DType,
}
