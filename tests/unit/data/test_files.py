"""Where documents come from: synthetic rows, docstrings, text8's rules, files."""

import ast
import gzip
import itertools
import json
import math
import string
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from refusals import refused

from data.detokenizers import text8_normalize
from data.docstrings import docstrings, standard_library
from data.files import TEXT_FORMATS, find_files, read_texts
from data.synthetic import synthetic_entropy, synthetic_rows

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
    return read_texts(files, "data.path", column, str(tmp_path / "cache"))


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
