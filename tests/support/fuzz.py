"""Mutations of files, and what became of a reader that was given one."""

import copy
import io
import math
import os
import pickle
import random
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from utils import ConfigError, RunStopped

# ---------------------------------------------------------------- bytes


def mutated_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Cut off, with bits flipped, blocks zeroed, doubled, left out or strange."""
    content = bytearray(raw)
    at = draw.randrange(max(len(raw), 1))
    size = draw.choice((1, 4, 64, 4096))
    kind = draw.randrange(7)
    if kind == 0:
        return raw[:at]
    if kind in (1, 2):
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind == 3:
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif kind == 4:
        content[at:at] = content[at : at + size]
    elif kind == 5:
        del content[at : at + size]
    else:
        content[at : at + size] = draw.randbytes(len(content[at : at + size]))
    return bytes(content)


def mutated_record(raw: bytes, draw: random.Random) -> bytes:
    """An archive one of whose records has changed, with the right checksum."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in files if name.endswith("data.pkl")]
    name = draw.choice([*files, *pickles * 20])
    files[name] = mutated_bytes(files[name], draw)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


# ---------------------------------------------------------------- structure


class Strange:
    """An object of a class that nobody knows."""


VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 1 << 40, 1 << 62, -(1 << 70), 1 << 200),
    *(0.5, -1.5, 1e308, math.inf, -math.inf, math.nan),
    *("", "x", "../../x", "/etc/passwd", "${oc.env:HOME}", "a\nb", "\x1b[31m", "9" * 9),
    *(b"x", [], {}, (), [1], ["x"], [[]], {"a": 1}, {1: {}}, [None] * 9, {"": None}),
)


def _tensors(draw: random.Random) -> torch.Tensor:
    shape = draw.choice(((), (0,), (1,), (3,), (2, 2), (7, 8)))
    kind = draw.choice((torch.float32, torch.float64, torch.int64, torch.bool))
    value = draw.choice((0, 1, -1, 1e30, math.nan))
    if not kind.is_floating_point:
        value = 1
    return torch.full(shape, value, dtype=kind)


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values below a node."""
    inner: Any = ()
    if isinstance(node, dict):
        inner = node.items()
    elif isinstance(node, (list, tuple)):
        inner = enumerate(node)
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(content: Any, draw: random.Random, tensors: bool = True) -> tuple[Any, str]:
    """A copy with one entry left out, renamed, added or replaced; and what it was.

    Entries are drawn level by level, so that long lists do not get nearly all of it.
    """
    content = copy.deepcopy(content)
    path: list[Any] = []
    parent, key, node = None, None, content
    while isinstance(node, (dict, list)) and node and (not path or draw.random() < 0.8):
        parent = node
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
        node = node[key]
    kind = draw.choice(("delete", "rename", "add", *["replace"] * 5))
    value = copy.deepcopy(draw.choice(VALUES))
    if tensors and draw.random() < 0.3:
        value = _tensors(draw)
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw.choice(("x", 3, "__class__"))] = parent.pop(key)
    elif kind == "add" and isinstance(node, dict):
        node[draw.choice(("x", "reset", "__dict__", 5))] = value
    elif kind == "add" and isinstance(node, list):
        node.append(value)
    else:
        parent[key] = value
    shown = repr(value)[:40].replace("\n", " ")
    return content, f"{kind} {'/'.join(map(str, path))[:100]} {shown}"


# ---------------------------------------------------------------- outcomes


# Events of `sys.audit`: of each path that is changed, its place among the arguments and
# that of the open folder that it is relative to, if there is one.
_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.chmod": ((0, 2),),
    "shutil.rmtree": ((0, 1),),
    "shutil.move": ((0, None), (1, None)),
    "shutil.copyfile": ((1, None),),
}


class Watch:
    """Notes what this process deletes, moves or writes, and where."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.found: set[str] = set()
        self.is_on = False
        sys.addaudithook(self._note)  # for the rest of the process

    def _note(self, event: str, args: tuple) -> None:
        if not self.is_on:
            return
        if event == "open":
            path, mode, flags = args
            writes = flags is not None and flags & (os.O_WRONLY | os.O_RDWR)
            writes = writes or (isinstance(mode, str) and set(mode) & set("wax+"))
            self._of(event, [path] if writes else [])
        elif event in _EVENTS:
            self._of(event, [_path(args, *places) for places in _EVENTS[event]])

    def _of(self, event: str, paths: list) -> None:
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                where = os.path.realpath(os.fsdecode(path))
                if not where.startswith((*self.allowed, "/dev/", "/proc/")):
                    self.found.add(f"{event} {where}")

    @contextmanager
    def on(self, *allowed: Path | str) -> Iterator[None]:
        """Notes what is not below one of these folders."""
        self.allowed = tuple(os.path.realpath(x) for x in allowed)
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


def _path(args: tuple, at: int, folder_at: int | None) -> Any:
    path = args[at]
    folder = -1 if folder_at is None or folder_at >= len(args) else args[folder_at]
    if isinstance(path, (str, bytes, os.PathLike)) and folder not in (None, -1):
        return os.path.join(
            os.path.realpath(f"/proc/self/fd/{folder}"), os.fsdecode(path)
        )
    return path


class Fuzz:
    """Counts how readers end.

    Args:
        folder: Where files may be written.
        watch: That of the process.
    """

    def __init__(self, folder: Path, watch: Watch) -> None:
        self.folder = folder
        self.watch = watch
        self.counts: dict[str, Counter] = {}
        self.failures: list[str] = []
        self.slowest: dict[str, float] = {}

    def read(self, kind: str, about: str, reader: Callable[[], Any]) -> str:
        """Runs a reader and notes its end: right, refused, or a failure."""
        start = time.perf_counter()
        with self.watch.on(self.folder, os.environ["DUO_CACHE_DIR"]):
            try:
                reader()
            except (ConfigError, RunStopped) as error:
                text = str(error)
                is_line = text and "\n" not in text and len(text) < 2000
                outcome = "refused" if is_line else "failed"
                reason = text[:200]
            except Exception as error:
                outcome = "failed"
                reason = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                outcome, reason = "right", ""
        seconds = time.perf_counter() - start
        self.slowest[kind] = max(seconds, self.slowest.get(kind, 0))
        self.counts.setdefault(kind, Counter())[outcome] += 1
        if outcome == "failed":
            self.failures.append(f"{kind}: {about}: {reason}")
        return outcome

    def table(self) -> str:
        """The counts in Markdown."""
        lines = [
            "| files | mutations | read | refused in one line | failed | slowest (s) |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for kind, counts in self.counts.items():
            numbers = (counts["right"], counts["refused"], counts["failed"])
            cells = (kind, sum(numbers), *numbers, f"{self.slowest[kind]:.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


def saved(content: Any) -> bytes:
    """What `torch.save` makes of it; a plain pickle where it cannot."""
    file = io.BytesIO()
    try:
        torch.save(content, file)
    except Exception:
        return pickle.dumps(content)
    return file.getvalue()
