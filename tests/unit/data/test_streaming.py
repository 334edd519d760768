"""Streams: every document once an epoch, and the same batches after any stop."""

import gzip
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from data.documents import Listed
from data.files import load_files
from data.packing import Layout, lay_out, rows_of, tokenize
from data.readers import Files, Skipped, Txt, read
from data.registry import DATASETS
from data.streaming import (
    Mark,
    Place,
    State,
    Stream,
    StreamLoader,
    read_documents,
    read_rows,
    shuffled,
)
from data.tokenizers import bytes_tokenizer

LAYOUT = Layout(8, bos=256, eos=257, pad=259)
NAMES = ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.parquet.gz", "e.txt")


def document(file: int, number: int) -> str:
    return f"{file}.{number}." + "x" * (number % 7)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """Five files of all formats, file k with 3 k + 4 documents."""
    folder = tmp_path_factory.mktemp("stream")
    for index, name in enumerate(NAMES):
        texts = [document(index, number) for number in range(3 * index + 4)]
        path = folder / name
        if "parquet" in name:
            table = pyarrow.table({"n": range(len(texts)), "body": texts})
            pyarrow.parquet.write_table(table, path, row_group_size=3)
            if name.endswith("gz"):
                path.write_bytes(gzip.compress(path.read_bytes()))
        elif name.endswith("txt"):
            path.write_text("\n".join(texts) + "\n")
        else:
            lines = "\n".join(json.dumps({"body": text}) for text in texts).encode()
            path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    return Files([str(folder / name) for name in NAMES], "body", Txt(lines=True))


def everything(files: Files) -> set[str]:
    return {
        document(index, number)
        for index in range(len(files.paths))
        for number in range(3 * index + 4)
    }


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 100])
def test_each_format_is_read_from_any_document(files, start):
    for index, path in enumerate(files.paths):
        texts = [document(index, number) for number in range(3 * index + 4)]
        found = list(read(path, files, Skipped(files), start))
        assert found == list(enumerate(texts))[start:]


@pytest.mark.parametrize("txt", [Txt(), Txt(lines=True), Txt(lines=True, ends=True)])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_documents_are_those_of_packing(tmp_path, txt, name):
    """Blank ones, blanks around them and ends of lines included."""
    lines = [" = A = ", " ", "", " text of it\t", "x"]
    path, text = tmp_path / name, "\n".join(lines) + "\n"
    if name.endswith(".jsonl"):
        text = "\n".join(json.dumps({"body": line}) for line in lines)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    files = Files([str(path)], "body", txt)
    packed = load_files(files, str(tmp_path / "cache"))
    expected = packed.texts(0, len(packed))
    found = read_documents(files, 0, 1, 1, Place())
    assert [text for _, text in itertools.islice(found, len(expected))] == expected
    is_whole = name != "a.jsonl" and not txt.lines
    assert len(expected) == (1 if is_whole else len(lines))


@pytest.mark.parametrize("num_readers", [1, 2, 3, 5, 7])
def test_readers_share_an_epoch(files, num_readers):
    """Every document goes to one; by files, or by documents if those are few."""
    found = []
    for reader in range(num_readers):
        documents = read_documents(files, reader, num_readers, 1, Place())
        first = itertools.takewhile(lambda pair: pair[0].epoch == 0, documents)
        found += [text for _, text in first]
    assert len(found) == len(everything(files))
    assert set(found) == everything(files)


def test_documents_of_zst(tmp_path):
    """The format of SlimPajama's files."""
    lines = "\n".join(json.dumps({"text": document(0, n)}) for n in range(5))
    compressed = zstandard.ZstdCompressor().compress(lines.encode())
    (tmp_path / "a.jsonl.zst").write_bytes(compressed)
    documents = read_documents(
        Files([f"{tmp_path}/a.jsonl.zst"], "text"), 0, 1, 1, Place()
    )
    assert [text for _, text in itertools.islice(documents, 5)] == [
        document(0, n) for n in range(5)
    ]


