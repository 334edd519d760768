"""Documents -> token ids -> rows of L tokens, by any number of processes, and the rows'
home on disk.

    texts -> detokenize -> tokenize -> pack | pad -> Arrow file -> `TokenRows`

Documents are tokenised in parallel, a few hundred at a time, and laid out in order by
one process. So rows depend on the documents and their order alone, and memory on
neither the number of documents nor of rows.
"""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from detokenizers import Rules, detokenize

DOCUMENTS_AT_A_TIME = 512


# ---------------------------------------------------------------- rows


class Fingerprint(NamedTuple):
    """Of a split's rows; equal for equal rows, however they were made."""

    rows: int
    tokens: int  # bos and eos included, padding not
    sha256: str  # of the rows' numbers of tokens and of the tokens, int32 each

    def line(self) -> str:
        return f"{self.rows} rows, {self.tokens} tokens, sha256 {self.sha256[:16]}"


class TokenRows(Dataset):
    """Rows of token ids, handed out a batch at a time.

    Args:
        ids: (N, L) integers: an array, or what is indexed like one.
        num_valid: Tokens before the padding of each row, (N,); None: no padding.
        counts: How often each id occurs, (K,), where that is known already.
        num_documents: Of the source that the rows are made of; None: not known.
    """

    def __init__(
        self,
        ids: Any,
        num_valid: np.ndarray | None = None,
        counts: np.ndarray | None = None,
        num_documents: int | None = None,
    ) -> None:
        self.ids = ids
        self.num_valid = num_valid
        self.num_documents = num_documents
        self._counts = counts

    num_starts = 1  # of the parts of a row that may be handed out

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: x[0] for name, x in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch, (B, L) each; torch's fetcher calls this."""
        num_valid = None if self.num_valid is None else self.num_valid[indices]
        return batch_of(self.ids[indices], num_valid)

    def valid_ids(self) -> np.ndarray:
        """All token ids but the padding, (number of them,)."""
        ids = np.asarray(self.ids)
        if self.num_valid is None:
            return ids.ravel()
        return ids[np.arange(ids.shape[1]) < self.num_valid[:, None]]

    def part(self, start: int, stop: int) -> "TokenRows":
        """The rows start .. stop - 1."""
        rows = slice(start, stop)
        return TokenRows(
            self.ids[rows], None if self.num_valid is None else self.num_valid[rows]
        )

    def parts(self, num_rows: int = 4096) -> Iterator["TokenRows"]:
        """All rows in order, a few at a time."""
        for start in range(0, len(self), num_rows):
            yield self.part(start, start + num_rows)

    def split_tail(self, fraction: float) -> tuple["TokenRows", "TokenRows"]:
        """The first rows, and the last `fraction` of them (at least one)."""
        cut = len(self) - max(1, round(fraction * len(self)))
        return self.part(0, cut), self.part(cut, len(self))

    def counts(self) -> np.ndarray:
        """How often each id occurs, padding included, (largest id + 1,) or longer."""
        if self._counts is None:
            self._counts = np.zeros(0, dtype=np.int64)
            for part in self.parts():
                self._counts = add_counts(self._counts, np.asarray(part.ids))
        return self._counts

    def valid_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs outside of padding, (K,)."""
        if self.num_valid is None:
            counts = self.counts()
            return np.pad(counts, (0, vocab_size - len(counts)))
        counts = np.zeros(vocab_size, dtype=np.int64)
        for part in self.parts():
            counts = add_counts(counts, part.valid_ids())
        return counts

    def fingerprint(self) -> Fingerprint:
        """What two people compare to see whether they measured on the same rows."""
        widths, tokens, num_tokens = hashlib.sha256(), hashlib.sha256(), 0
        for part in self.parts():
            ids = part.valid_ids()
            full = np.full(len(part), part.ids.shape[1])
            num_valid = full if part.num_valid is None else part.num_valid
            widths.update(num_valid.astype("<i4").tobytes())
            tokens.update(ids.astype("<i4").tobytes())
            num_tokens += ids.size
        digest = hashlib.sha256(widths.digest() + tokens.digest())
        return Fingerprint(len(self), num_tokens, digest.hexdigest())


def batch_of(
    ids: np.ndarray, num_valid: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """What a model is given: ids and, 1 for tokens and 0 for padding, a mask.

    Args:
        ids: (B, L).
        num_valid: Tokens before the padding of each row, (B,); None: no padding.
    """
    input_ids = torch.from_numpy(ids.astype(np.int64))
    mask = torch.ones(ids.shape)
    if num_valid is not None:
        is_valid = torch.arange(ids.shape[1]) < torch.from_numpy(num_valid)[:, None]
        mask = is_valid.float()
    return {"input_ids": input_ids, "attention_mask": mask}


def add_counts(counts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Counts of ids together with those of more ids."""
    more = np.bincount(ids.ravel(), minlength=len(counts))
    more[: len(counts)] += counts
    return more


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


# ---------------------------------------------------------------- tokenising


class Documents(Protocol):
    """Texts in their order, few of which are in memory."""

    def __len__(self) -> int: ...

    @property
    def num_whole(self) -> int:
        """Of the source, which these may be a part of."""

    def texts(self, start: int, stop: int) -> list[str]: ...


class Whole:
    """Documents that are all of their source."""

    @property
    def num_whole(self) -> int:
        return len(self)


class Listed(Whole):
    """Documents that are in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, start: int, stop: int) -> list[str]:
        return list(self._texts[start:stop])


class Joined(Whole):
    """Documents of several, one behind the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def texts(self, start: int, stop: int) -> list[str]:
        texts = []
        for part in self._parts:
            size = len(part)
            texts += part.texts(min(start, size), min(stop, size))
            start, stop = max(start - size, 0), max(stop - size, 0)
        return texts


class Part:
    """The documents start .. stop - 1 of others."""

    def __init__(self, documents: Documents, start: int, stop: int) -> None:
        self._documents, self._start, self._stop = documents, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def num_whole(self) -> int:
        return self._documents.num_whole

    def texts(self, start: int, stop: int) -> list[str]:
        return self._documents.texts(
            self._start + start, min(self._start + stop, self._stop)
        )


def encode(texts: list[str], tokenizer: Any, rules: Rules = ()) -> Chunk:
    """Token ids of texts, without special tokens around them."""
    if not texts:
        return Chunk(np.empty(0, np.int32), np.empty(0, np.int64))
    clean = [detokenize(text, rules) for text in texts]
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    encoded = tokenizer(clean, add_special_tokens=False, verbose=False, **options)
    lists = encoded["input_ids"]
    lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    ids = itertools.chain.from_iterable(lists)
    return Chunk(np.fromiter(ids, dtype=np.int32, count=lengths.sum()), lengths)


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
) -> Iterator[Any]:
    """Results of tasks in their order; a few of each process at a time."""
    if num_proc <= 1:
        yield from map(run, tasks)
        return
    is_safe = sys.platform == "linux"  # elsewhere libraries do not survive a fork
    context = multiprocessing.get_context("fork" if is_safe else "spawn")
    pool = ProcessPoolExecutor(num_proc, context, _set_task, (run,))
    try:
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(pool.submit(_run_task, task))
            if len(waiting) > 3 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_task: Callable[[Any], Any]  # of a worker process


def _set_task(run: Callable[[Any], Any]) -> None:
    global _task
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    torch.set_num_threads(1)
    _task = run


def _run_task(task: Any) -> Any:
    return _task(task)
