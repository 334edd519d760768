"""How far work has come that takes long: a bar on a terminal, elsewhere a line now and
then.
"""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm.auto import tqdm

# Seconds to the first line that is no bar, and between two of them.
QUIET = 15.0


class Lines:
    """A file in which a bar that overwrites itself becomes lines."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.encoding = getattr(file, "encoding", None)

    def write(self, text: str) -> None:
        for line in text.split("\r"):
            if line.strip():
                self.file.write(f"{line.strip()}\n")

    def flush(self) -> None:
        self.file.flush()


def progress(items: Iterable[Any] | None = None, what: str = "", **options: Any) -> Any:
    """A bar of tqdm that leaves nothing behind, or lines where nobody sees a bar.

    Args:
        items: What is gone through; None where the caller counts.
        what: Is being done.
        options: Of tqdm.
    """
    if not sys.stderr.isatty():
        options |= {"mininterval": QUIET, "maxinterval": QUIET, "delay": QUIET}
        options |= {"file": Lines(sys.stderr), "ncols": 79, "ascii": " #"}
    return tqdm(items, what, leave=False, **options)
