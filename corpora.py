"""Where documents come from: synthetic sequences of known entropy, the standard
library's documentation, and the user's files. Rows and batches are made of
them in `packing.py` and `dataloader.py`.
"""

import ast
import functools
import glob
import gzip
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import ListConfig

from packing import Documents, Joined, Whole
from utils import ConfigError, local_folder, one_line, require


def synthetic_rows(
    num_rows: int, length: int, vocab_size: int, seed: int
) -> np.ndarray:
    """Sequences of known entropy: bos, a chain written from right to left, eos.

    The chain starts at a uniform draw from 0 .. K - 3; after x comes x // 4, and
    after 0 a new draw. NOTE(compat): same numbers as the reference's, which loops
    over tokens with numpy's legacy generator and, after a row that ends on 0, draws
    once more in vain.

    Args:
        num_rows: N.
        length: L, bos and eos included.
        vocab_size: K; bos is K - 2, eos K - 1.
        seed: Of numpy's legacy generator.

    Returns:
        (N, L).
    """
    size = length - 2  # tokens of the chain in a row
    random = np.random.RandomState(seed)
    draws = np.empty(0, dtype=np.int64)
    ends = np.empty(0, dtype=np.int64)  # ends[k]: tokens of the first k + 1 draws
    starts = np.empty(num_rows, dtype=np.int64)  # a row's first token in the stream
    row, draw = 0, 0
    while True:
        more = random.randint(vocab_size - 2, size=max(1024, num_rows * size // 3))
        draws = np.concatenate([draws, more])
        ends = np.cumsum(_chain_lengths(draws))
        while row < num_rows:
            start = ends[draw - 1] if draw else 0
            last = int(np.searchsorted(ends, start + size))
            if last + 1 >= len(ends):
                break  # more draws are needed
            starts[row] = start
            draw = last + 1 + int(ends[last] == start + size)
            row += 1
        if row == num_rows:
            break
    lengths = _chain_lengths(draws)
    digit = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    stream = np.repeat(draws, lengths) >> (2 * digit)
    rows = np.empty((num_rows, length), dtype=np.min_scalar_type(vocab_size))
    rows[:, 0], rows[:, -1] = vocab_size - 2, vocab_size - 1
    rows[:, 1:-1] = stream[starts[:, None] + np.arange(size)][:, ::-1]
    return rows


def _chain_lengths(draws: np.ndarray) -> np.ndarray:
    """Tokens from a draw down to 0: 1 for 0, else 1 + the number of base-4 digits."""
    lengths = np.ones_like(draws)
    while (draws > 0).any():
        lengths += draws > 0
        draws = draws // 4
    return lengths


def synthetic_entropy(length: int, vocab_size: int) -> float:
    """Exact entropy of a synthetic row, nats per sequence.

    log(K - 2) times the expected number of draws among L - 2 tokens, by the renewal
    equation m(n) = 1 + E[m(n - chain length)].
    """
    size = length - 2
    lengths, counts = np.unique(
        _chain_lengths(np.arange(vocab_size - 2)), return_counts=True
    )
    p = counts / counts.sum()
    m = np.zeros(size + 1)
    for n in range(1, size + 1):
        m[n] = 1 + np.dot(p, m[np.maximum(n - lengths, 0)])
    return float(np.log(vocab_size - 2) * m[size])


def standard_library() -> list[Path]:
    """Source files of the standard library, without tests and what else came along."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    found = []
    for folder, below, files in os.walk(root):
        # A dash is in the names of site-packages and of config-* build folders.
        below[:] = [name for name in below if name not in skipped and "-" not in name]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def docstrings(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(module path, its docstrings joined), read from source without importing."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        if texts:
            yield path.relative_to(root).as_posix(), "\n\n".join(texts)


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


def state_of(files: list[str]) -> list[list[Any]]:
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
