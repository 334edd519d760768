"""Packed rows on disk: whole or not at all, built once, read in place."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import time
from pathlib import Path

import filelock
import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from data import cache
from data.cache import (
    CHECK_HOLDS,
    COUNTS,
    DESCRIPTION,
    FILES,
    ROWS,
    MappedIds,
    file_digest,
    open_rows,
    stored_rows,
)
from data.packing import Block, Layout
from utils import PARTIAL

LAYOUT = Layout(6, bos=1, eos=2, pad=0)
KEY = {"documents": "mine", "vocab_size": 300}


def blocks(num_rows=23, size=4, seed=0):
    """Rows in blocks of some size."""
    ids = np.random.default_rng(seed).integers(0, 300, (num_rows, 6)).astype(np.int32)
    num_valid = np.random.default_rng(seed).integers(2, 7, num_rows).astype(np.int32)
    for start in range(0, num_rows, size):
        yield Block(ids[start : start + size], num_valid[start : start + size])


def store(folder, key=KEY, layout=LAYOUT, build=blocks):
    return stored_rows(str(folder), "set-valid", key, layout, lambda _: build())


def expected(num_rows=23):
    return np.concatenate([block.ids for block in blocks(num_rows)])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 5)


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("size", [1, 4, 5, 12, 100])
def test_rows_come_back(tmp_path, size):
    """Whatever blocks they came in; with their counts."""
    rows = store(tmp_path, build=lambda: blocks(size=size))
    assert np.array_equal(rows.ids, expected())
    assert rows.num_valid is None
    assert rows.ids.dtype == np.uint16
    assert rows.counts().tolist() == np.bincount(expected().ravel()).tolist()


def test_padding_comes_back(tmp_path):
    rows = store(tmp_path, layout=LAYOUT._replace(wrap=False))
    assert rows.num_valid.tolist() == [n for b in blocks() for n in b.num_valid]


def test_large_vocabularies_need_four_bytes(tmp_path):
    rows = store(tmp_path, {**KEY, "vocab_size": 2**16 + 1})
    assert rows.ids.dtype == np.int32
    assert np.array_equal(rows.ids, expected())


def test_small_vocabularies_need_a_byte(tmp_path):
    small = lambda: (x._replace(ids=x.ids % 256) for x in blocks())  # noqa: E731
    rows = store(tmp_path, {**KEY, "vocab_size": 256}, build=small)
    assert rows.ids.dtype == np.uint8
    assert np.array_equal(rows.ids, expected() % 256)


@pytest.mark.parametrize("size", [1, 4, 5, 12, 100])
def test_labels_come_back(tmp_path, size):
    """Whatever blocks they came in; a view and a copy have the same ids."""

    def labelled():
        start = 0
        for block in blocks(size=size):
            numbers = np.arange(start, start + len(block.ids))
            start += len(block.ids)
            yield block._replace(labels=numbers)

    rows = store(tmp_path, build=labelled)
    assert rows.ids.labels.tolist() == list(range(23))
    assert np.array_equal(rows.ids, expected())
    again = pickle.loads(pickle.dumps(rows.ids))
    assert again.labels.tolist() == list(range(23))
    assert store(tmp_path / "none").ids.labels is None


def test_no_rows_at_all(tmp_path):
    rows = store(tmp_path, build=lambda: iter(()))
    assert len(rows) == 0
    assert rows.fingerprint().tokens == 0


@pytest.mark.parametrize(
    "index",
    [
        *([0], [22, 3, 3, 10], [-1, -23], np.array([7, 1]), 4, -2),
        *(slice(3, 17), slice(None), slice(10, 4), slice(-6, None), slice(0, 20, 3)),
    ],
    ids=str,
)
def test_indexing_is_that_of_an_array(tmp_path, index):
    ids, array = store(tmp_path).ids, expected()
    assert np.array_equal(np.asarray(ids[index]), array[index])
    part = ids[4:19]
    inside = index if isinstance(index, slice) else np.asarray(index) % 15
    assert np.array_equal(np.asarray(part[inside]), array[4:19][inside])


@pytest.mark.parametrize("index", [23, [0, 23], -24])
def test_indices_out_of_range_are_refused(tmp_path, index):
    with pytest.raises(IndexError, match="out of range"):
        store(tmp_path).ids[index]


def test_a_slice_is_a_view(tmp_path):
    """And travels to another process as a path."""
    part = store(tmp_path).ids[5:9]
    assert isinstance(part, MappedIds)
    assert part.shape == (4, 6)
    copied = pickle.dumps(part)
    assert len(copied) < 500
    assert np.array_equal(np.asarray(pickle.loads(copied)), expected()[5:9])


# ---------------------------------------------------------------- keys


def test_a_folder_may_be_written_as_a_url(tmp_path):
    store(f"file://{tmp_path}")
    again = store(tmp_path, build=lambda: pytest.fail("built again"))
    assert np.array_equal(again.ids, expected())


def test_what_is_there_is_not_built_again(tmp_path):
    store(tmp_path)
    again = store(tmp_path, build=lambda: pytest.fail("built again"))
    assert np.array_equal(again.ids, expected())


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ({**KEY, "documents": "others"}, LAYOUT),
        ({**KEY, "more": 1}, LAYOUT),
        (KEY, LAYOUT._replace(insert_eos=False)),
        (KEY, LAYOUT._replace(eos=3)),
        (KEY, LAYOUT._replace(keep_remainder=True)),
    ],
)
def test_everything_in_the_key_counts(tmp_path, key, layout):
    store(tmp_path)
    built = []
    store(tmp_path, key, layout, build=lambda: built.append(1) or blocks())
    assert built


# ---------------------------------------------------------------- interruptions


def test_an_interrupted_build_leaves_nothing(tmp_path):
    """And the next one gives what an undisturbed one would."""

    def interrupted():
        yield from list(blocks())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, build=interrupted)
    names = [path.name for path in (tmp_path / "rows").iterdir()]
    assert all(name.endswith(".lock") for name in names)
    assert np.array_equal(store(tmp_path).ids, expected())


def build_and_die(folder):
    def dying():
        yield from list(blocks(num_rows=80))[:12]
        os.kill(os.getpid(), signal.SIGKILL)

    store(folder, build=dying)


def test_a_killed_build_is_made_again(tmp_path):
    """Its half-written folder goes."""
    process = multiprocessing.get_context("fork").Process(
        target=build_and_die, args=(tmp_path,)
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "rows").glob(f"*{PARTIAL}")
    assert (left / "rows.arrow").stat().st_size
    assert np.array_equal(store(tmp_path).ids, expected())
    assert not left.exists()


def build_slowly(folder, number, meet):
    def slow():
        Path(folder, f"began-{number}").touch()
        meet.wait(60)
        for block in blocks():
            time.sleep(0.05)
            yield block

    rows = store(folder, build=slow)
    Path(folder, f"sha-{number}").write_text(rows.fingerprint().sha256)


@pytest.mark.parametrize("can_lock", [True, False])
def test_jobs_at_once_get_the_same(tmp_path, monkeypatch, can_lock):
    """One builds; where the disk cannot lock all do, and the first one's stays."""
    if not can_lock:

        def no_lock(*args, **kwargs):
            raise OSError("no locks on this disk")

        monkeypatch.setattr(cache.filelock.FileLock, "acquire", no_lock)
    context = multiprocessing.get_context("fork")
    builders = 1 if can_lock else 3
    meet = context.Barrier(builders)
    inputs = [(tmp_path, number, meet) for number in range(3)]
    jobs = [context.Process(target=build_slowly, args=x) for x in inputs]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len({path.read_text() for path in tmp_path.glob("sha-*")}) == 1
    assert len(list(tmp_path.glob("began-*"))) == builders
    names = [path.name for path in (tmp_path / "rows").iterdir()]
    assert not [name for name in names if name.endswith(PARTIAL)]


