"""Where documents come from: synthetic rows, docstrings, text8's rules, files."""

import ast
import gzip
import itertools
import json
import math
import pickle
import re
import string
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from refusals import refused

from cli.commandline import find_inputs
from data.detokenizers import text8_normalize
from data.docstrings import docstrings, standard_library
from data.files import (
    TEXT_FORMATS,
    StoredTexts,
    Texts,
    check_apart,
    find_files,
    load_files,
    read_texts,
    store_texts,
)
from data.readers import Files, Txt
from data.streaming import Place, read_documents
from data.synthetic import synthetic_entropy, synthetic_rows
from utils import ConfigError

# ---------------------------------------------------------------- synthetic


def chain(draw, size):
    """Tokens of a row, right to left: x // 4 after x, a new draw after 0."""
    tokens, x = [], draw()
    for _ in range(size):
        tokens.append(x)
        x = draw() if x == 0 else x // 4
    return tokens


def slow_rows(num_rows, length, vocab_size, seed):
    """The same, one number at a time, as the reference draws them."""
    random = np.random.RandomState(seed)
    rows = []
    for _ in range(num_rows):
        tokens = chain(lambda: random.randint(vocab_size - 2), length - 2)
        rows.append([vocab_size - 2, *tokens[::-1], vocab_size - 1])
    return rows


@pytest.mark.parametrize("seed", [41, 42])
@pytest.mark.parametrize("vocab_size", [3, 4, 7, 18, 256, 1000])
@pytest.mark.parametrize("length", [3, 4, 5, 8, 64])
def test_synthetic_rows_are_those_of_the_loop(length, vocab_size, seed):
    for num_rows in (1, 50):
        got = synthetic_rows(num_rows, length, vocab_size, seed)
        assert got.shape == (num_rows, length)
        assert got.tolist() == slow_rows(num_rows, length, vocab_size, seed)


def test_many_synthetic_rows_need_more_than_one_draw_of_numbers():
    """Past the first block of random numbers, the stream goes on without a seam."""
    got = synthetic_rows(3000, 12, 5, seed=1)
    assert got.tolist() == slow_rows(3000, 12, 5, seed=1)


def test_a_longer_set_begins_with_the_shorter_one():
    long, short = synthetic_rows(500, 16, 256, 42), synthetic_rows(20, 16, 256, 42)
    assert np.array_equal(long[:20], short)


@pytest.mark.parametrize(
    ("length", "vocab_size"), [(3, 6), (4, 6), (6, 6), (7, 5), (5, 9), (6, 4), (8, 3)]
)
def test_synthetic_entropy_is_exact(length, vocab_size):
    """Against the distribution itself: every sequence of draws, equally likely."""
    size, choices = length - 2, vocab_size - 2
    probabilities = Counter()
    for draws in itertools.product(range(choices), repeat=size):
        # The loop asks for at most one draw a token, and a last one in vain.
        supply = iter((*draws, 0))
        probabilities[tuple(chain(lambda s=supply: next(s), size))] += choices**-size
    entropy = -sum(p * math.log(p) for p in probabilities.values())
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert synthetic_entropy(length, vocab_size) == pytest.approx(entropy, abs=1e-12)


