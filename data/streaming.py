"""Training data read as they are needed: files -> documents -> rows -> batches.

Every data worker of every rank is a reader with documents of its own. It packs them
as `packing.py` does, shuffles rows within blocks, and knows after every batch where to
go on: the document, the token in it, the row of the block. So a run that was stopped
gets the batches of one that was not.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.detokenizers import Rules
from data.marks import stream_mark
from data.packing import Layout, encode, framed, pad, separated
from data.readers import Files, Skipped, read
from data.rows import batch_of
from utils import ConfigError

log = logging.getLogger(__name__)

DOCUMENTS_AT_A_TIME = 64
NO_END = 10**12  # batches


class Place(NamedTuple):
    """A document among those of a reader."""

    epoch: int = 0
    file: int = 0  # in the reader's order of this epoch
    document: int = 0  # in the file


class Mark(NamedTuple):
    """Where the next row begins."""

    place: Place = Place()
    used: int = 0  # tokens of the document in rows before; of padded rows, 0 or 1


class State(NamedTuple):
    """Where a reader goes on."""

    mark: Mark = Mark()  # of the block
    block: int = 0
    done: int = 0  # rows of the block that have been handed out

    def numbers(self) -> list[int]:
        """For a checkpoint."""
        return [*self.mark.place, self.mark.used, self.block, self.done]

    @classmethod
    def of(cls, numbers: list[int]) -> "State":
        *place, used, block, done = numbers
        return cls(Mark(Place(*place), used), block, done)


class Row(NamedTuple):
    ids: np.ndarray  # (L,)
    num_valid: int
    after: Mark


# ---------------------------------------------------------------- documents


def read_documents(
    files: Files, reader: int, num_readers: int, seed: int, place: Place
) -> Iterator[tuple[Place, str]]:
    """A reader's documents from some place on, without end.

    An epoch goes through the files in an order of its own. They are dealt out to the
    readers; if there are fewer files than readers, their documents are.

    Raises:
        ConfigError: If no document is the reader's, or something cannot be read.
    """
    skipped = Skipped(files)
    has_files = len(files.paths) >= num_readers
    share = (0, 1) if has_files else (reader, num_readers)
    epoch, first, document = place
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(files.paths))
        mine = order[reader::num_readers] if has_files else order
        is_empty = first == document == 0
        for number in range(first, len(mine)):
            path = files.paths[mine[number]]
            for index, text in read(path, files, skipped, document, *share):
                if text or not files.drop_empty:
                    is_empty = False
                    yield Place(epoch, number, index), text
            document = 0
        if is_empty:
            raise ConfigError(
                f"data.streaming=True: {len(files.paths)} files have too few documents "
                f"for {num_readers} readers; lower loader.num_workers."
            )
        epoch, first = epoch + 1, 0


# ---------------------------------------------------------------- rows


def read_rows(
    documents: Iterator[tuple[Place, str]],
    tokenizer: Any,
    rules: Rules,
    layout: Layout,
    used: int = 0,
) -> Iterator[Row]:
    """Rows of documents, laid out as `packing.lay_out` does.

    Args:
        documents: And their places.
        tokenizer: Of `transformers`.
        rules: Run on every text first.
        layout: The rows'.
        used: Tokens of the first document (without `layout.wrap`: whether it) to skip.
    """
    if not layout.wrap:
        yield from _padded_rows(documents, tokenizer, rules, layout, used)
        return
    size = layout.length - 2
    rest = np.empty(0, dtype=np.int32)
    places: list[Place] = []
    starts = np.empty(0, dtype=np.int64)  # of the documents, in the stream
    for more, texts in _some(documents):
        chunk = encode(texts, tokenizer, rules)
        lengths = chunk.lengths + layout.insert_eos
        stream = np.concatenate([rest, separated(chunk, layout)[used:]])
        new_starts = len(rest) + np.cumsum(lengths) - lengths - used
        starts, places, used = np.concatenate([starts, new_starts]), places + more, 0
        num_rows = len(stream) // size
        block = framed(stream[: num_rows * size].reshape(num_rows, size), layout)
        for ids, end in zip(block.ids, range(size, len(stream) + 1, size), strict=True):
            at = int(np.searchsorted(starts, end, side="right")) - 1
            yield Row(ids, layout.length, Mark(places[at], end - int(starts[at])))
        rest = stream[num_rows * size :]
        at = max(int(np.searchsorted(starts, num_rows * size, side="right")) - 1, 0)
        starts, places = starts[at:] - num_rows * size, places[at:]


def _padded_rows(
    documents: Iterator[tuple[Place, str]],
    tokenizer: Any,
    rules: Rules,
    layout: Layout,
    used: int,
) -> Iterator[Row]:
    for places, texts in _some(itertools.islice(documents, used, None)):
        (block,) = pad([encode(texts, tokenizer, rules)], layout)
        rows = zip(places, block.ids, block.num_valid, strict=True)
        for place, ids, num_valid in rows:
            yield Row(ids, int(num_valid), Mark(place, 1))


def _some(
    documents: Iterator[tuple[Place, str]],
) -> Iterator[tuple[list[Place], list[str]]]:
    while some := list(itertools.islice(documents, DOCUMENTS_AT_A_TIME)):
        places, texts = zip(*some, strict=True)
        yield list(places), list(texts)


def shuffled(
    rows: Iterator[Row], seed: list[int], size: int, state: State
) -> Iterator[tuple[Row, State]]:
    """Rows in an order that is random within blocks, and where to go on after each.

    While a block is handed out the next one is read, row by row.

    Args:
        rows: From `state.mark` on.
        seed: Of the orders.
        size: Rows of a block.
        state: Where to go on.
    """
    block = list(itertools.islice(rows, size))
    while True:
        following: list[Row] = []
        order = np.random.default_rng([*seed, state.block]).permutation(len(block))
        for done, index in enumerate(order.tolist(), 1):
            if done > state.done:
                following += itertools.islice(rows, 1)
                yield block[index], state._replace(done=done)
        following += itertools.islice(rows, len(block) - len(following))
        state = State(block[-1].after, state.block + 1)
        block = following


# ---------------------------------------------------------------- batches


# A batch, the reader that it is of, and where that one goes on.
StreamBatch = tuple[dict[str, torch.Tensor], int, list[int]]


class Stream(IterableDataset):
    """Batches of one rank; each data worker is a reader.

    Args:
        files: All files.
        tokenizer: Of `transformers`.
        rules: Run on every text first.
        layout: Of the rows.
        seed: Of the order.
        block: Rows that are shuffled together.
    """

    def __init__(
        self,
        files: Files,
        tokenizer: Any,
        rules: Rules,
        layout: Layout,
        *,
        seed: int,
        block: int,
    ) -> None:
        self.files = files
        self.seed = seed
        self.block = block
        self._tokenize = (tokenizer, rules, layout)
        self.rank, self.world_size, self.batch_size = 0, 1, 1
        self.states: list[State] = []  # of this rank's readers
        self.next_reader = 0  # whose batch comes next

    def mark(self) -> str:
        """What tells this stream from others; see `data.marks`."""
        files = self.files._replace(on_bad_row="", key="", column_key="")
        _, rules, layout = self._tokenize
        return stream_mark(files.paths, [*files[1:], repr(rules), layout])

    def first_row(self) -> Row:
        """Of the first reader, unshuffled."""
        return next(self._rows(0, 1, Mark()))

    def _rows(self, reader: int, num_readers: int, mark: Mark) -> Iterator[Row]:
        documents = read_documents(
            self.files, reader, num_readers, self.seed, mark.place
        )
        return read_rows(documents, *self._tokenize, used=mark.used)

    def __iter__(
        self,
    ) -> Iterator[tuple[dict[str, torch.Tensor], int, list[int]] | str]:
        """Batches of the readers in turn.

        What cannot be read ends them with the line that says so: raised in a worker it
        would reach the run with the worker's traceback as its text.
        """
        try:
            yield from self._batches()
        except ConfigError as error:
            yield str(error)

    def _batches(self) -> Iterator[StreamBatch]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        local = (number + self.next_reader) % num_workers
        reader = self.rank * num_workers + local
        state = self.states[local] if self.states else State()
        rows = self._rows(reader, self.world_size * num_workers, state.mark)
        pairs = shuffled(rows, [self.seed, reader], self.block, state)
        while batch := list(itertools.islice(pairs, self.batch_size)):
            ids = np.stack([row.ids for row, _ in batch])
            num_valid = np.array([row.num_valid for row, _ in batch])
            yield batch_of(ids, num_valid), local, batch[-1][1].numbers()


class StreamLoader(DataLoader):
    """Batches of a stream from any position of it. Lightning keeps it in checkpoints.

    Args:
        stream: The data.
        gather: Makes a list of what every rank gives.
        check: Called with every batch.
        options: Of torch's `DataLoader`.
    """

    dataset: Stream

    def __init__(
        self,
        stream: Stream,
        gather: Callable[[Any], list[Any]],
        check: Callable[[torch.Tensor], None],
        **options: Any,
    ) -> None:
        super().__init__(stream, batch_size=None, **options)
        self._gather = gather
        self._check = check
        self._num_readers = max(self.num_workers, 1)
        self._states = [State().numbers()] * self._num_readers

    def __len__(self) -> int:
        return NO_END  # with a length, Lightning fetches no batch before its turn

    # torch declares its own iterator, of which nothing but the batches is needed.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        stream = self.dataset
        for item in super().__iter__():
            if isinstance(item, str):
                raise ConfigError(item)
            batch, reader, state = item
            self._check(batch["input_ids"])
            self._states[reader] = state
            stream.next_reader = (reader + 1) % self._num_readers
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the readers of all ranks go on; every rank has to call it."""
        states = self._gather([list(state) for state in self._states])
        return {"stream": states, "next": self.dataset.next_reader}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on there; with another number of readers, at a new epoch."""
        stream, ranks = self.dataset, state.get("stream")
        if ranks is None:  # a checkpoint of a run that did not stream
            return
        is_same = len(ranks) == stream.world_size
        if is_same and len(ranks[0]) == self._num_readers:
            self._states = [list(numbers) for numbers in ranks[stream.rank]]
            stream.next_reader = state["next"]
        else:
            epoch = 1 + max(numbers[0] for rank in ranks for numbers in rank)
            log.warning(
                "the stream had %d x %d readers, now it has %d x %d: it goes on with "
                "a new epoch",
                *(len(ranks), len(ranks[0]), stream.world_size, self._num_readers),
            )
            fresh = State(Mark(Place(epoch=epoch))).numbers()
            self._states = [fresh] * self._num_readers
        stream.states = [State.of(numbers) for numbers in self._states]
