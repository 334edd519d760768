"""Documents of files as they are needed, one after the other: .parquet, .jsonl, .txt,
compressed or not, local or of fsspec.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import fsspec

from data.files import Txt
from utils import require


class Files(NamedTuple):
    """Files of documents, local ones or of fsspec."""

    paths: list[str]
    column: str
    txt: Txt = Txt()  # how a .txt file holds documents
    drop_empty: bool = False  # documents without text are none


def _parquet(path: str, files: Files, start: int) -> Iterator[str]:
    import pyarrow.parquet

    with fsspec.open(path, "rb", compression="infer") as opened:
        parquet = pyarrow.parquet.ParquetFile(opened)
        require(files.column, parquet.schema_arrow.names, "column", path)
        first = 0
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if end > start:
                batches = parquet.iter_batches(
                    256, row_groups=[group], columns=[files.column]
                )
                texts = (text for batch in batches for text in batch[0].to_pylist())
                yield from itertools.islice(texts, max(start - first, 0), None)
            first = end


def _jsonl(path: str, files: Files, start: int) -> Iterator[str]:
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as opened:
        for line in itertools.islice(opened, start, None):
            row = json.loads(line)
            require(files.column, row, "column", path)
            yield row[files.column]


def _text(path: str, files: Files, start: int) -> Iterator[str]:
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as opened:
        texts = opened if files.txt.lines else [opened.read()]
        yield from itertools.islice(texts, start, None)


FORMATS: dict[str, Callable[[str, Files, int], Iterator[str]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".txt": _text,
}


def format_of(path: str) -> str:
    """.parquet, .jsonl and so on, compressed or not."""
    name = path.rsplit("/", 1)[-1]
    for suffix in (".gz", ".zst", ".bz2", ".xz"):
        name = name.removesuffix(suffix)
    return "." + name.rsplit(".", 1)[-1]