# ---------------------------------------------------------------- docstrings


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own."""

    def write(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.encode())
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        return dict(docstrings(standard_library()))

    return write


def test_docstrings_of_modules_classes_and_functions(library):
    source = (
        '"""Module."""\n'
        "class A:\n"
        '    """Class."""\n'
        "    def f(self):\n"
        '        """Method,\n        two lines."""\n'
        "async def g():\n"
        '    "Coroutine."\n'
        'x = "no docstring"\n'
    )
    got = library({"a.py": source, "b/c.py": "'Other.'", "d.py": "x = 1"})
    assert got.keys() == {"a.py", "b/c.py"}
    parts = ["Module.", "Class.", "Method,\ntwo lines.", "Coroutine."]
    assert sorted(got["a.py"].split("\n\n")) == sorted(parts)


def test_tests_packages_and_broken_files_are_left_out(library):
    names = ("test/a.py", "x/tests/a.py", "site-packages/a.py", "idlelib/a.py")
    files = dict.fromkeys(names, "'Text.'")
    broken = {"broken.py": "def (", "zeros.py": "'Text.'\0"}
    assert library(files | broken | {"good.py": "'Text.'"}) == {"good.py": "Text."}


def test_reading_executes_nothing(library):
    source = "'Text.'\nraise SystemExit\n"
    assert library({"bad.py": source}) == {"bad.py": "Text."}


def test_this_pythons_library_is_documented(monkeypatch):
    """The first modules alone, to be quick: real text, in the order of the paths."""
    documents = list(itertools.islice(docstrings(standard_library()), 12))
    names = [name for name, _ in documents]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    root = Path(sysconfig.get_paths()["stdlib"])
    for name, text in documents:
        tree = ast.parse((root / name).read_bytes())
        first = ast.get_docstring(tree)
        assert first is None or text.startswith(first)
    assert sum(len(text) for _, text in documents) > 5000
    assert "pytest" in sys.modules  # nothing of the library was reloaded


# ---------------------------------------------------------------- text8


@given(st.text(max_size=80))
def test_text8_alphabet(text):
    """27 characters, single spaces, none at the ends, whatever comes in."""
    got = text8_normalize(text)
    assert set(got) <= set(string.ascii_lowercase + " ")
    assert "  " not in got
    assert got == got.strip()
    assert text8_normalize(got) == got


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("In 1984 x", "in one nine eight four x"),
        ("a1b", "a one b"),
        ("  \n\t", ""),
        ("don't", "don t"),
        ("caf\u00e9 \u0663", "caf"),  # other scripts' digits are no digits here
    ],
)
def test_text8_rules(text, expected):
    assert text8_normalize(text) == expected


# ---------------------------------------------------------------- files

DOCUMENTS = ["first line\nsecond line", "another \u00e9"]


def write(path, column="text"):
    """DOCUMENTS in the format of the path's suffix; a .txt holds the first one."""
    import pyarrow
    import pyarrow.parquet

    plain = Path(str(path).removesuffix(".gz"))
    if plain.suffix == ".txt":
        plain.write_text(DOCUMENTS[0])
    elif plain.suffix == ".jsonl":
        lines = [json.dumps({column: text, "n": 1}) for text in DOCUMENTS]
        plain.write_text("\n".join(lines))
    else:
        table = pyarrow.table({"n": [1, 2], column: DOCUMENTS})
        pyarrow.parquet.write_table(table, plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return str(path)


def read(files, tmp_path, column="text"):
    """Documents that are not empty: of packing, which streams have as well."""
    source = Files(files, column, drop_empty=True)
    texts = read_texts(source)
    stored = load_files(source, str(tmp_path / "cache"))
    assert texts == [text for text in stored.texts(0, len(stored)) if text]
    return texts


@pytest.mark.parametrize("suffix", sorted(TEXT_FORMATS))
def test_each_format_is_read(tmp_path, suffix):
    file = write(tmp_path / f"corpus.v1{suffix}")
    assert find_files(file, "data.path") == [file]
    expected = DOCUMENTS[:1] if suffix.startswith(".txt") else DOCUMENTS
    assert read([file], tmp_path) == expected


def test_files_are_read_in_order_and_empty_documents_dropped(tmp_path):
    for name, text in {"b.txt": "two", "a.txt": "one", "c.txt": ""}.items():
        (tmp_path / name).write_text(text)
    files = find_files(f"{tmp_path}/*.txt", "data.path")
    assert [Path(file).name for file in files] == ["a.txt", "b.txt", "c.txt"]
    assert read(files, tmp_path) == ["one", "two"]


def test_another_column(tmp_path):
    file = write(tmp_path / "corpus.jsonl", column="body")
    assert read([file], tmp_path, column="body") == DOCUMENTS


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_column_is_refused(tmp_path, suffix):
    file = write(tmp_path / f"corpus{suffix}", column="body")
    refused(lambda: read([file], tmp_path), "data.text_column='text'", "body", file)


@pytest.mark.parametrize("suffix", sorted(TEXT_FORMATS))
def test_a_broken_file_is_refused(tmp_path, suffix):
    file = tmp_path / f"corpus{suffix}"
    file.write_bytes(b'{"text": "a"}\n{"text": \xff\xfe\xfa')
    refused(lambda: read([str(file)], tmp_path), str(file), "cannot be read")


def test_globs_and_lists_of_files(tmp_path):
    for name in ("a.txt", "sub/b.txt", "c.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = OmegaConf.create(
        [f"{tmp_path}/**/*.txt", f"{tmp_path}/c*", f"{tmp_path}/a*"]
    )
    found = [str(Path(f).relative_to(tmp_path)) for f in find_files(paths, "data.path")]
    assert found == ["a.txt", "c.jsonl.gz", "sub/b.txt"]


def test_unusable_paths_are_refused(tmp_path):
    key = "data.path"
    refused(lambda: find_files(None, key), "data.path is empty")
    refused(
        lambda: find_files(f"{tmp_path}/*.txt", key), f"{tmp_path}/*.txt", "no file"
    )
    for name, suffix in {
        "a.docx": ".docx",
        "c.gz": ".gz",
        "README": "",
    }.items():
        file = str(tmp_path / name)
        (tmp_path / name).touch()
        call = lambda file=file: find_files(file, key)  # noqa: E731
        refused(call, f"{suffix!r}", name, *TEXT_FORMATS)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        *("part[1].txt", "what?.txt", "*.txt", "[!a].txt", "[.txt", "a{b,c}.txt"),
        *("wiki[en]/a.txt", "**/a.txt", "a*/b?/c[1].txt", "lr=[1e-4]/x.txt"),
    ],
)
def test_a_name_that_exists_is_that_file(tmp_path, name):
    """Beside others that it would match, and alone."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    assert find_files(str(path), "data.path") == [str(path)]
    for other in ("part1.txt", "whatX.txt", "b.txt", "wikie/a.txt", "x/a.txt"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text("another's")
    assert find_files(str(path), "data.path") == [str(path)]
    assert read([str(path)], tmp_path) == ["mine"]


def test_what_a_pattern_finds_is_read_once_each(tmp_path):
    for name in ("part[1].txt", "part1.txt", "part*.txt"):
        (tmp_path / name).write_text(name)
    files = find_files(f"{tmp_path}/p*.txt", "data.path")
    assert sorted(read(files, tmp_path)) == ["part*.txt", "part1.txt", "part[1].txt"]


def test_folders_of_a_pattern_that_exist_are_no_patterns(tmp_path):
    for name in ("wiki[en]/a.txt", "wiki[en]/b.txt", "wikie/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for pattern, expected in {
        "wiki[en]/*.txt": ["a.txt", "b.txt"],
        "wiki[[]en]/*.txt": ["a.txt", "b.txt"],
        "wiki[ex]/*.txt": ["c.txt"],
        "**/[ab].txt": ["a.txt", "b.txt"],
    }.items():
        found = find_files(f"{tmp_path}/{pattern}", "data.path")
        assert [Path(file).name for file in found] == expected


def test_relative_names_in_a_folder_with_brackets(tmp_path, monkeypatch):
    """Where the command is given, and where the run works, which is elsewhere."""
    folder = tmp_path / "runs[1]"
    (folder / "lr=[1e-4]").mkdir(parents=True)
    for name in ("a.txt", "lr=[1e-4]/last.ckpt"):
        (folder / name).touch()
    config = OmegaConf.create(
        {
            "data": {"path": "*.txt", "tokenizer_name_or_path": "lr=[1e-4]"},
            "eval": {"checkpoint_path": "lr=[1e-4]/last.ckpt"},
        }
    )
    find_inputs(config, str(folder))
    assert config.eval.checkpoint_path == f"{folder}/lr=[1e-4]/last.ckpt"
    assert config.data.tokenizer_name_or_path == f"{folder}/lr=[1e-4]"
    assert find_files(config.data.path, "data.path") == [f"{folder}/a.txt"]


def test_each_file_once_however_it_is_written(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "sub").mkdir()
    names = [f"{tmp_path}/{x}" for x in ("a.txt", "./a.txt", "sub/../a.txt", "*")]
    assert len(find_files(OmegaConf.create(names[:3]), "data.path")) == 1
    assert len(find_files(names[3], "data.path")) == 1  # folders are passed over


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    refused(lambda: find_files(f"{tmp_path}/folder", "data.path"), "is a folder")
    for name in ("a.txt", "b.TXT", "c.jsonl", "d.md", "e.md", "f.md"):
        (tmp_path / "folder" / name).touch()
    refused(lambda: find_files(f"{tmp_path}/folder", "data.path"), "/folder/*.txt'")
    (tmp_path / "x.txt").symlink_to(tmp_path / "gone.txt")
    refused(lambda: find_files(f"{tmp_path}/*.txt", "data.path"), "link to nothing")


def test_a_copy_is_known_compressed_or_not(tmp_path):
    """Of two files with one content, and of none with others."""
    text = b"a line of text\n" * 1000
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text, 1))
    (tmp_path / "c.TXT.GZ").write_bytes(gzip.compress(text, 9))
    (tmp_path / "other.txt").write_bytes(text[::-1])
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(text.upper()))
    damaged = bytearray(gzip.compress(text))
    damaged[20] ^= 255
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.txt.gz").write_bytes(gzip.compress(b""))
    same, keys = ["a.txt", "b.txt.gz", "c.TXT.GZ"], ("data.path", "data.valid_path")
    others = [
        "other.txt",
        "other.txt.gz",
        "damaged.txt.gz",
        "empty.txt",
        "empty.txt.gz",
    ]
    files = {name: str(tmp_path / name) for name in (*same, *others)}
    for one, two in itertools.permutations(files, 2):
        if {one, two} <= {*same}:
            refused(lambda x=one, y=two: check_apart([files[x]], [files[y]], keys), two)
        else:
            check_apart([files[one]], [files[two]], keys)


@pytest.mark.parametrize("name", ["A.TXT", "b.Jsonl", "c.JSONL.GZ", "d.Parquet"])
def test_suffixes_may_be_capital(tmp_path, name):
    source = Path(write(tmp_path / f"x{Path(name.lower()).name[1:]}"))
    source.rename(tmp_path / name)
    assert read([str(tmp_path / name)], tmp_path)


# ---------------------------------------------------------------- odd rows

GOOD = [f"text {n}" for n in range(6)]
BOM = b"\xef\xbb\xbf"


def lines_of(texts):
    return [json.dumps({"text": text}).encode() for text in texts]


def both(path, on_bad_row="stop", column="text", txt=None):
    """Documents of packing, and of a stream: the same, or the same message."""
    source = Files([str(path)], column, txt or Txt(), True, on_bad_row)
    found = []
    for docs in (lambda: packed_texts(source), lambda: streamed_texts(source)):
        try:
            found.append(docs())
        except ConfigError as error:
            found.append(str(error))
    assert found[0] == found[1]
    return found[0]


def packed_texts(source):
    with tempfile.TemporaryDirectory() as folder:
        stored = load_files(source, folder)
        return [text for text in stored.texts(0, len(stored)) if text]


def streamed_texts(source):
    documents = read_documents(source, 0, 1, 1, Place())
    first = itertools.takewhile(lambda pair: pair[0].epoch == 0, documents)
    return [text for _, text in first]


HARMLESS = {
    "a blank line at the end": lambda rows: [*rows, b""],
    "blank lines": lambda rows: [b"", *rows[:3], b" \t", b"", *rows[3:]],
    "a byte order mark": lambda rows: [BOM + rows[0], *rows[1:]],
    "Windows line ends": lambda rows: [row + b"\r" for row in rows],
    "a missing text": lambda rows: [*rows, b'{"other": 1}'],
    "the first texts missing": lambda rows: [b'{"other": 1}', b"{}", *rows],
    "a null": lambda rows: [b'{"text": null}', *rows],
    "an empty text": lambda rows: [b'{"text": ""}', *rows],
    "other columns that are no UTF-8": lambda rows: [*rows, b'{"x": "\xff"}'],
    "blanks around": lambda rows: [b"  " + row + b" \t " for row in rows],
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", HARMLESS)
def test_rows_that_are_passed_over(tmp_path, name, gz):
    data = b"\n".join(HARMLESS[name](lines_of(GOOD)))
    path = tmp_path / ("a.jsonl.gz" if gz else "a.jsonl")
    path.write_bytes(gzip.compress(data) if gz else data)
    assert both(path) == GOOD


BAD = {
    b'{"text": "cut of': "it is no JSON",
    b"no json": "it is no JSON",
    b'{"text": "a\xff"}': "UTF-8",
    b'{"text": "\\ud800"}': "half of a character",
    b'["a"]': "of type list",
    b'"a"': "of type str",
    b"17": "of type int",
    b'{"text": 3}': "data.text_column='text' is of type int, not text",
    b'{"text": ["a", "b"]}': "of type list, not text",
    b'{"text": {"a": 1}}': "of type dict, not text",
    b'{"text": true}': "of type bool, not text",
    b"[" * 100_000: "it is no JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "it is no JSON",
    b'{"text": "a"}{"text": "b"}': "it is no JSON",
}


@pytest.mark.parametrize("row", BAD, ids=lambda row: row[:30])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_that_cannot_be_read_is_named_or_passed_over(tmp_path, row, place):
    path = tmp_path / "a.jsonl"
    rows = lines_of(GOOD)
    path.write_bytes(b"\n".join([*rows[:place], row, *rows[place:]]))
    said = both(path)
    for part in (f"data.path: {path}, line {place + 1} ", BAD[row], "on_bad_row=skip"):
        assert part in said
    assert "\n" not in said
    assert both(path, "skip") == GOOD


def test_what_was_passed_over_is_counted(tmp_path, caplog):
    """It is said more and more rarely, and once for the rows that are packed."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines_of(GOOD), *[b"?"] * 9]))
    source = Files([str(path)], "text", on_bad_row="skip")
    assert load_files(source, str(tmp_path / "c")).num_skipped == 9
    said = [record.getMessage() for record in caplog.records]
    assert [int(re.search(r"\((\d+) so far", x)[1]) for x in said] == [1, 2, 4, 8]
    assert f"{path}, line 7 cannot be read" in said[0]


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"good\ntext\nb\xffd", "line 3 cannot be read: it is no UTF-8"),
        ("text".encode("utf-16"), "line 1 cannot be read: it is UTF-16"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_encodings(tmp_path, raw, part, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        raw = b'{"text": "' + raw.replace(b"\n", b'"}\n{"text": "') + b'"}'
        if b"UTF-16" in part.encode():
            raw = '{"text": "a"}'.encode("utf-16")
    path.write_bytes(raw)
    assert part in both(path)
    (tmp_path / "bom.txt").write_bytes(BOM + b"a\r\nb\rc")
    assert both(tmp_path / "bom.txt") == ["a\nb\nc"]


def test_lines_of_txt_files(tmp_path):
    """One document each, as published sets have them."""
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + b"a\r\n\r\n caf\xc3\xa9 \nb\xff\nlast")
    lines = Txt(lines=True)
    assert "line 4 cannot be read: it is no UTF-8" in both(path, txt=lines)
    assert both(path, "skip", txt=lines) == ["a", "caf\u00e9", "last"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz", ".parquet"])
def test_a_file_that_ends_too_soon(tmp_path, suffix):
    """Its rest cannot be read; what came before can."""
    path = Path(write(tmp_path / f"a{suffix}"))
    good = tmp_path / f"b{suffix}"
    good.write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}, from " in both(path)
    source = Files([str(path), str(good)], "text", on_bad_row="skip")
    expected = read([str(good)], tmp_path)
    assert packed_texts(source)[-len(expected) :] == expected


def test_what_the_system_refuses_is_no_bad_row(tmp_path):
    """It is said whatever is passed over."""
    said = both(tmp_path / "gone.jsonl", "skip")
    assert "gone.jsonl cannot be read" in said
    assert "No such file" in said


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([["a", "b"]], "list"),
        ([b"bytes"], "binary"),
        ([{"role": "user"}], "struct"),
    ],
)
def test_a_column_that_is_no_text(tmp_path, values, kind):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    for on_bad_row in ("stop", "skip"):
        said = both(path, on_bad_row)
        assert f"data.path: {path}: data.text_column='text' is of type {kind}" in said


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary"]
)
def test_kinds_of_text(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    wanted = types.get(kind) or getattr(pyarrow, kind)()
    column = pyarrow.array([*GOOD, None], pyarrow.string()).cast(wanted)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert both(path) == GOOD


def test_texts_travel_as_a_path(tmp_path):
    path = write(tmp_path / "a.jsonl")
    stored = load_files(Files([path], "text"), str(tmp_path / "copy"))
    copied = pickle.dumps(stored)
    assert len(copied) < 500
    assert pickle.loads(copied).texts(0, 2) == DOCUMENTS


@given(st.lists(st.text(max_size=20), max_size=30), st.integers(1, 60))
def test_texts_come_back(texts, size):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.files.CHARACTERS_AT_A_TIME", size)
        store_texts(texts, f"{folder}/x")
        stored = StoredTexts(f"{folder}/x")
        assert len(stored) == len(texts)
        for start in range(0, len(texts), 7):
            assert stored.texts(start, start + 9) == texts[start : start + 9]


# ---------------------------------------------------------------- the hub's


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([["a", "b"]], "list<"),
        ([{"a": "b"}], "struct<"),
        ([b"a"], "binary"),
        ([1.5], "double"),
        ([True], "bool"),
    ],
)
def test_a_column_of_the_hub_is_text(values, kind):
    """Nothing is tokenised of which the schema says that it is no text."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": values, "other": values})
    with pytest.raises(ValueError, match=f"column 'text' is of type .*{kind}.*, not"):
        Texts(rows, "text")
    strings = datasets.Dataset.from_dict({"text": ["a", None]})
    assert Texts(strings, "text").texts(0, 2) == ["a", ""]
