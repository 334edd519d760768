"""Where packed rows live: one Arrow file a split, mapped into memory when it is read.

A folder `rows/NAME-DIGEST` of the cache appears whole or not at all, so any number of
processes and jobs may ask for it at once: one builds it, the others wait. The digest
is that of everything the rows depend on. The cache may be on an object store; then the
folder is built here and copied there, or the other way round.

The folder's description has the sizes and hashes of its files. They are checked before
rows are used, once for all processes of a job; what does not have them is built anew.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import posixpath
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data.packing import Block, Layout
from data.rows import TokenRows, add_counts
from utils import (
    PARTIAL,
    ConfigError,
    copy_file,
    filesystem_of,
    flush,
    local_folder,
    num_cpus,
    one_line,
    path_exists,
    write_json,
)

log = logging.getLogger(__name__)

FORMAT = 2
ROWS_PER_BATCH = 4096
# The description comes last: where it is, the others are whole.
ROWS, COUNTS, DESCRIPTION = FILES = ("rows.arrow", "counts.npy", "description.json")
CHECKED = "checked.json"  # which state of the files has been found right
CHECK_HOLDS = 600  # seconds: for the other processes of a job, not for the next one
A_DAY = 24 * 3600
PIECE = 2**26  # bytes that are hashed at a time, by each thread
SAID_FROM = 2**31  # bytes of a file whose hash takes seconds


def stored_rows(
    cache_dir: str,
    name: str,
    key: Mapping[str, Any],
    layout: Layout,
    build: Callable[[str], Iterable[Block]],
    about: Callable[[], Mapping[str, Any]] = dict,
) -> TokenRows:
    """Rows of the cache, which are built first if they are not there; the arguments are
    those of `stored_folder`.

    Raises:
        ConfigError: If what is there cannot be read.
    """
    return open_rows(stored_folder(cache_dir, name, key, layout, build, about))


def stored_folder(
    cache_dir: str,
    name: str,
    key: Mapping[str, Any],
    layout: Layout,
    build: Callable[[str], Iterable[Block]],
    about: Callable[[], Mapping[str, Any]] = dict,
) -> str:
    """The local folder of rows, which are built first if they are not there.

    Args:
        cache_dir: Local or fsspec folder.
        name: For people who look into the folder.
        key: All that the rows depend on, apart from `layout`; JSON.
        layout: The rows'.
        build: Makes the rows; is given a folder for what it needs meanwhile.
        about: What else is to be known of rows that were made, JSON; `num_documents`
            is of the source.
    """
    key = {"format": FORMAT, **key, "layout": layout._asdict()}
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    relative = posixpath.join("rows", f"{name.replace('/', '_')}-{digest}")
    home = os.path.join(local_folder(cache_dir), relative)
    is_here = isinstance(filesystem_of(cache_dir)[0], LocalFileSystem)
    store = None if is_here else posixpath.join(cache_dir, relative)
    with _lock(home, name, key) as is_locked:
        fault = _fault(home, key)
        if fault is None and store and not is_whole(store):
            _copy(home, store)
        if fault is not None:
            _say(home, fault)
            with _new_folder(home, key, is_locked) as folder:
                if not (store and _fetched(store, folder, key)):
                    _write(folder, build(folder), layout, key, about)
                    if store:
                        _copy(folder, store)
    return home


def is_whole(folder: str) -> bool:
    return path_exists(posixpath.join(folder, DESCRIPTION))


def _fetched(store: str, folder: str, key: Mapping[str, Any]) -> bool:
    """Whether an object store has the rows; then they are in `folder`."""
    if not is_whole(store):
        return False
    _copy(store, folder)
    fault = _fault(folder, key)
    if fault is not None:
        _say(store, fault)
    return fault is None


def _say(folder: str, fault: str) -> None:
    if fault:
        log.warning("%s: %s; the rows are made again", folder, fault)


def _copy(source: str, target: str) -> None:
    for file in FILES:
        copy_file(posixpath.join(source, file), posixpath.join(target, file))


@contextlib.contextmanager
def _lock(home: str, name: str, key: Mapping[str, Any]) -> Iterator[bool]:
    """One process at a time, where the disk can lock; elsewhere all build the same.

    Yields:
        Whether nobody else on this machine is at work on these rows.
    """
    os.makedirs(os.path.dirname(home), exist_ok=True)
    lock = filelock.FileLock(f"{home}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("another process is at work on %s: waiting for it", name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if not is_whole(home):
            log.warning("%s cannot be locked (%s): going on without", home, error)
        rank = getattr(rank_zero_only, "rank", 0)
        while rank and _fault(home, key) is not None:  # the first rank builds
            time.sleep(1)
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextlib.contextmanager
def _new_folder(home: str, key: Mapping[str, Any], is_locked: bool) -> Iterator[str]:
    """A folder to fill, whose `FILES` then take the place of `home`."""
    _remove_left_over(home, is_locked)
    own = f"{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
    folder = f"{home}.{own}{PARTIAL}"
    os.makedirs(folder)
    try:
        yield folder
        for name in os.listdir(folder):  # what was needed meanwhile goes
            path = os.path.join(folder, name)
            (flush if name in FILES else os.remove)(path)
        flush(folder)  # before it gets its name: that may outlive a loss of power
        if _fault(home, key) is not None:
            shutil.rmtree(home, ignore_errors=True)
            os.rename(folder, home)
            flush(os.path.dirname(home))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_over(home: str, is_locked: bool) -> None:
    """Folders that processes began and did not live to finish, of these rows or others.

    Whoever fills one on this machine holds its lock, which ends with the process, so
    that one is dead whose lock can be had. Other machines may not see the lock: theirs
    go when nothing in them has changed for a day.
    """
    parent, base = os.path.split(home)
    for name in os.listdir(parent):
        found = _BEGUN.fullmatch(name)
        if found is None:
            continue
        path, rows = os.path.join(parent, name), os.path.join(parent, found[1])
        is_ours = found[2] == socket.gethostname()
        is_dead = is_ours and (is_locked if found[1] == base else _is_free(rows))
        if is_dead or time.time() - _last_change(path) > A_DAY:
            shutil.rmtree(path, ignore_errors=True)


# The rows' folder and the host in the name of one that is being filled.
_BEGUN = re.compile(rf"(.+-[0-9a-f]{{16}})\.(.+)\.\w+{re.escape(PARTIAL)}")


def _is_free(home: str) -> bool:
    """Whether nobody on this machine is at work on rows."""
    try:
        with filelock.FileLock(f"{home}.lock", timeout=0):
            return True
    except (filelock.Timeout, OSError, NotImplementedError):
        return False


def _last_change(folder: str) -> float:
    times = [time.time() - 2 * A_DAY]
    with contextlib.suppress(OSError):  # it is being removed
        paths = (folder, *(entry.path for entry in os.scandir(folder)))
        times += [os.stat(path).st_mtime for path in paths]
    return max(times)


# ---------------------------------------------------------------- hashes


def _fault(folder: str, key: Mapping[str, Any]) -> str | None:
    """What is wrong with the rows of a local folder: empty if there are none.

    A check is remembered for ten minutes, so that of the processes of a job one reads
    the files for it and the others do not.
    """
    if not is_whole(folder):
        return ""
    try:
        state = {name: _state(os.path.join(folder, name)) for name in FILES}
    except OSError as error:
        return one_line(str(error))
    if _was_checked(folder, state):
        return None
    try:
        about = described(folder)
        if {name: about.get(name) for name in key} != json.loads(json.dumps(key)):
            return f"{DESCRIPTION} is of other rows"
        for name in (ROWS, COUNTS):
            size, digest = about["files"][name]
            if state[name][0] != size:
                return f"{name} has {state[name][0]} bytes instead of {size}"
            if file_digest(os.path.join(folder, name)) != digest:
                return f"{name} is not what was written (its hash is another)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{DESCRIPTION} cannot be read ({one_line(str(error))})"
    with contextlib.suppress(OSError):  # of another user, who lets us read
        write_json(os.path.join(folder, CHECKED), state)
    return None


def _state(path: str) -> list[int]:
    """What changes when a file does; the size first."""
    about = os.stat(path)
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _was_checked(folder: str, state: Mapping[str, list[int]]) -> bool:
    path = os.path.join(folder, CHECKED)
    try:
        if not 0 <= time.time() - os.stat(path).st_mtime < CHECK_HOLDS:
            return False
        with open(path) as file:
            return json.load(file) == state
    except (OSError, ValueError, RecursionError):
        return False


def file_digest(path: str) -> str:
    """SHA-256 of the SHA-256s of a file's pieces, which threads make."""

    size = os.path.getsize(path)
    if size > SAID_FROM:
        log.info("hashing %s (%.1f GB)", path, size / 1e9)

    def of_piece(start: int) -> bytes:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            for _ in range(PIECE // 2**20):
                digest.update(file.read(2**20))
        return digest.digest()

    with ThreadPoolExecutor(num_cpus()) as pool:
        pieces = pool.map(of_piece, range(0, size, PIECE))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def described(folder: str) -> dict[str, Any]:
    """What the description of rows says.

    Raises:
        ValueError: If it is not as it was written.
    """
    with open(os.path.join(folder, DESCRIPTION), encoding="utf-8") as file:
        about = json.load(file)
    if not isinstance(about, dict):
        raise ValueError("it is no object")
    if about.pop("sha256", None) != _sha256(about):
        raise ValueError("its hash is another")
    return about


def _sha256(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- files


def _write(
    folder: str,
    blocks: Iterable[Block],
    layout: Layout,
    key: Mapping[str, Any],
    about: Callable[[], Mapping[str, Any]],
) -> None:
    has_padding = not layout.wrap or layout.keep_remainder
    ids = pa.list_(_id_type(key), layout.length)
    groups = _regrouped(blocks)
    first = next(groups, None)
    has_labels = first is not None and first.labels is not None
    fields = {"input_ids": ids} | ({"num_valid": pa.int32()} if has_padding else {})
    fields |= {"label": pa.int32()} if has_labels else {}
    schema = pa.schema(fields)
    counts, num_rows = np.zeros(0, dtype=np.int64), 0
    path = os.path.join(folder, ROWS)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for block in itertools.chain([] if first is None else [first], groups):
            flat = pa.array(block.ids.ravel(), type=ids.value_type)
            columns = [pa.FixedSizeListArray.from_arrays(flat, layout.length)]
            if has_padding:
                columns.append(pa.array(block.num_valid, type=pa.int32()))
            if has_labels:
                columns.append(pa.array(block.labels, type=pa.int32()))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            counts = add_counts(counts, block.ids)
            num_rows += len(block.ids)
    np.save(os.path.join(folder, COUNTS), counts)
    files = {}
    for name in (ROWS, COUNTS):
        path = os.path.join(folder, name)
        files[name] = [os.path.getsize(path), file_digest(path)]
    description = {"rows": num_rows, **about(), **key, "files": files}
    description["sha256"] = _sha256(description)
    with open(os.path.join(folder, DESCRIPTION), "w", encoding="utf-8") as file:
        json.dump(description, file, indent=1)


def _id_type(key: Mapping[str, Any]) -> pa.DataType:
    sizes = {2**8: pa.uint8(), 2**16: pa.uint16()}
    return next((x for n, x in sizes.items() if key["vocab_size"] <= n), pa.int32())


def _regrouped(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same rows in blocks of ROWS_PER_BATCH, so that a row is found at once."""
    held: list[Block] = []
    for block in blocks:
        held.append(block)
        if sum(len(block.ids) for block in held) < ROWS_PER_BATCH:
            continue
        together = Block.joined(held)
        end = len(together.ids) // ROWS_PER_BATCH * ROWS_PER_BATCH
        for start in range(0, end, ROWS_PER_BATCH):
            yield together.part(start, start + ROWS_PER_BATCH)
        held = [together.part(end)]
    if held and len((last := Block.joined(held)).ids):
        yield last


def open_rows(folder: str) -> TokenRows:
    """Rows that lie in a local folder.

    Raises:
        ConfigError: If they cannot be read.
    """
    ids, counts, said = open_folder(folder)
    about = said.get("num_documents"), said.get("num_skipped", 0)
    return TokenRows(ids, ids.num_valid, counts, *about)


def open_folder(folder: str) -> tuple["MappedIds", np.ndarray, dict[str, Any]]:
    """The ids of a local folder, how often each occurs, and the description.

    Raises:
        ConfigError: If they cannot be read.
    """
    try:
        ids = MappedIds(os.path.join(folder, ROWS))
        counts = np.load(os.path.join(folder, COUNTS), allow_pickle=False)
        return ids, counts, described(folder)
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, EOFError) as error:
        reason = one_line(str(error))
        raise ConfigError(
            f"data.cache_dir: {folder} cannot be read ({reason}); remove this folder, "
            "and it will be made again."
        ) from None


class MappedIds:
    """The ids of an Arrow file as an (N, L) array, of which only what is used is read.

    Indexed by a slice it stays on disk; by a list or an array of row numbers it gives
    a numpy array, (B, L).

    Args:
        path: Of the file.
    """

    ndim = 2

    def __init__(self, path: str) -> None:
        self._path = path
        with pa.memory_map(path) as file:
            reader = pa.ipc.open_file(file)
            batches = [
                reader.get_batch(index) for index in range(reader.num_record_batches)
            ]
        length = reader.schema.field("input_ids").type.list_size
        self._batches = [_array(batch, length) for batch in batches]
        self.num_valid = _column("num_valid", reader.schema.names, batches)
        self.labels = _column("label", reader.schema.names, batches)
        dtype = reader.schema.field("input_ids").type.value_type.to_pandas_dtype()
        self.dtype = np.dtype(dtype)
        self._length = length
        self._start, self._stop = 0, sum(map(len, self._batches))

    def _view(self, start: int, stop: int) -> "MappedIds":
        view = object.__new__(MappedIds)
        view.__dict__ |= self.__dict__ | {"_start": start, "_stop": stop}
        return view

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._length

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return self._view(self._start + start, self._start + max(start, stop))
        rows = np.asarray(key)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not ((rows >= 0) & (rows < len(self))).all():
            raise IndexError(f"{key} is out of range for {len(self)} rows")
        batches, places = np.divmod(rows + self._start, ROWS_PER_BATCH)
        if rows.ndim == 0:
            return self._batches[batches][places]
        ids = np.empty((*rows.shape, self._length), dtype=self.dtype)
        for n, (batch, place) in enumerate(zip(batches, places, strict=True)):
            ids[n] = self._batches[batch][place]
        return ids

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = [np.empty((0, self._length), dtype=self.dtype)]
        first = self._start // ROWS_PER_BATCH
        for number in range(first, -(-self._stop // ROWS_PER_BATCH)):
            offset = number * ROWS_PER_BATCH
            rows = slice(max(self._start - offset, 0), self._stop - offset)
            parts.append(self._batches[number][rows])
        return np.concatenate(parts).astype(dtype or self.dtype, copy=False)

    def tolist(self) -> list[list[int]]:
        return np.asarray(self).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped_again, (self._path, self._start, self._stop)


def _column(
    name: str, names: list[str], batches: list[pa.RecordBatch]
) -> np.ndarray | None:
    """A column of numbers, (N,), if there is one."""
    if name not in names:
        return None
    parts = [batch[name].to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int32), *parts])


def _mapped_again(path: str, start: int, stop: int) -> MappedIds:
    return MappedIds(path)[start:stop]


def _array(batch: pa.RecordBatch, length: int) -> np.ndarray:
    """A batch's ids where they lie, (R, L)."""
    flat = batch["input_ids"].flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, length)
