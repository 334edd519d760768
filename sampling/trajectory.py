"""How one sample came to be, as small arrays, and the same as plain data that a page or
a JSON file holds. Needs no torch.

Shapes: L length.
"""

import base64
import binascii
from typing import Any, NamedTuple

import numpy as np

NOTHING = -1  # in the place of an id where there is no token yet
PER_BIT = 16  # codes of a probability for each factor of 2
NO_PROBABILITY = 255  # the code of a token that the model did not draw
RAREST = NO_PROBABILITY - 1  # the code of 2^(-254 / 16) = 1.7e-5 and less
LONGEST = 2**24  # tokens of a sample, and steps
MOST_CHANGES = 2**26
LARGEST_ID = 2**31 - 2


class Trajectory(NamedTuple):
    """Where a sample started, and what each of its steps has changed.

    Step i changes `counts[i]` positions; those of all steps stand one after the other
    in `positions`, `tokens` and `codes`.
    """

    first: np.ndarray  # ids at the start, NOTHING where there is no token yet, (L,)
    given: np.ndarray  # positions that were given, (L,) bool
    counts: np.ndarray  # changes of each step, (steps,)
    positions: np.ndarray  # of the changes, (changes,)
    tokens: np.ndarray  # ids that the changes lead to, (changes,)
    codes: np.ndarray  # of their probabilities, round(-16 log2 p), uint8, (changes,)
    entropy: np.ndarray  # mean of a step's predictions, nats; nan: of none, (steps,)

    def states(self) -> list[np.ndarray]:
        """The ids at the start and after each step, (L,) each."""
        found, start = [self.first], 0
        for count in self.counts:
            ids, part = found[-1].copy(), slice(start, start + count)
            ids[self.positions[part]] = self.tokens[part]
            found.append(ids)
            start += count
        return found

    def ids(self) -> set[int]:
        """Every token that is there at some time."""
        return {*self.first.tolist(), *self.tokens.tolist()} - {NOTHING}


def packed(one: Trajectory) -> dict[str, Any]:
    """Plain data: base64 of little-endian arrays, ids one up so that 0 is none."""
    return {
        "length": len(one.first),
        "steps": len(one.counts),
        "first": _text(one.first + 1, "<u4"),
        "given": _text(np.packbits(one.given, bitorder="little"), "u1"),
        "counts": _text(one.counts, "<u4"),
        "positions": _text(one.positions, _width(len(one.first))),
        "tokens": _text(one.tokens + 1, _width(max(one.ids(), default=0) + 2)),
        "codes": _text(one.codes, "u1"),
        "entropy": _text(one.entropy, "<f4"),
    }


def unpacked(data: Any) -> Trajectory:
    """The trajectory of plain data of unknown origin.

    Raises:
        ValueError: If it is none.
    """
    try:
        length, steps = data["length"], data["steps"]
        _require(_is_count(length, LONGEST) and _is_count(steps, LONGEST) and length)
        counts = _array(data["counts"], "<u4", steps).astype(np.int64)
        changes = int(counts.sum())
        _require(changes <= MOST_CHANGES)
        bits = _array(data["given"], "u1", -(-length // 8))
        one = Trajectory(
            _array(data["first"], "<u4", length).astype(np.int64) - 1,
            np.unpackbits(bits, count=length, bitorder="little").astype(bool),
            counts,
            _array(data["positions"], None, changes),
            _array(data["tokens"], None, changes) - 1,
            _array(data["codes"], "u1", changes),
            _array(data["entropy"], "<f4", steps),
        )
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"it is no trajectory ({error})") from None
    _require(not changes or one.positions.max() < length)
    _require(max(one.ids(), default=0) <= LARGEST_ID)
    return one


def _width(count: int) -> str:
    return "<u2" if count <= 2**16 else "<u4"


def _text(x: np.ndarray, kind: str) -> str:
    return base64.b64encode(x.astype(kind).tobytes()).decode()


def _array(text: Any, kind: str | None, count: int) -> np.ndarray:
    """Numbers of a text; of kind None whole ones, two or four bytes each."""
    raw = base64.b64decode(text, validate=True)
    if kind is None:
        kind = "<u2" if len(raw) == 2 * count else "<u4"
        return _array(text, kind, count).astype(np.int64)
    _require(len(raw) == count * np.dtype(kind).itemsize)
    return np.frombuffer(raw, kind)


def _is_count(x: Any, most: int) -> bool:
    return type(x) is int and 0 <= x <= most


def _require(is_so: Any) -> None:
    if not is_so:
        raise ValueError("its arrays do not fit each other")