def test_other_ranks_wait_where_the_disk_cannot_lock(tmp_path, monkeypatch):
    """So that a job of many does not tokenize as many times."""

    def no_lock(*args, **kwargs):
        raise OSError("no locks on this disk")

    monkeypatch.setattr(cache.filelock.FileLock, "acquire", no_lock)
    context = multiprocessing.get_context("fork")
    inputs = (tmp_path, 0, context.Barrier(1))
    first = context.Process(target=build_slowly, args=inputs)
    first.start()
    monkeypatch.setattr(cache.rank_zero_only, "rank", 1, raising=False)
    rows = store(tmp_path, build=lambda: pytest.fail("built by another rank"))
    first.join(30)
    assert np.array_equal(rows.ids, expected())


# ---------------------------------------------------------------- object stores


def test_an_object_store_holds_the_rows(tmp_path, monkeypatch):
    """Built here and copied there; another machine copies them back, once."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    monkeypatch.setattr(utils, "user_cache_dir", lambda: str(here))
    assert np.array_equal(store("memory://bucket/cache").ids, expected())
    (shared,) = fsspec.filesystem("memory").ls("/bucket/cache/rows", detail=False)
    names = fsspec.filesystem("memory").ls(shared, detail=False)
    assert sorted(name.rsplit("/", 1)[-1] for name in names) == sorted(FILES)
    monkeypatch.setattr(utils, "user_cache_dir", lambda: str(elsewhere))
    never = lambda: pytest.fail("built again")  # noqa: E731
    assert np.array_equal(store("memory://bucket/cache", build=never).ids, expected())
    assert list(elsewhere.glob("rows/*/rows.arrow"))
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_every_rank_fetches_what_its_machine_lacks(tmp_path, monkeypatch):
    """Ranks of another node have a disk of their own."""
    monkeypatch.setattr(utils, "user_cache_dir", lambda: str(tmp_path / "here"))
    store("memory://nodes/cache")
    monkeypatch.setattr(utils, "user_cache_dir", lambda: str(tmp_path / "elsewhere"))
    monkeypatch.setattr(cache.rank_zero_only, "rank", 8, raising=False)
    never = lambda: pytest.fail("built again")  # noqa: E731
    assert np.array_equal(store("memory://nodes/cache", build=never).ids, expected())
    fsspec.filesystem("memory").rm("/nodes", recursive=True)


# ---------------------------------------------------------------- damage


def flip(path, place, bit):
    """A bad disk: one bit of a byte is another."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)


