"""The user's files (.txt, .jsonl, .parquet, gzip of these) as documents."""

import collections
import filecmp
import glob
import gzip
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from data.documents import Documents, Whole
from data.progress import progress
from data.readers import Files, Skipped, Txt, read
from utils import ConfigError, files_named, local_folder, require

# ---------------------------------------------------------------- the hub's


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
        kind = self._rows.features.arrow_schema.field(column).type
        if not _is_text(kind):
            raise ValueError(f"column {column!r} is of type {kind}, not text")
        self._column = column
        self._txt = txt or Txt()
        self._suffix = suffix

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, start: int, stop: int) -> list[str]:
        texts = self._rows[start:stop][self._column]
        return [self._txt.document(text, self._suffix) for text in texts]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    of_text = (kinds.is_string, kinds.is_large_string, kinds.is_null)
    return any(is_of(kind) for is_of in of_text)


def load_rows(builder: str, files: list[str], cache_dir: str, txt: Txt) -> Any:
    """Rows of files or URLs, by a builder of the `datasets` library (gzip included)."""
    import datasets

    # Names that were found are not patterns any more.
    names = [glob.escape(x) if str(x).startswith("hf://") else x for x in files]
    return datasets.load_dataset(
        builder,
        data_files=names,
        split="train",
        cache_dir=local_folder(cache_dir),
        **(txt.options() if builder == "text" else {}),
    )


# ---------------------------------------------------------------- the user's

TEXT_FORMATS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".parquet.gz")


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
    names = [paths] if isinstance(paths, str) else list(paths)
    found: dict[str, str] = {}  # each once, however it is written
    for file in (file for name in names for file in files_named(str(name))):
        if file in names or not os.path.isdir(file):
            found.setdefault(os.path.abspath(file), file)
    files = sorted(found.values(), key=by_number)
    if not files:
        raise ConfigError(f"{key}={paths!r} matches no file.")
    for file in files:
        if os.path.isdir(file):
            raise ConfigError(
                f"{key}={file!r} is a folder; name its files: {key}='{file}/"
                f"*{_suffix_in(file)}'."
            )
        require(suffix_of(file), TEXT_FORMATS, f"suffix in {key}", file)
        if not os.path.isfile(file):
            raise ConfigError(f"{key}: {file} is no file, or a link to nothing.")
    return files


def _suffix_in(folder: str) -> str:
    """Of most files of a folder that can be read; .jsonl if there are none."""
    found = collections.Counter(suffix_of(name) for name in os.listdir(folder))
    return max(TEXT_FORMATS, key=lambda suffix: (found[suffix], suffix == ".jsonl"))


def check_apart(train: list[str], valid: list[str], keys: tuple[str, str]) -> None:
    """Refuses files that are both trained and validated on.

    Args:
        train: Files that are trained on.
        valid: Files that are validated on.
        keys: Config keys that named the two.

    Raises:
        ConfigError: If a file is among both, under any name, as a link, or as a copy,
            compressed or not.
    """
    same, by_size = set(), collections.defaultdict(list)
    for file in train:
        about = os.stat(file)
        same.add((about.st_dev, about.st_ino))
        by_size[_content_size(file)].append(file)
    both = []
    for file in valid:
        about, size = os.stat(file), _content_size(file)
        is_copy = any(_are_alike(file, other) for other in by_size[size] if size)
        if (about.st_dev, about.st_ino) in same or is_copy:
            both.append(file)
    if both:
        more = f" and {len(both) - 3} more" if len(both) > 3 else ""
        raise ConfigError(
            f"{keys[1]}: {', '.join(both[:3])}{more} would be validated on and is "
            f"among the files of {keys[0]} that are trained on; take it out of one of "
            "them."
        )


def _is_gzip(file: str) -> bool:
    return file.lower().endswith(".gz")


def _content_size(file: str) -> int:
    """Bytes of a file, as one with .gz says before it was compressed, modulo 2^32."""
    size = os.path.getsize(file)
    if not _is_gzip(file) or size < 4:
        return size % 2**32
    with open(file, "rb") as content:
        content.seek(-4, os.SEEK_END)
        return int.from_bytes(content.read(), "little")


def _are_alike(one: str, other: str) -> bool:
    """Whether two files hold the same; a damaged one does not."""
    if filecmp.cmp(one, other, shallow=False):
        return True
    if not (_is_gzip(one) or _is_gzip(other)):
        return False
    try:
        with _content(one) as first, _content(other) as second:
            while part := first.read(2**20):
                if part != second.read(len(part)):
                    return False
            return not second.read(1)
    except (OSError, EOFError, zlib.error):
        return False


def _content(file: str) -> Any:
    return gzip.open(file, "rb") if _is_gzip(file) else open(file, "rb")


def by_number(file: str) -> list[str | int]:
    """Key of an order by name in which train-2 comes before train-10."""
    parts = re.split(r"(\d+)", file)
    return [int(part) if part.isdecimal() else part for part in parts]


def suffix_of(file: str) -> str:
    """.jsonl, .parquet.gz and so on."""
    suffixes = Path(file.lower()).suffixes
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def state_of(files: Iterable[str | Path]) -> list[list[Any]]:
    """What changes when a file does: its path, size and time of change, for JSON."""
    return [
        [os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns]
        for file in files
    ]


class StoredTexts(Whole):
    """Documents of an Arrow file, which stay on disk.

    Args:
        path: Of the file, from `store_texts`.
        num_skipped: Rows of the source that could not be read.
    """

    def __init__(self, path: str, num_skipped: int = 0) -> None:
        import pyarrow

        self._path = path
        self.num_skipped = num_skipped
        with pyarrow.memory_map(path) as file:
            self._texts = pyarrow.ipc.open_file(file).read_all()["text"]

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, start: int, stop: int) -> list[str]:
        return self._texts[start:stop].to_pylist()

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTexts, (self._path, self.num_skipped)


def store_texts(texts: Iterable[str], path: str) -> None:
    """Writes texts to an Arrow file, a few megabytes at a time."""
    import pyarrow

    schema = pyarrow.schema({"text": pyarrow.large_string()})
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, schema) as to:
        held: list[str] = []
        size = 0
        for text in texts:
            held.append(text)
            size += len(text) + 100
            if size > CHARACTERS_AT_A_TIME:
                to.write_batch(pyarrow.record_batch([held], schema=schema))
                held, size = [], 0
        if held:
            to.write_batch(pyarrow.record_batch([held], schema=schema))
    pyarrow.default_memory_pool().release_unused()


CHARACTERS_AT_A_TIME = 2**22


def documents_in(files: Files, skipped: Skipped) -> Iterator[str]:
    """Documents of all files, one after the other."""
    for path in files.paths:
        yield from (text for _, text in read(path, files, skipped))


def load_files(files: Files, folder: str) -> Documents:
    """Documents of files, in order, copied to a file, from which any can be had.

    Args:
        files: Which, and how they are read.
        folder: Local, where the copy is made. Whoever owns the folder removes it.

    Raises:
        ConfigError: If a file cannot be read or lacks the column.
    """
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(".arrow", "texts-", folder)
    os.close(handle)
    skipped = Skipped(files)
    texts = documents_in(files, skipped)
    bar = progress(texts, f"reading {files.key}", unit="", mininterval=1)
    store_texts(bar, path)
    return StoredTexts(path, skipped.number)


def read_texts(files: Files) -> list[str]:
    """All documents of files that are not empty, in order, in memory."""
    return [text for text in documents_in(files, Skipped(files)) if text]
