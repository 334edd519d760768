"""Documents of files, one after the other: .parquet, .jsonl, .txt, compressed or not,
local or of fsspec. Packing and streams read the user's files with these readers alone.

Blank lines of .jsonl are none, a row without text is an empty document, and a byte
order mark is no text. A row that cannot be read ends the run with its file and line, or
is passed over and counted: `data.on_bad_row`.
"""

import codecs
import io
import itertools
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from utils import ConfigError, one_line, open_file, unknown_value

log = logging.getLogger(__name__)

ON_BAD_ROW = ("stop", "skip")
WIDE = "it is UTF-16; save it as UTF-8"
MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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


class Files(NamedTuple):
    """Files of documents, local ones or of fsspec."""

    paths: list[str]
    column: str
    txt: Txt = Txt()  # how a .txt file holds documents
    drop_empty: bool = False  # documents without text are none
    on_bad_row: str = "stop"  # of ON_BAD_ROW
    key: str = "data.path"  # config key that named the files, for messages
    column_key: str = "data.text_column"  # and that of the column


class Bad(NamedTuple):
    """Why a row cannot be read."""

    reason: str
    line: int | None = None  # where that is not the row's index + 1


class Skipped:
    """What to do about rows that cannot be read, and how many there were."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.number = 0

    def add(self, where: str, reason: str) -> None:
        """Raises if the run is to stop; else it says so, more and more rarely."""
        line = f"{self._files.key}: {where} cannot be read: {reason}"
        if self._files.on_bad_row == "stop":
            raise ConfigError(
                f"{line}. Mend it, or pass over what cannot be read with "
                "data.on_bad_row=skip; the same command goes on where it stopped."
            )
        self.number += 1
        if self.number & (self.number - 1) == 0:
            log.warning("%s; passed over (%d so far)", line, self.number)


# ---------------------------------------------------------------- formats


def _parquet(path: str, files: Files, start: int) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet
    import pyarrow.types as kinds

    with open_file(path, compression="infer") as opened:
        parquet = pyarrow.parquet.ParquetFile(opened)
        schema = parquet.schema_arrow
        if files.column not in schema.names:
            raise _no_column(path, files, schema.names)
        kind = schema.field(files.column).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
        if not kinds.is_null(kind) and not any(is_text(kind) for is_text in texts):
            raise ConfigError(
                f"{files.key}: {path}: {_no_text(files, kind)}; choose another column."
            )
        first = 0
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if end > start:
                batches = parquet.iter_batches(
                    256, row_groups=[group], columns=[files.column]
                )
                values = (text for batch in batches for text in batch[0].to_pylist())
                yield from itertools.islice(
                    enumerate(values, first), max(start - first, 0), None
                )
            first = end


def _lines(path: str, newline: str | None, start: int) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 0; bytes that are no UTF-8 as lone surrogates."""
    with (
        open_file(path, compression="infer") as opened,
        io.TextIOWrapper(opened, "utf-8-sig", "surrogateescape", newline) as lines,
    ):
        yield from itertools.islice(enumerate(lines), start, None)


def _jsonl(path: str, files: Files, start: int) -> Iterator[tuple[int, Any]]:
    return _lines(path, "\n", start)


def _text(path: str, files: Files, start: int) -> Iterator[tuple[int, Any]]:
    if files.txt.lines:
        yield from _lines(path, None, start)
    elif not start:
        yield 0, _decoded(_bytes_of(path).removeprefix(codecs.BOM_UTF8))


def _bytes_of(path: str) -> bytes:
    with open_file(path, compression="infer") as opened:
        content: bytes = opened.read()
    return content


