"""Marks: short texts that tell data from other data, kept in checkpoints and compared
where a run goes on.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from utils import is_local, open_file

ENDS = 64  # bytes at each end of a file by which it is known again after an edit
READ = 1 << 16  # bytes at each end in which an edit is seen

SAME, CHANGED, OTHER = "same", "changed", "other"


def tokenizer_mark(tokenizer: Any) -> str:
    """Of a tokenizer, wherever it lies."""
    special = ("bos", "eos", "pad", "mask")
    ids = [getattr(tokenizer, f"{name}_token_id", None) for name in special]
    return f"tokenizer:{_digest([sorted(tokenizer.get_vocab().items()), ids])}"


def rows_mark(num_rows: int, length: int, *content: bytes) -> str:
    """Of rows, whatever files they were made of."""
    return f"rows:{_digest([num_rows, length, [x.hex() for x in content]])}"


def stream_mark(paths: Sequence[str], about: Any) -> str:
    """Of files that are read as they are needed, wherever they lie.

    Args:
        paths: Local ones are known by name and content, others by path.
        about: What else the rows depend on, JSON.
    """
    files = [_of_file(path) for path in paths]
    names, starts, ends, contents = zip(*files, strict=True)
    parts = ([names, about], starts, ends, contents)
    return ":".join(("stream", *map(_digest, parts)))


def _of_file(path: str) -> tuple[str, str, str, str]:
    """Name, start, end, and what tells the content from others."""
    if not is_local(path):
        return path, "", "", ""
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        first = file.read(READ)
        file.seek(max(size - READ, 0))
        last = file.read(READ)
    start, end = first[:ENDS], last[-ENDS:]
    content = hashlib.sha256(first + last).hexdigest()
    return os.path.basename(path), start.hex(), end.hex(), f"{size} {content}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def compared(theirs: str, ours: str) -> str:
    """SAME, OTHER, or CHANGED: files that were edited, as one does whose bad row ended
    a run; or rows that once were streamed, of which nothing else can be told."""
    if theirs == ours:
        return SAME
    (kind, *one), (other_kind, *other) = theirs.split(":"), ours.split(":")
    if kind != other_kind:
        return CHANGED
    if kind != "stream" or len(one) != len(other) or one[0] != other[0]:
        return OTHER
    return CHANGED if one[1] == other[1] or one[2] == other[2] else OTHER
