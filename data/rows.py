"""Rows of token ids, handed out a batch at a time."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.fingerprints import Fingerprint
from data.marks import rows_mark

# In a batch of validation that is there only so that each rank has as many: its rows
# are counted elsewhere.
REPEATED = "is_repeated"
MARKED = 1 << 26  # tokens that are all looked at
SAMPLED = 1024  # rows that are, of more


class TokenRows(Dataset):
    """Rows of token ids, handed out a batch at a time.

    Args:
        ids: (N, L) integers: an array, or what is indexed like one.
        num_valid: Tokens before the padding of each row, (N,); None: no padding.
        counts: How often each id occurs, (K,), where that is known already.
        num_documents: Of the source that the rows are made of; None: not known.
        num_skipped: Rows of that source that could not be read.
    """

    def __init__(
        self,
        ids: Any,
        num_valid: np.ndarray | None = None,
        counts: np.ndarray | None = None,
        num_documents: int | None = None,
        num_skipped: int = 0,
    ) -> None:
        self.ids = ids
        self.num_valid = num_valid
        self.num_documents = num_documents
        self.num_skipped = num_skipped
        self._counts = counts

    num_starts = 1  # of the parts or forms of a row that may be handed out
    num_published_starts = 1  # of those that published runs take

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

    def valid_count(self, index: int, pad: int) -> int:
        """How often one id occurs outside of padding, which is of the id `pad`."""
        count = int(self.counts()[index : index + 1].sum())
        if index == pad and self.num_valid is not None:
            length = self.ids.shape[1]
            count -= len(self) * length - int(self.num_valid.sum())
        return count

    def mark(self) -> str:
        """What tells these rows from others, at little cost however many there are.

        Of more than MARKED tokens some rows stand for all: in a stream of tokens that
        is cut into rows one document more or less moves all that come after it.
        """
        num_rows, length = self.ids.shape
        if num_rows * length <= MARKED:
            return rows_mark(num_rows, length, self.fingerprint().sha256.encode())
        rows = np.linspace(0, num_rows - 1, SAMPLED).round().astype(np.int64)
        num_valid = rows[:0] if self.num_valid is None else self.num_valid[rows]
        content = (np.asarray(self.ids[rows]), num_valid)
        return rows_mark(
            num_rows, length, *(x.astype("<i4").tobytes() for x in content)
        )

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
