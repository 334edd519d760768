"""Where packed rows live: one Arrow file a split, mapped into memory when it is read.

A folder `rows/NAME-DIGEST` of the cache appears whole or not at all, so any number of
processes and jobs may ask for it at once: one builds it, the others wait. The digest
is that of everything the rows depend on. The cache may be on an object store; then the
folder is built here and copied there, or the other way round.
"""

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data.packing import Block, Layout
from data.rows import TokenRows, add_counts
from utils import PARTIAL, ConfigError, copy_file, local_folder, one_line, path_exists

log = logging.getLogger(__name__)

FORMAT = 1
ROWS_PER_BATCH = 4096
# The description comes last: where it is, the others are whole.
ROWS, COUNTS, DESCRIPTION = FILES = ("rows.arrow", "counts.npy", "description.json")


def stored_rows(
    cache_dir: str,
    name: str,
    key: Mapping[str, Any],
    layout: Layout,
    build: Callable[[], Iterable[Block]],
    about: Callable[[], Mapping[str, Any]] = dict,
) -> TokenRows:
    """Rows of the cache, which are built first if they are not there.

    Args:
        cache_dir: Local or fsspec folder.
        name: For people who look into the folder.
        key: All that the rows depend on, apart from `layout`; JSON.
        layout: The rows'.
        build: Makes the rows.
        about: What else is to be known of rows that were made, JSON; `num_documents`
            is of the source.

    Raises:
        ConfigError: If what is there cannot be read.
    """
    key = {"format": FORMAT, **key, "layout": layout._asdict()}
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    relative = posixpath.join("rows", f"{name.replace('/', '_')}-{digest}")
    shared = posixpath.join(cache_dir, relative)
    home = os.path.join(local_folder(cache_dir), relative)  # the same, if it is here
    if not _is_whole(home):
        with _lock(home, name):
            if not _is_whole(home):
                with _new_folder(home) as folder:
                    if _is_whole(shared):
                        _copy(shared, folder)
                    else:
                        _write(folder, build(), layout, key, about)
        if not _is_whole(shared):
            _copy(home, shared)
    return open_rows(home)


def _is_whole(folder: str) -> bool:
    return path_exists(posixpath.join(folder, DESCRIPTION))


def _copy(source: str, target: str) -> None:
    for file in FILES:
        copy_file(posixpath.join(source, file), posixpath.join(target, file))


@contextlib.contextmanager
def _lock(home: str, name: str) -> Iterator[None]:
    """One process at a time, where the disk can lock; elsewhere all build the same."""
    os.makedirs(os.path.dirname(home), exist_ok=True)
    lock = filelock.FileLock(f"{home}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("another process is tokenizing %s: waiting for it", name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): going on without", home, error)
        rank = getattr(rank_zero_only, "rank", 0)
        while rank and not _is_whole(home):  # the first rank builds
            time.sleep(1)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _new_folder(home: str) -> Iterator[str]:
    """A folder to fill, which then takes the place of `home`."""
    _remove_left_over(home)
    folder = f"{home}.{socket.gethostname()}.{os.getpid()}{PARTIAL}"
    os.makedirs(folder)
    try:
        yield folder
        if not _is_whole(home):
            shutil.rmtree(home, ignore_errors=True)
            os.rename(folder, home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_over(home: str) -> None:
    """Folders that processes of this machine began and did not live to finish."""
    parent, base = os.path.split(home)
    for name in os.listdir(parent):
        parts = name.removeprefix(f"{base}.").removesuffix(PARTIAL).rsplit(".", 1)
        is_partial = name.startswith(f"{base}.") and name.endswith(PARTIAL)
        if is_partial and parts[0] == socket.gethostname() and not _lives(parts[1]):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass  # another user's
    return True


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
    fields = {"input_ids": ids} | ({"num_valid": pa.int32()} if has_padding else {})
    schema = pa.schema(fields)
    counts, num_rows = np.zeros(0, dtype=np.int64), 0
    path = os.path.join(folder, ROWS)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for block in _regrouped(blocks):
            flat = pa.array(block.ids.ravel(), type=ids.value_type)
            columns = [pa.FixedSizeListArray.from_arrays(flat, layout.length)]
            if has_padding:
                columns.append(pa.array(block.num_valid, type=pa.int32()))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            counts = add_counts(counts, block.ids)
            num_rows += len(block.ids)
    np.save(os.path.join(folder, COUNTS), counts)
    with open(os.path.join(folder, DESCRIPTION), "w") as file:
        json.dump({"rows": num_rows, **about(), **key}, file, indent=1)


def _id_type(key: Mapping[str, Any]) -> pa.DataType:
    return pa.uint16() if key["vocab_size"] <= 2**16 else pa.int32()


def _regrouped(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same rows in blocks of ROWS_PER_BATCH, so that a row is found at once."""
    held: list[Block] = []
    for block in blocks:
        held.append(block)
        if sum(len(block.ids) for block in held) < ROWS_PER_BATCH:
            continue
        together = _joined(held)
        end = len(together.ids) // ROWS_PER_BATCH * ROWS_PER_BATCH
        for start in range(0, end, ROWS_PER_BATCH):
            yield Block(*(x[start : start + ROWS_PER_BATCH] for x in together))
        held = [Block(*(x[end:] for x in together))]
    if held and len((last := _joined(held)).ids):
        yield last


def _joined(blocks: list[Block]) -> Block:
    return Block(*map(np.concatenate, zip(*blocks, strict=True)))


def open_rows(folder: str) -> TokenRows:
    """Rows that lie in a local folder.

    Raises:
        ConfigError: If they cannot be read.
    """
    try:
        ids = MappedIds(os.path.join(folder, ROWS))
        counts = np.load(os.path.join(folder, COUNTS), allow_pickle=False)
        with open(os.path.join(folder, DESCRIPTION)) as file:
            num_documents = json.load(file).get("num_documents")
    except (pa.ArrowInvalid, OSError, ValueError, EOFError) as error:
        reason = one_line(str(error))
        raise ConfigError(
            f"data.cache_dir: {folder} cannot be read ({reason}); remove this folder, "
            "and it will be made again."
        ) from None
    return TokenRows(ids, ids.num_valid, counts, num_documents)


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
        self.num_valid: np.ndarray | None = None
        if "num_valid" in reader.schema.names:
            columns = [batch["num_valid"].to_numpy() for batch in batches]
            self.num_valid = np.concatenate([np.empty(0, np.int32), *columns])
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


def _mapped_again(path: str, start: int, stop: int) -> MappedIds:
    return MappedIds(path)[start:stop]


def _array(batch: pa.RecordBatch, length: int) -> np.ndarray:
    """A batch's ids where they lie, (R, L)."""
    flat = batch["input_ids"].flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, length)
