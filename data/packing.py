"""Documents -> token ids -> rows of L tokens, by any number of processes.

    texts -> detokenize -> tokenize -> pack | pad -> blocks of rows

Documents are tokenised in parallel, a few hundred at a time, and laid out in order by
one process. So rows depend on the documents and their order alone, and memory on
neither the number of documents nor of rows.
"""

import contextlib
import functools
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
from tqdm.auto import tqdm

from data.detokenizers import Rules, detokenize
from data.documents import Documents
from data.encoding import encode_texts
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


class Block(NamedTuple):
    """Some rows."""

    ids: np.ndarray  # (R, L)
    num_valid: np.ndarray  # (R,), L where there is no padding


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
    return np.insert(chunk.ids, np.cumsum(chunk.lengths), layout.eos)


def framed(content: np.ndarray, layout: Layout) -> Block:
    """bos and eos around full rows, (R, L - 2) -> (R, L)."""
    ids = np.empty((len(content), layout.length), dtype=np.int32)
    ids[:, 0], ids[:, 1:-1], ids[:, -1] = layout.bos, content, layout.eos
    return Block(ids, np.full(len(ids), layout.length, dtype=np.int32))


def pad(chunks: Iterable[Chunk], layout: Layout) -> Iterator[Block]:
    """One document a row: bos, at most L - 2 tokens, eos, then padding."""
    size = layout.length - 2
    for chunk in chunks:
        lengths = np.minimum(chunk.lengths, size).astype(np.int32)
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        ids = np.full((len(lengths), layout.length), layout.pad, dtype=np.int32)
        ids[:, 0] = layout.bos
        ids[np.arange(len(ids)), 1 + lengths] = layout.eos
        is_content = np.arange(size) < lengths[:, None]
        source = (starts[:, None] + np.arange(size))[is_content]
        ids[:, 1:-1][is_content] = chunk.ids[source]
        yield Block(ids, lengths + 2)


def rows_of(blocks: Iterable[Block], length: int) -> TokenRows:
    """All rows in memory.

    Args:
        blocks: The rows in order.
        length: L.
    """
    none = Block(np.empty((0, length), np.int32), np.empty(0, np.int32))
    ids, num_valid = map(np.concatenate, zip(none, *blocks, strict=True))
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
    size = DOCUMENTS_AT_A_TIME
    spans = [
        (start, min(start + size, len(documents)))
        for start in range(0, len(documents), size)
    ]
    run = functools.partial(_encode_span, documents, tokenizer, rules, drop_empty)
    chunks = _in_order(run, spans, min(num_proc, len(spans)))
    bar = tqdm(total=len(documents), desc=f"tokenizing {name}", leave=False)
    with bar, contextlib.closing(chunks):
        for (start, stop), chunk in zip(spans, chunks, strict=True):
            yield chunk
            bar.update(stop - start)


def _encode_span(
    documents: Documents,
    tokenizer: Any,
    rules: Rules,
    drop_empty: bool,
    span: tuple[int, int],
) -> Chunk:
    texts = documents.texts(*span)
    if drop_empty:
        texts = [text for text in texts if text]
    return encode(texts, tokenizer, rules)


def _in_order(
    run: Callable[[Any], Any], tasks: Sequence[Any], num_proc: int
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this one
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