def _decoded(raw: bytes) -> str | Bad:
    """A whole file, with line ends as Python reads them."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if raw.startswith(MARKS):
            return Bad(WIDE, 1)
        return Bad("it is no UTF-8", raw.count(b"\n", 0, error.start) + 1)
    return text.replace("\r\n", "\n").replace("\r", "\n")


# By suffix: (path, files, start) -> rows from `start` on with their indices.
FORMATS: dict[str, Callable[[str, Files, int], Iterator[tuple[int, Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".txt": _text,
}
JSON = (".jsonl", ".json")


def format_of(path: str) -> str:
    """.parquet, .jsonl and so on, compressed or not."""
    name = path.rsplit("/", 1)[-1].lower()
    for suffix in (".gz", ".zst", ".bz2", ".xz"):
        name = name.removesuffix(suffix)
    return "." + name.rsplit(".", 1)[-1]


# ---------------------------------------------------------------- documents


def read(
    path: str,
    files: Files,
    skipped: Skipped,
    start: int = 0,
    reader: int = 0,
    num_readers: int = 1,
) -> Iterator[tuple[int, str]]:
    """A file's documents and the indices of their rows.

    Args:
        path: The file.
        files: How it is read.
        skipped: Told of rows that cannot be read.
        start: Index of the first row, lines from 0.
        reader, num_readers: Rows `reader`, `reader + num_readers`, ... alone.

    Raises:
        ConfigError: If it cannot be read, or no row of it has the column.
    """
    suffix, unit = format_of(path), "row" if format_of(path) == ".parquet" else "line"
    checks = suffix in JSON and not start and num_readers == 1
    names: dict[str, None] = {}  # of the columns, in order
    held: list[int] | None = [] if checks else None  # rows before one has the column
    index = start - 1
    try:
        for index, row in FORMATS[suffix](path, files, start):
            if index % num_readers != reader:
                continue
            value = _value(row, files, names) if suffix in JSON else row
            if value is BLANK:
                continue
            if isinstance(value, str) and not value.isascii():
                value = _utf8(value) or value
            if isinstance(value, Bad):
                number = value.line or index + 1
                skipped.add(f"{path}, {unit} {number}", value.reason)
                continue
            if held is not None and value is ABSENT:
                held.append(index)
                continue
            for earlier in held or ():
                yield earlier, ""
            held = None
            text = None if value is ABSENT else value
            yield index, files.txt.document(text, suffix)
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system
            reason = f"{path} cannot be read: {one_line(str(error))}"
            raise ConfigError(f"{files.key}: {reason}") from None
        skipped.add(f"{path}, from {unit} {index + 2} on", _reason(error))
    if held and names:
        raise _no_column(path, files, names)
    for earlier in held or ():
        yield earlier, ""


BLANK, ABSENT = object(), object()  # a line without anything; a row without the column


def _value(line: str, files: Files, names: dict[str, None]) -> Any:
    """What a line of .jsonl has in the column: text, None, ABSENT, BLANK or `Bad`."""
    try:
        row = json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:
        if not line.strip():
            return BLANK
        reason = _reason(error)
        if isinstance(error, json.JSONDecodeError):
            what = error.msg.removesuffix(" at")
            reason = f"{what} at character {error.pos + 1}"
        return _utf8(line) or Bad(f"it is no JSON ({reason})")
    if not isinstance(row, dict):
        kind = type(row).__name__
        return Bad(f'it is of type {kind} and no object such as {{"text": ...}}')
    value = row.get(files.column, ABSENT)
    if value is ABSENT and len(names) < 20:
        names.update(dict.fromkeys(row))
    if value is None or value is ABSENT or isinstance(value, str):
        return value
    return Bad(_no_text(files, type(value).__name__))


def _utf8(text: str) -> Bad | None:
    """What is wrong with text that is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # a byte, see `_lines`
            raw = text[:2].encode("utf-8", "surrogateescape")
            is_wide = raw.startswith(MARKS)
            return Bad(
                "it is UTF-16; save it as UTF-8" if is_wide else "it is no UTF-8"
            )
        return Bad(f"it holds {text[error.start]!a}, half of a character")
    return None


def _no_text(files: Files, kind: Any) -> str:
    return f"{files.column_key}={files.column!r} is of type {kind}, not text"


def _no_column(path: str, files: Files, names: Any) -> ConfigError:
    return ConfigError(unknown_value(files.column_key, files.column, names, path))


def _reason(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__
