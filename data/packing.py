"""Documents -> token ids -> rows of L tokens, by any number of processes.

    texts -> detokenize -> tokenize -> pack | pad -> blocks of rows

Documents are tokenised in parallel, a few hundred at a time and long ones in pieces,
and laid out in order by one process. So rows depend on the documents and their order
alone, and memory on neither the number of documents nor of rows, nor on how many tokens
a document has.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import torch

from data.detokenizers import Rules, detokenize, in_parts
from data.documents import Documents
from data.encoding import (
    CHARACTERS_AT_A_TIME,
    encode_pieces,
    encode_texts,
    pieces_of,
)
from data.progress import progress
from data.rows import TokenRows
from utils import RunStopped

DOCUMENTS_AT_A_TIME = 512


# ---------------------------------------------------------------- layout


class Layout(NamedTuple):
    """How token ids become rows."""

    length: int  # L
    bos: int
    eos: int
    pad: int
    wrap: bool = True  # rows cut from the stream of all documents, or one document each
    insert_eos: bool = True  # eos behind every document in the stream
    keep_remainder: bool = False  # the stream's end as a last, padded row


class Chunk(NamedTuple):
    """Token ids of some documents."""

    ids: np.ndarray  # of all, one behind the other
    lengths: np.ndarray  # of each
    is_open: bool = False  # of one, which goes on in the next chunk


class Block(NamedTuple):
    """Some rows."""

    ids: np.ndarray  # (R, L)
    num_valid: np.ndarray  # (R,), L where there is no padding
    labels: np.ndarray | None = None  # (R,), of rows that have a class each

    def part(self, start: int, stop: int | None = None) -> "Block":
        """The rows start .. stop - 1."""
        ids, num_valid = self.ids[start:stop], self.num_valid[start:stop]
        return Block(
            ids, num_valid, None if self.labels is None else self.labels[start:stop]
        )

    @classmethod
    def joined(cls, blocks: "Sequence[Block]") -> "Block":
        """The rows of several blocks, all of them with labels or none."""
        labels = [x.labels for x in blocks if x.labels is not None]
        return cls(
            np.concatenate([x.ids for x in blocks]),
            np.concatenate([x.num_valid for x in blocks]),
            np.concatenate(labels) if labels else None,
        )


def lay_out(chunks: Iterable[Chunk], layout: Layout) -> Iterator[Block]:
    """Rows of all documents, in order."""
    return (pack if layout.wrap else pad)(chunks, layout)


def pack(chunks: Iterable[Chunk], layout: Layout) -> Iterator[Block]:
    """Cuts the stream of all documents into rows: bos, L - 2 of its tokens, eos.

    The stream goes on from chunk to chunk; only what is left at its very end is
    dropped, or becomes a padded row.
    """
    size = layout.length - 2
    rest = np.empty(0, dtype=np.int32)
    for chunk in chunks:
        stream = np.concatenate([rest, separated(chunk, layout)])
        num_rows = len(stream) // size
        rest = stream[num_rows * size :]
        if num_rows:
            yield framed(stream[: num_rows * size].reshape(num_rows, size), layout)
    if layout.keep_remainder and len(rest):
        yield from pad([Chunk(rest, np.array([len(rest)]))], layout)


def separated(chunk: Chunk, layout: Layout) -> np.ndarray:
    """The stream of a chunk's documents."""
    if not layout.insert_eos:
        return chunk.ids
    ends = np.cumsum(chunk.lengths)
    return np.insert(chunk.ids, ends[:-1] if chunk.is_open else ends, layout.eos)


def framed(content: np.ndarray, layout: Layout) -> Block:
    """bos and eos around full rows, (R, L - 2) -> (R, L)."""
    ids = np.empty((len(content), layout.length), dtype=np.int32)
    ids[:, 0], ids[:, 1:-1], ids[:, -1] = layout.bos, content, layout.eos
    return Block(ids, np.full(len(ids), layout.length, dtype=np.int32))


def pad(chunks: Iterable[Chunk], layout: Layout) -> Iterator[Block]:
    """One document a row: bos, at most L - 2 tokens, eos, then padding."""
    size = layout.length - 2
    for chunk in _closed(chunks, size):
        lengths = np.minimum(chunk.lengths, size).astype(np.int32)
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        ids = np.full((len(lengths), layout.length), layout.pad, dtype=np.int32)
        ids[:, 0] = layout.bos
        ids[np.arange(len(ids)), 1 + lengths] = layout.eos
        is_content = np.arange(size) < lengths[:, None]
        source = (starts[:, None] + np.arange(size))[is_content]
        ids[:, 1:-1][is_content] = chunk.ids[source]
        yield Block(ids, lengths + 2)