def folder_of(tmp_path):
    (folder,) = (tmp_path / "rows").glob("set-valid-????????????????")
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [b"", b"nonsense" * 9, b"[1]", b"[" * 10**5, None])
def test_what_is_damaged_is_made_again(tmp_path, caplog, file, content):
    """As after a loss of power, which leaves files without content, or none."""
    store(tmp_path)
    path = folder_of(tmp_path) / file
    path.unlink() if content is None else path.write_bytes(content)
    assert np.array_equal(store(tmp_path).ids, expected())
    if file != DESCRIPTION or content is not None:
        (line,) = [x.getMessage() for x in caplog.records if "made again" in x.message]
        assert str(path.parent) in line
        assert "\n" not in line
    caplog.clear()
    never = lambda: pytest.fail("built again")  # noqa: E731
    assert np.array_equal(store(tmp_path, build=never).ids, expected())
    assert not caplog.records


@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
def test_any_other_bit_is_seen(tmp_path, file, place, bit):
    rows = store(tmp_path)
    flip(folder_of(tmp_path) / file, place, bit)
    again = store(tmp_path)
    assert np.array_equal(again.ids, expected())
    assert again.counts().tolist() == rows.counts().tolist()


def test_a_flip_is_seen_whatever_the_files_times_say(tmp_path):
    store(tmp_path)
    store(tmp_path)  # has looked at the files just now
    path = folder_of(tmp_path) / ROWS
    times = path.stat()
    flip(path, times.st_size // 2, 0)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(store(tmp_path).ids, expected())


def test_files_are_hashed_once_for_the_processes_of_a_job(tmp_path, monkeypatch):
    """And again for a later one."""
    store(tmp_path)
    hashed = []
    monkeypatch.setattr(
        cache, "file_digest", lambda path: hashed.append(path) or file_digest(path)
    )
    for _ in range(3):
        store(tmp_path)
    assert [Path(path).name for path in hashed] == [ROWS, COUNTS]
    now = time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now + 2 * CHECK_HOLDS)
    store(tmp_path)
    assert len(hashed) == 4


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**26, 2**26 + 5])
def test_a_hash_is_that_of_the_pieces(tmp_path, size):
    data = os.urandom(1000) * (size // 1000 + 1)
    path = tmp_path / "x"
    path.write_bytes(data[:size])
    pieces = [data[:size][n : n + 2**26] for n in range(0, size, 2**26)]
    whole = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert file_digest(str(path)) == hashlib.sha256(whole).hexdigest()


def test_rows_of_another_key_are_not_taken(tmp_path):
    """A folder that was copied under the name of another."""
    store(tmp_path)
    others = {**KEY, "documents": "others"}
    store(tmp_path, others, build=lambda: blocks(seed=1))
    folders = sorted((tmp_path / "rows").glob("set-valid-????????????????"))
    mine = [x for x in folders if '"mine"' in (x / DESCRIPTION).read_text()]
    (other,) = set(folders) - set(mine)
    shutil.rmtree(mine[0])
    shutil.copytree(other, mine[0])
    assert np.array_equal(store(tmp_path).ids, expected())


def test_a_damaged_copy_of_an_object_store_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "user_cache_dir", lambda: str(tmp_path / "here"))
    store("memory://flipped/cache")
    memory = fsspec.filesystem("memory")
    (path,) = memory.glob("/flipped/cache/rows/*/rows.arrow")
    data = bytearray(memory.cat(path))
    data[len(data) // 2] ^= 1
    memory.pipe(path, bytes(data))
    for place in ("elsewhere", "third"):  # the second one mends it
        monkeypatch.setattr(utils, "user_cache_dir", lambda x=place: str(tmp_path / x))
        built = []
        rows = store(
            "memory://flipped/cache",
            build=lambda built=built: built.append(1) or blocks(),
        )
        assert np.array_equal(rows.ids, expected())
        assert bool(built) == (place == "elsewhere")
    memory.rm("/flipped", recursive=True)


def test_files_are_flushed_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """All three, the folder, then the one above it."""
    flushed = []
    monkeypatch.setattr(
        cache,
        "flush",
        lambda path: flushed.append(
            (Path(path).name, list((tmp_path / "rows").glob("*[0-9a-f]")))
        ),
    )
    store(tmp_path)
    assert {name for name, _ in flushed[:3]} == set(FILES)
    assert flushed[3][0].endswith(PARTIAL)
    assert not any(named for _, named in flushed[:4])
    assert flushed[4] == ("rows", [folder_of(tmp_path)])


@pytest.mark.parametrize(
    ("host", "age", "goes"), [("", 0, True), ("x", 0, False), ("x", 2, True)]
)
def test_left_overs(tmp_path, host, age, goes):
    """Of this machine whatever its process was called, which may be there again; of
    another one when they are old."""
    store(tmp_path)
    home = folder_of(tmp_path)
    shutil.rmtree(home)
    left = Path(f"{home}.{host or socket.gethostname()}.1{PARTIAL}")
    left.mkdir()
    (left / ROWS).write_bytes(b"half")
    then = time.time() - age * 24 * 3600
    for path in (left / ROWS, left):
        os.utime(path, (then, then))
    store(tmp_path)
    assert left.exists() != goes


def test_left_overs_of_other_rows(tmp_path):
    """They go unless somebody is at work on these."""
    rows = tmp_path / "rows"
    rows.mkdir()
    left = [
        rows / f"set-valid-{n * 16}.{socket.gethostname()}.x{PARTIAL}" for n in "ab"
    ]
    for path in left:
        path.mkdir()
    with filelock.FileLock(rows / f"set-valid-{'a' * 16}.lock"):
        store(tmp_path)
    assert [path.exists() for path in left] == [True, False]


def test_what_is_needed_meanwhile_goes(tmp_path):
    def build(folder):
        Path(folder, "texts.arrow").write_bytes(b"x")
        return blocks()

    stored_rows(str(tmp_path), "set-valid", KEY, LAYOUT, build)
    assert sorted(os.listdir(folder_of(tmp_path))) == sorted(FILES)


def test_the_description_says_what_the_rows_are(tmp_path):
    store(tmp_path)
    (path,) = tmp_path.glob("rows/*/description.json")
    description = json.loads(path.read_text())
    assert description["rows"] == 23
    assert description["layout"]["length"] == 6
    assert description["documents"] == "mine"
    assert np.array_equal(open_rows(str(path.parent)).ids, expected())