@pytest.mark.parametrize("drop_empty", [True, False])
def test_empty_documents_count_or_do_not(tmp_path, drop_empty):
    lines = [json.dumps({"text": text}) for text in ("a", "", None, "b")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files = Files([f"{tmp_path}/a.jsonl"], "text", drop_empty=drop_empty)
    documents = read_documents(files, 0, 1, 1, Place())
    first = itertools.takewhile(lambda pair: pair[0].epoch == 0, documents)
    expected = (
        [(0, "a"), (3, "b")] if drop_empty else list(enumerate(["a", "", "", "b"]))
    )
    assert [(place.document, text) for place, text in first] == expected


def test_epochs_have_orders_of_their_own(files):
    documents = read_documents(files, 0, 1, 1, Place())
    num = len(everything(files))
    epochs = [[text for _, text in itertools.islice(documents, num)] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


@pytest.mark.parametrize("num_readers", [1, 3, 7])
def test_reading_goes_on_from_any_place(files, num_readers):
    reader = num_readers - 1
    whole = read_documents(files, reader, num_readers, 3, Place())
    pairs = list(itertools.islice(whole, 40))
    for index in (0, 5, 17, 30):
        rest = read_documents(files, reader, num_readers, 3, pairs[index][0])
        assert list(itertools.islice(rest, 40 - index)) == pairs[index:]


def test_too_few_documents_are_refused(files):
    few = Files(files.paths[:1], "body")
    documents = read_documents(few, 8, 9, 1, Place())
    refused(lambda: next(documents), "9 readers", "loader.num_workers")


def test_a_missing_column_is_refused(files):
    for path in files.paths[:2]:
        other = Files([path], "text")
        documents = read_documents(other, 0, 1, 1, Place())
        refused(lambda documents=documents: next(documents), "'text'", "body", path)


# ---------------------------------------------------------------- rows


def as_documents(texts):
    return ((Place(document=n), text) for n, text in enumerate(texts))


@settings(max_examples=40)
@given(
    st.lists(st.text(alphabet="abc", max_size=25), min_size=1, max_size=150),
    st.booleans(),
    st.booleans(),
)
def test_rows_are_those_of_packing(texts, wrap, insert_eos):
    """As if the stream were a set of documents; and from any row on."""
    layout = LAYOUT._replace(wrap=wrap, insert_eos=insert_eos)
    tokenizer = bytes_tokenizer()
    packed = rows_of(lay_out(tokenize(Listed(texts), tokenizer), layout), 8)
    rows = list(read_rows(as_documents(texts), tokenizer, (), layout))
    assert [row.ids.tolist() for row in rows] == packed.ids.tolist()
    if packed.num_valid is not None:
        assert [row.num_valid for row in rows] == packed.num_valid.tolist()
    for index in range(0, len(rows), 5):
        (place, used) = rows[index].after
        later = itertools.islice(as_documents(texts), place.document, None)
        rest = list(read_rows(later, tokenizer, (), layout, used=used))
        assert len(rest) == len(rows) - index - 1
        for row, again in zip(rows[index + 1 :], rest, strict=True):
            assert row.ids.tolist() == again.ids.tolist()
            assert row.after == again.after


def test_shuffling_is_within_blocks_and_can_be_taken_up():
    def numbers(start):
        return iter(
            [
                type("R", (), {"ids": n, "after": Mark(Place(document=n + 1))})
                for n in range(start, 300)
            ]
        )

    whole = list(itertools.islice(shuffled(numbers(0), [1], 16, State()), 100))
    got = [row.ids for row, _ in whole]
    for start in range(0, 96, 16):
        block = got[start : start + 16]
        assert sorted(block) == list(range(start, start + 16))
        assert block != sorted(block)
    assert got[:16] != [n - 16 for n in got[16:32]]
    for index in (0, 7, 15, 16, 40):
        state = State.of(whole[index][1].numbers())
        first = state.mark.place.document
        rest = shuffled(numbers(first), [1], 16, state)
        again = list(itertools.islice(rest, 99 - index))
        assert [row.ids for row, _ in again] == got[index + 1 :]


# ---------------------------------------------------------------- batches


def loader(files, *, workers=0, rank=0, world_size=1, ranks=None, wrap=True):
    layout = LAYOUT._replace(wrap=wrap)
    stream = Stream(files, bytes_tokenizer(), (), layout, seed=5, block=6)
    stream.rank, stream.world_size, stream.batch_size = rank, world_size, 2
    gather = (lambda state: [state]) if ranks is None else (lambda state: ranks)
    return StreamLoader(
        stream, gather, lambda ids: None, num_workers=workers, collate_fn=lambda x: x
    )


def take(source, num):
    return [batch["input_ids"].tolist() for batch in itertools.islice(source, num)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrap", [True, False])
def test_a_stop_changes_no_batch(files, workers, wrap):
    """Wherever it is: workers take turns, and the next one goes on."""
    whole = take(iter(loader(files, workers=workers, wrap=wrap)), 14)
    assert len({str(batch) for batch in whole}) == 14
    for stop in (1, 4, 7) if workers else range(1, 12):
        source = loader(files, workers=workers, wrap=wrap)
        first = take(iter(source), stop)
        state = json.loads(json.dumps(source.state_dict()))
        again = loader(files, workers=workers, wrap=wrap)
        again.load_state_dict(state | {"epoch": 0, "rows": 2 * stop})
        assert first + take(iter(again), 14 - stop) == whole


def test_ranks_have_documents_of_their_own(files):
    """Before the first epoch is over no row is the same."""
    rows = []
    for rank in (0, 1):
        batches = take(iter(loader(files, rank=rank, world_size=2, wrap=False)), 4)
        rows.append({str(row) for batch in batches for row in batch})
    assert len(rows[0]) == len(rows[1]) == 8
    assert not rows[0] & rows[1]


def test_the_state_holds_all_ranks(files):
    sources = [loader(files, rank=r, world_size=2) for r in (0, 1)]
    whole = [take(iter(source), 9) for source in sources]
    states = []
    for rank in (0, 1):
        source = loader(files, rank=rank, world_size=2)
        take(iter(source), 4)
        states.append(source._states)
    source = loader(files, world_size=2, ranks=states)
    state = source.state_dict()
    for rank in (0, 1):
        again = loader(files, rank=rank, world_size=2)
        again.load_state_dict(state)
        assert take(iter(again), 5) == whole[rank][4:]


def test_another_number_of_readers_starts_an_epoch(files, caplog):
    source = loader(files)
    take(iter(source), 3)
    other = loader(files, workers=2)
    other.load_state_dict(source.state_dict())
    assert "it goes on with a new epoch" in caplog.text
    assert all(state.mark.place.epoch == 1 for state in other.dataset.states)
    assert len(take(iter(other), 3)) == 3


def test_a_run_that_did_not_stream_leaves_the_beginning(files):
    source = loader(files)
    source.load_state_dict({"epoch": 3, "rows": 40})
    assert take(iter(source), 3) == take(iter(loader(files)), 3)


def test_batches_have_ids_and_masks(files):
    batch = next(iter(loader(files, wrap=False)))
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    is_padding = batch["input_ids"] == LAYOUT.pad
    assert torch.equal(batch["attention_mask"], (~is_padding).float())
    assert np.isin(batch["input_ids"][:, 0], LAYOUT.bos).all()


def test_what_has_no_streamer_gives_no_stream():
    with pytest.raises(ValueError, match="no streamer"):
        DATASETS["text8-crop"].stream(None, None)
