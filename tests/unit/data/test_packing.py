"""From documents to rows: the same rows for any number of processes."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import encoding, packing
from data.detokenizers import DETOKENIZERS, TEXT8, detokenize
from data.documents import Listed, Part
from data.packing import Chunk, Layout, lay_out, rows_of, tokenize
from data.rows import TokenRows
from data.tokenizers import bytes_tokenizer
from utils import RunStopped

LAYOUT = Layout(8, bos=256, eos=257, pad=259)
TEXTS = [f"document {n} , " * (n % 5) for n in range(83)]


def slowly(texts, layout, rules=()):
    """Packed rows by plain lists; bytes are their own ids up to an order."""
    tokenizer = bytes_tokenizer()
    stream = []
    for text in texts:
        clean = detokenize(text, rules)
        stream += tokenizer.encode(clean, add_special_tokens=False)
        stream += [layout.eos] * layout.insert_eos
    size = layout.length - 2
    starts = range(0, len(stream) - size + 1, size)
    return [[layout.bos, *stream[i : i + size], layout.eos] for i in starts]


def rows(texts, layout=LAYOUT, rules=(), **options):
    chunks = tokenize(Listed(texts), bytes_tokenizer(), rules, **options)
    return rows_of(lay_out(chunks, layout), layout.length)


@pytest.mark.parametrize("num_proc", [1, 2, 5])
@pytest.mark.parametrize("insert_eos", [True, False])
def test_rows_do_not_depend_on_the_processes(monkeypatch, num_proc, insert_eos):
    """They are those of one list of all tokens."""
    monkeypatch.setattr(packing, "DOCUMENTS_AT_A_TIME", 7)
    layout, rules = LAYOUT._replace(insert_eos=insert_eos), DETOKENIZERS["lm1b"]
    got = rows(TEXTS, layout, rules, num_proc=num_proc)
    assert got.ids.tolist() == slowly(TEXTS, layout, rules)
    assert got.num_valid is None


@settings(max_examples=25)
@given(
    st.lists(st.text(alphabet="ab .", max_size=30), max_size=20),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_rows_do_not_depend_on_the_chunks(texts, size, wrap, keep_remainder):
    layout = LAYOUT._replace(wrap=wrap, keep_remainder=keep_remainder)

    def in_chunks_of(size):
        tokens = list(tokenize(Listed(texts), bytes_tokenizer()))
        ids = np.concatenate([np.empty(0, np.int32), *(c.ids for c in tokens)])
        lengths = np.concatenate([np.empty(0, int), *(c.lengths for c in tokens)])
        ends = np.cumsum(lengths)
        chunks = [
            Chunk(ids[([0, *ends][i]) : [0, *ends][i + len(part)]], part)
            for i in range(0, len(lengths), size)
            for part in [lengths[i : i + size]]
        ]
        return rows_of(lay_out(chunks, layout), layout.length)

    few, many = in_chunks_of(size), in_chunks_of(100)
    assert few.fingerprint() == many.fingerprint()


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("rules", [(), TEXT8, DETOKENIZERS["lm1b"]])
def test_rows_do_not_depend_on_the_pieces(monkeypatch, num_proc, wrap, rules):
    """Long documents between short ones, taken apart or whole."""
    layout = LAYOUT._replace(wrap=wrap)
    texts = ["a short one", "", "a long one , of 12 words " * 50, "x", "Y z" * 100, ""]
    expected = rows(texts, layout, rules).fingerprint()
    monkeypatch.setattr(packing, "CHARACTERS_AT_A_TIME", 70)
    monkeypatch.setattr(encoding, "PIECE", 30)
    assert rows(texts, layout, rules, num_proc=num_proc).fingerprint() == expected
    few = [text for text in texts if text]
    expected = rows(few, layout, rules).fingerprint()
    options = {"num_proc": num_proc, "drop_empty": True}
    assert rows(texts, layout, rules, **options).fingerprint() == expected


def test_a_long_document_is_never_in_memory_as_tokens(monkeypatch):
    """It comes in chunks of which all but the last are open."""
    text = "the cat sat on the mat " * 100_000
    chunks = list(tokenize(Listed(["a", text, "b"]), bytes_tokenizer()))
    assert max(len(chunk.ids) for chunk in chunks) <= packing.CHARACTERS_AT_A_TIME
    assert [chunk.is_open for chunk in chunks] == [False] + [True] * 8 + [False] * 2
    assert sum(len(chunk.ids) for chunk in chunks) == len(text) + 2


def test_the_remainder_is_kept_on_demand():
    """As a padded row: no token is lost, none is counted that is not there."""
    layout = LAYOUT._replace(keep_remainder=True, insert_eos=False)
    got = rows(["abcdefghi"], layout)
    assert got.num_valid.tolist() == [8, 5]
    assert len(got.valid_ids()) == 9 + 2 * 2
    assert rows(["abcdef"], layout).num_valid is None


def test_empty_documents_separate_or_are_dropped():
    """Of published sets each stands for an eos; of one's own files they are nothing."""
    texts = ["abc", "", "", "defghijk"]
    assert rows(texts).ids.tolist() == slowly(texts, LAYOUT)
    without = slowly(["abc", "defghijk"], LAYOUT)
    assert rows(texts, drop_empty=True).ids.tolist() == without


