"""Packing a text corpus: time and memory at growing sizes, beside plain code.

    python benchmarks/bench_data.py --tokenizer FOLDER --documents 10000 40000

Documents are cut from the standard library's documentation, about as long as those of
OpenWebText. Each measurement is a process of its own. Memory is that of the process
and its workers without pages of files, which the system takes back when it needs them.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from data.cache import stored_rows  # noqa: E402
from data.docstrings import docstrings, standard_library  # noqa: E402
from data.documents import Documents  # noqa: E402
from data.files import load_files  # noqa: E402
from data.packing import Block, Layout, lay_out, tokenize  # noqa: E402
from data.readers import Files  # noqa: E402

OPENWEBTEXT = 8_013_769  # documents
CHARACTERS = 4900  # of a document of it, on average


def write_corpus(path: Path, num_documents: int) -> None:
    """Documents of random lengths, in parquet."""
    import pyarrow
    import pyarrow.parquet

    text = "\n".join(text for _, text in docstrings(standard_library()))
    random = np.random.default_rng(0)
    schema = pyarrow.schema({"text": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for size in _pieces(num_documents, 1000):
            starts = random.integers(len(text) - 50_000, size=size)
            lengths = random.exponential(CHARACTERS, size=size).clip(100, 50_000)
            texts = [
                text[start : start + int(n)]
                for start, n in zip(starts, lengths, strict=True)
            ]
            writer.write_table(pyarrow.table({"text": texts}, schema))


def _pieces(number: int, size: int) -> list[int]:
    """`number` as a sum of whole pieces and a last one."""
    return [min(size, number - start) for start in range(0, number, size)]


def ours(
    documents: Documents, tokenizer: Any, layout: Layout, num_proc: int, folder: str
) -> int:
    """Rows on disk, as a run makes them; their number."""

    def build(folder: str) -> Any:
        return lay_out(tokenize(documents, tokenizer, num_proc=num_proc), layout)

    key = {"vocab_size": len(tokenizer), "num_proc": num_proc}
    return len(stored_rows(folder, "bench", key, layout, build))


def plain(
    documents: Documents, tokenizer: Any, layout: Layout, num_proc: int, folder: str
) -> int:
    """One list of all tokens, cut into rows and saved."""
    texts = documents.texts(0, len(documents))
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(layout.eos)
    size = layout.length - 2
    num_rows = len(stream) // size
    content = np.array(stream[: num_rows * size], np.int32).reshape(num_rows, size)
    ids = np.full((num_rows, layout.length), layout.eos, np.int32)
    ids[:, 1:-1] = content
    np.save(os.path.join(folder, "plain.npy"), Block(ids, None).ids)
    return num_rows


CODES = {"ours": ours, "plain": plain}


def anonymous_mb() -> float:
    """Memory of this process and its children without pages of files, MB."""
    total, pids = 0, [str(os.getpid())]
    while pids:
        pid = pids.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(x.split()[1]) for x in lines if x.startswith("Pss_Anon:"))
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += (task / "children").read_text().split()
        except OSError:  # it has ended
            continue
    return total / 1024


def measure(settings: dict[str, Any], pipe: Any) -> None:
    """One code on one corpus, in a process of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    eos = tokenizer.eos_token_id
    layout = Layout(1024, bos=eos, eos=eos, pad=eos)
    peak, is_over = [anonymous_mb()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.2):
            peak.append(anonymous_mb())

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(settings["path"]).parent / "texts"
        documents = load_files(Files([settings["path"]], "text"), str(copy))
        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        code = CODES[settings["code"]]
        num_rows = code(documents, tokenizer, layout, settings["num_proc"], folder)
        seconds = time.perf_counter() - start
        is_over.set()
        watcher.join()
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    usage = [resource.getrusage(x) for x in (resource.RUSAGE_SELF, -1)]
    pipe.send(
        {
            "rows": num_rows,
            "seconds": seconds,
            "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in usage),
            "peak_mb": max(peak),
            "before_mb": peak[0],
            "disk_mb": size / 2**20,
        }
    )


def run(settings: dict[str, Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(settings, sender))
    process.start()
    sender.close()  # so that a process that dies is noticed
    result = receiver.recv()
    process.join()
    return settings | result


def report(rows: list[dict[str, Any]], output: Path) -> None:
    """A table on screen and in markdown, and the numbers."""
    heads = ("code", "documents", "processes", "s", "documents/s", "MB above start")
    heads += ("MB on disk", "OpenWebText: hours", "GB on disk")
    table = Table(*heads)
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for row in rows:
        factor = OPENWEBTEXT / row["documents"]
        cells = (
            row["code"],
            f"{row['documents']}",
            f"{row['num_proc']}",
            f"{row['seconds']:.1f}",
            f"{row['documents'] / row['seconds']:.0f}",
            f"{row['peak_mb'] - row['before_mb']:.0f}",
            f"{row['disk_mb']:.0f}",
            f"{row['seconds'] * factor / 3600:.1f}",
            f"{row['disk_mb'] * factor / 1024:.0f}",
        )
        table.add_row(*cells)
        lines.append(" | ".join(cells))
    Console(width=120).print(table)
    output.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"| {line} |" for line in lines)
    (output / "data.md").write_text(f"# Reading and packing data\n\n{table}\n")
    (output / "data.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num in args.documents:
            path = Path(folder) / f"{num}.parquet"
            write_corpus(path, num)
            given = {"path": str(path), "tokenizer": args.tokenizer, "documents": num}
            for code, num_proc in [
                ("plain", 1),
                *(("ours", n) for n in args.processes),
            ]:
                rows.append(run(given | {"code": code, "num_proc": num_proc}))
    for row in rows:
        del row["path"], row["tokenizer"]
    report(rows, args.output)


if __name__ == "__main__":
    main()