def _closed(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """Chunks without those that go on; of these the first `size` tokens."""
    begun: np.ndarray | None = None
    for chunk in chunks:
        if begun is None and not chunk.is_open:
            yield chunk
            continue
        begun = chunk.ids if begun is None else np.concatenate([begun, chunk.ids])
        begun = begun[:size].copy()
        if not chunk.is_open:
            yield Chunk(begun, np.array([len(begun)]))
            begun = None


def rows_of(blocks: Iterable[Block], length: int) -> TokenRows:
    """All rows in memory.

    Args:
        blocks: The rows in order.
        length: L.
    """
    none = Block(np.empty((0, length), np.int32), np.empty(0, np.int32))
    ids, num_valid, _ = Block.joined([none, *blocks])
    return TokenRows(ids, None if (num_valid == length).all() else num_valid)


def encode(texts: list[str], tokenizer: Any, rules: Rules = ()) -> Chunk:
    """Token ids of texts, without special tokens around them."""
    clean = (detokenize(text, rules) for text in texts)
    return Chunk(*encode_texts(clean, tokenizer))


def tokenize(
    documents: Documents,
    tokenizer: Any,
    rules: Rules = (),
    *,
    num_proc: int = 1,
    name: str = "documents",
    drop_empty: bool = False,
) -> Iterator[Chunk]:
    """Token ids of all documents, in order, with a progress bar.

    Args:
        documents: To tokenise.
        tokenizer: Of `transformers`.
        rules: Run on every text first.
        num_proc: Processes; the chunks are the same for every number of them.
        name: For the bar.
        drop_empty: Whether documents without text are left out.
    """
    with _one_thread_each() if num_proc > 1 else contextlib.nullcontext():
        work = _work(documents, tokenizer, rules, drop_empty)
        first = list(itertools.islice(work, max(num_proc, 1)))
        sizes: deque[int] = deque()
        tasks = _noting(itertools.chain(first, work), sizes)
        run = functools.partial(_encode_work, tokenizer)
        chunks = _in_order(run, tasks, min(num_proc, len(first)))
        bar = progress(None, f"tokenizing {name}", total=len(documents))
        with bar, contextlib.closing(chunks):
            of_one = 0  # tokens of a long document so far
            for chunk in chunks:
                yield chunk
                bar.update(sizes.popleft())
                of_one = of_one + len(chunk.ids) if chunk.is_open else 0
                millions = f"{of_one // 10**6} million tokens of one document"
                if of_one and bar.postfix != millions:
                    bar.set_postfix_str(millions)


class Work(NamedTuple):
    """Some documents, or a part of a long one."""

    texts: list[str]  # documents, or pieces of one
    num_documents: int  # that end with these
    rules: Rules = ()  # to be run on each first
    is_part: bool = False  # whether these are pieces of one


def _work(
    documents: Documents, tokenizer: Any, rules: Rules, drop_empty: bool
) -> Iterator[Work]:
    """All documents in order, about `CHARACTERS_AT_A_TIME` of them at a time."""
    held: list[str] = []
    size = num_documents = 0
    for text in _read(documents):
        num_documents += 1
        if drop_empty and not text:
            continue
        if len(text) > CHARACTERS_AT_A_TIME and (parts := in_parts(text, rules)):
            if held:
                yield Work(held, num_documents - 1, rules)
            yield from _of_one(pieces_of(parts, tokenizer))
            held, size, num_documents = [], 0, 0
            continue
        held.append(text)
        size += len(text)
        if size >= CHARACTERS_AT_A_TIME or len(held) >= DOCUMENTS_AT_A_TIME:
            yield Work(held, num_documents, rules)
            held, size, num_documents = [], 0, 0
    if num_documents:
        yield Work(held, num_documents, rules)


def _of_one(pieces: Iterator[str]) -> Iterator[Work]:
    """The pieces of one document, the last of which ends it."""
    held: list[str] = []
    for piece in pieces:
        if sum(map(len, held)) + len(piece) > CHARACTERS_AT_A_TIME and held:
            yield Work(held, 0, is_part=True)
            held = []
        held.append(piece)
    yield Work(held, 1, is_part=True)


def _read(documents: Documents) -> Iterator[str]:
    """All texts in order, only as many at a time as are not too long together."""
    start, step = 0, 1
    while start < len(documents):
        texts = documents.texts(start, min(start + step, len(documents)))
        start += len(texts)
        is_little = sum(map(len, texts)) < CHARACTERS_AT_A_TIME
        yield from texts
        step = min(2 * step, DOCUMENTS_AT_A_TIME) if is_little else max(step // 2, 1)


def _noting(work: Iterable[Work], sizes: deque[int]) -> Iterator[Work]:
    for some in work:
        sizes.append(some.num_documents)
        yield some


def _encode_work(tokenizer: Any, work: Work) -> Chunk:
    if work.is_part:
        ids, lengths = encode_pieces([(0, piece) for piece in work.texts], tokenizer)
        return Chunk(ids, lengths, is_open=not work.num_documents)
    return encode(work.texts, tokenizer, work.rules)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tokenizers that take one thread in each process, whatever was used before."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _in_order(
    run: Callable[[Any], Any], tasks: Iterable[Any], num_proc: int
) -> Generator[Any, None, None]:
    """Results of tasks in their order; a few of each process at a time."""
    if num_proc <= 1:
        yield from map(run, tasks)
        return
    is_safe = sys.platform == "linux"  # elsewhere libraries do not survive a fork
    context = multiprocessing.get_context("fork" if is_safe else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, _set_task, (run, os.getpid()))
    try:
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(pool.submit(_run_task, task))
            if len(waiting) > 3 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunStopped(
            "A process that tokenizes has been killed, probably because memory is "
            f"exhausted: lower data.num_proc={num_proc}."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_task: Callable[[Any], Any]  # of a worker process


def _set_task(run: Callable[[Any], Any], parent: int) -> None:
    global _task
    # The parent ends this one, by SIGTERM, whatever it does with signals itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    torch.set_num_threads(1)
    _task = run


def _end_with(parent: int) -> None:
    """Ends this process when its parent has been killed, which ends nobody else."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_task(task: Any) -> Any:
    return _task(task)