def test_little_is_in_memory(monkeypatch):
    """Chunks are made as they are asked for, a few for each process ahead."""
    monkeypatch.setattr(packing, "DOCUMENTS_AT_A_TIME", 1)
    asked = []

    class Watched(Listed):
        def texts(self, start, stop):
            asked.append(start)
            return super().texts(start, stop)

    chunks = tokenize(Watched(TEXTS), bytes_tokenizer())
    next(chunks)
    assert asked == [0]
    submitted = []
    run = packing._in_order(submitted.append, list(range(50)), 1)
    list(itertools.islice(run, 3))
    assert submitted == [0, 1, 2]


def test_a_fault_in_a_process_is_the_callers():
    class Broken(Listed):
        def texts(self, start, stop):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(tokenize(Broken(["a"] * 2000), bytes_tokenizer(), num_proc=2))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 25), st.integers(0, 25))
def test_a_part_of_documents(start, stop, low, high):
    texts = [str(n) for n in range(20)]
    start, stop = min(start, stop), max(start, stop)
    part = Part(Listed(texts), start, stop)
    assert len(part) == stop - start
    assert part.texts(low, high) == texts[start:stop][low:high]


# ---------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_of_the_tokens_alone(monkeypatch):
    """Of any type, held in any way; every change of a token or of a row shows."""
    ids = np.arange(40).reshape(8, 5) % 7
    same = [TokenRows(ids), TokenRows(ids.astype(np.uint16)), TokenRows(ids * 1)]
    prints = {rows.fingerprint() for rows in same}
    assert len(prints) == 1
    assert next(iter(prints))[:2] == (8, 40)
    shorter = np.full(8, 5)
    shorter[3] = 4
    others = [
        TokenRows(ids[::-1]),
        TokenRows(ids[:-1]),
        TokenRows(ids.reshape(4, 10)),
        TokenRows(ids + (np.arange(40) == 17).reshape(8, 5)),
        TokenRows(ids, shorter),
    ]
    assert len({rows.fingerprint().sha256 for rows in [same[0], *others]}) == 6
    padded = ids.copy()
    padded[3, 4] = 99  # padding does not count
    assert TokenRows(padded, shorter).fingerprint() == others[-1].fingerprint()
    monkeypatch.setattr(TokenRows.parts, "__defaults__", (3,))
    assert same[0].fingerprint() in prints


def test_counts_are_those_of_all_ids():
    """With padding, or without it; of any number of ids."""
    random = np.random.default_rng(0)
    ids, num_valid = random.integers(0, 50, (300, 9)), random.integers(1, 10, 300)
    counts = np.bincount(ids.ravel())
    assert TokenRows(ids).counts().tolist() == counts.tolist()
    assert TokenRows(ids).valid_counts(52).tolist() == [*counts, 0, 0]
    rows = TokenRows(ids, num_valid)
    assert rows.counts().tolist() == counts.tolist()
    valid = np.bincount(rows.valid_ids(), minlength=50)
    assert rows.valid_counts(50).tolist() == valid.tolist()
    assert valid.sum() == num_valid.sum()


# ---------------------------------------------------------------- processes


class Slow:
    """A rule that takes its time, and says which process runs it."""

    def __init__(self, folder):
        self._folder = folder

    def __call__(self, text):
        (self._folder / str(os.getpid())).touch()
        time.sleep(0.2)
        return text


def one_by_one(folder):
    documents = Listed(["text"] * 99)
    return tokenize(documents, bytes_tokenizer(), (Slow(folder),), num_proc=2)


def pack_slowly(folder):
    for _ in one_by_one(folder):
        pass


@pytest.fixture
def packing_process(tmp_path, monkeypatch):
    """One that packs with two others, and their ids."""
    monkeypatch.setattr(packing, "DOCUMENTS_AT_A_TIME", 1)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=pack_slowly, args=(tmp_path,))
    process.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    yield process, [int(path.name) for path in tmp_path.iterdir()]
    process.kill()
    process.join(30)


def wait_for(is_so, seconds=30):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid):
    """Also where nobody takes notice of ends, as in a container."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="for /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_they_work_for(packing_process, number):
    process, pids = packing_process
    assert all(map(runs, pids))
    os.kill(process.pid, number)
    process.join(30)
    wait_for(lambda: not any(map(runs, pids)), seconds=10)


class Killing:
    """A rule: one process is killed by it, by the system when memory is exhausted, for
    example; any other goes on for an hour.
    """

    def __init__(self, folder):
        self._first = folder / "first"

    def __call__(self, text):
        try:
            self._first.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_a_process_that_is_killed_is_said(tmp_path, monkeypatch, handler):
    """The others end with it, whatever this process does with signals."""
    monkeypatch.setattr(packing, "DOCUMENTS_AT_A_TIME", 1)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(RunStopped, match=r"killed.*lower data\.num_proc=2"):
            rows(["text"] * 99, rules=(Killing(tmp_path),), num_proc=2)
    finally:
        signal.signal(signal.SIGTERM, before)
