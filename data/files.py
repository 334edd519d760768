"""The user's files (.txt, .jsonl, .parquet, gzip of these) as documents."""

import functools
import glob
import gzip
import itertools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import ListConfig

from data.documents import Documents, Joined, Whole
from utils import ConfigError, local_folder, one_line, require

# ---------------------------------------------------------------- files


class Txt(NamedTuple):
    """How a .txt file holds documents."""

    lines: bool = False  # one a line; else the file is one
    # Lines are documents as the hub's copies have them: of WikiText whole, and empty if
    # they are blank; of all other sets without blanks around them.
    ends: bool = False

    def options(self) -> dict[str, Any]:
        """Of the builder of the `datasets` library."""
        sample_by = "line" if self.lines else "document"
        return {"sample_by": sample_by, "keep_linebreaks": self.ends}

    def document(self, text: str | None, suffix: str) -> str:
        """A document of a file with that suffix, as it counts."""
        text = text or ""
        if self.ends:
            return text if text.strip() else ""
        return text.strip() if self.lines and suffix == ".txt" else text


class Texts(Whole):
    """A column of a `datasets` data set, of which only what is used is read.

    Args:
        rows: The data set.
        column: Of the texts.
        txt: How a .txt file holds documents.
        suffix: Of the files, without that of compression.
    """

    def __init__(
        self, rows: Any, column: str, txt: Txt | None = None, suffix: str = ""
    ) -> None:
        self._rows = rows.select_columns(column)
        self._column = column
        self._txt = txt or Txt()
        self._suffix = suffix

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, start: int, stop: int) -> list[str]:
        texts = self._rows[start:stop][self._column]
        return [self._txt.document(text, self._suffix) for text in texts]


def load_rows(builder: str, files: list[str], cache_dir: str, txt: Txt) -> Any:
    """Rows of files or URLs, by a builder of the `datasets` library (gzip included)."""
    import datasets

    return datasets.load_dataset(
        builder,
        data_files=files,
        split="train",
        cache_dir=local_folder(cache_dir),
        **(txt.options() if builder == "text" else {}),
    )


def _load_gzipped_parquet(files: list[str], cache_dir: str, txt: Txt) -> Any:
    import datasets
    import pyarrow.parquet

    tables = []
    for file in files:
        with gzip.open(file) as plain:
            tables.append(pyarrow.parquet.read_table(plain))
    return datasets.Dataset(pyarrow.concat_tables(tables))


# Suffix -> (files, cache_dir, txt) -> rows.
TEXT_FORMATS: dict[str, Callable[..., Any]] = {
    ".txt": functools.partial(load_rows, "text"),
    ".txt.gz": functools.partial(load_rows, "text"),
    ".jsonl": functools.partial(load_rows, "json"),
    ".jsonl.gz": functools.partial(load_rows, "json"),
    ".parquet": functools.partial(load_rows, "parquet"),
    ".parquet.gz": _load_gzipped_parquet,
}


def find_files(paths: str | ListConfig | None, key: str) -> list[str]:
    """The files that a path, a glob or a list of them means, in order.

    Args:
        paths: File, glob, or a list of them.
        key: Config key that held `paths`, for messages.

    Raises:
        ConfigError: If nothing matches, or a file is of no known format.
    """
    if paths is None:
        raise ConfigError(f"{key} is empty: give a file or glob, {key}='corpus/*.txt'.")
    patterns = [paths] if isinstance(paths, str) else list(paths)
    found = {
        file for pattern in patterns for file in glob.glob(pattern, recursive=True)
    }
    files = sorted(found, key=by_number)
    if not files:
        raise ConfigError(f"{key}={paths!r} matches no file.")
    for file in files:
        require(suffix_of(file), TEXT_FORMATS, f"suffix in {key}", file)
    return files


def by_number(file: str) -> list[str | int]:
    """Key of an order by name in which train-2 comes before train-10."""
    parts = re.split(r"(\d+)", file)
    return [int(part) if part.isdecimal() else part for part in parts]


def suffix_of(file: str) -> str:
    """.jsonl, .parquet.gz and so on."""
    suffixes = Path(file).suffixes
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def state_of(files: Iterable[str | Path]) -> list[list[Any]]:
    """What changes when a file does: its path, size and time of change, for JSON."""
    return [
        [os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns]
        for file in files
    ]


def load_files(
    files: list[str],
    key: str,
    column: str,
    cache_dir: str,
    *,
    txt: Txt | None = None,
    column_key: str = "data.text_column",
) -> Documents:
    """Documents of files, in order, which stay on disk.

    Args:
        files: From `find_files`.
        key: Config key that named the files, for messages.
        column: Text column of .jsonl and .parquet files.
        cache_dir: Where the `datasets` library keeps its Arrow copy, if it is local.
        txt: How a .txt file holds documents; None: it is one.
        column_key: Config key that named the column, for messages.

    Raises:
        ConfigError: If a file cannot be parsed or lacks the column.
    """
    import datasets

    failed = datasets.exceptions.DatasetGenerationError
    loaded, txt = [], txt or Txt()
    by_suffix = itertools.groupby(files, suffix_of)
    for suffix, group in by_suffix:
        same = list(group)
        where = same[0] if len(same) == 1 else f"{same[0]} and {len(same) - 1} more"
        try:
            rows = TEXT_FORMATS[suffix](same, cache_dir, txt)
        except (failed, OSError, EOFError, ValueError) as error:
            reason = one_line(str(error.__cause__ or error))
            raise ConfigError(f"{key}: {where} cannot be read: {reason}") from None
        suffix = suffix.removesuffix(".gz")
        column_here = "text" if suffix == ".txt" else column
        require(column_here, rows.column_names, column_key, where)
        loaded.append(Texts(rows, column_here, txt, suffix))
    return loaded[0] if len(loaded) == 1 else Joined(loaded)


def read_texts(files: list[str], key: str, column: str, cache_dir: str) -> list[str]:
    """All documents of files that are not empty, in order, in memory."""
    documents = load_files(files, key, column, cache_dir)
    return [text for text in documents.texts(0, len(documents)) if text]
