"""Texts in an order, of which only a few are in memory at a time."""

from collections.abc import Sequence, Sized
from typing import Protocol

# ---------------------------------------------------------------- tokenising


class Documents(Protocol):
    """Texts in their order, few of which are in memory."""

    def __len__(self) -> int: ...

    @property
    def num_whole(self) -> int:
        """Of the source, which these may be a part of."""

    num_skipped: int  # rows of the source that could not be read

    def texts(self, start: int, stop: int) -> list[str]: ...


class Whole(Sized):
    """Documents that are all of their source."""

    num_skipped: int = 0

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


class Part:
    """The documents start .. stop - 1 of others."""

    def __init__(self, documents: Documents, start: int, stop: int) -> None:
        self._documents, self._start, self._stop = documents, start, stop
        self.num_skipped = documents.num_skipped

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def num_whole(self) -> int:
        return self._documents.num_whole

    def texts(self, start: int, stop: int) -> list[str]:
        return self._documents.texts(
            self._start + start, min(self._start + stop, self._stop)
        )
