"""Ids of texts of any length: those of the pieces are those of the whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, TEXTS, tokenizer_of

from data import encoding
from data.encoding import Seams, encode_texts, pieces_of, token_ids
from data.tokenizers import TOKENIZERS as OWN
from data.tokenizers import bytes_tokenizer, get_tokenizer, text8_tokenizer

SNIPPETS = [
    *"".join(TEXTS[:3]).split(" "),
    *(" ", "  ", "\n", "\r\n", "\n\n  ", "\t", "", ".", ",", "'s", "1", "234", "x"),
    *("a b", "cat, dog", "e\u0301", "\u0301", "\u1100\u1161", "你好\uff0c世界", "ß"),
    "🙂",
    *("[MASK]", "[PAD]", "<eos>", "<|endoftext|>", "</s>", "<extra 0>", "<s", "[MA"),
    *("slovo slovo", "слово слово", "f(x) = y_1", "\xa0", "\u3000", "don't I'LL"),
]
texts = st.lists(st.sampled_from(SNIPPETS), max_size=60).map("".join) | st.lists(
    st.sampled_from(SNIPPETS), max_size=60
).map(" ".join)


def published(name):
    def build():
        from transformers import AutoTokenizer

        folder = f"/work/shared/data/{name}"
        return AutoTokenizer.from_pretrained(folder)

    return build


def finished(name):
    """As `get_tokenizer` leaves it."""
    tokenizer = tokenizer_of(name) if name in KINDS else OWN[name]()
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@pytest.fixture(params=[*sorted(KINDS), "text8", "bytes"], scope="module")
def tokenizer(request):
    return finished(request.param)


@pytest.fixture(params=[False, True], ids=["keep", "split"])
def is_text(request, tokenizer):
    tokenizer.split_special_tokens = request.param
    return request.param


@settings(max_examples=60, deadline=None)
@given(text=texts, size=st.integers(1, 40), part=st.integers(1, 30))
def check_pieces(tokenizer, text, size, part):
    encoding.PIECE = size
    parts = [text[i : i + part] for i in range(0, len(text), part)]
    pieces = list(pieces_of(parts, tokenizer))
    ids = list(itertools.chain(*token_ids(pieces, tokenizer)))
    assert ids == token_ids([text], tokenizer)[0]
    flat, lengths = encode_texts(["", text, "a b"], tokenizer)
    assert flat.tolist() == ids + token_ids(["a b"], tokenizer)[0]
    assert lengths.tolist() == [0, len(ids), len(flat) - len(ids)]


def test_pieces_have_the_ids_of_the_whole(tokenizer, is_text, monkeypatch):
    """For any text, any size of a piece, and any parts that it is read in."""
    monkeypatch.setattr(encoding, "PIECE", encoding.PIECE)
    check_pieces(tokenizer)


def test_published_tokenizers_are_cut(pretrained, compose, monkeypatch):
    config = compose(f"data.tokenizer_name_or_path={pretrained}")
    for setting in ("keep", "split"):
        config.data.special_tokens_in_text = setting
        tokenizer = get_tokenizer(config)
        monkeypatch.setattr(encoding, "PIECE", encoding.PIECE)
        check_pieces(tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "mistral", "llama2", "t5"])
def test_long_texts_are_cut_at_words(name):
    """Where something is known; the pieces are as long as they may be."""
    tokenizer = finished(name)
    text = "the cat sat on the mat " * 10_000
    pieces = list(pieces_of([text], tokenizer))
    assert len(pieces) == -(-len(text) // encoding.PIECE)
    assert {len(piece) <= encoding.PIECE for piece in pieces} == {True}


def test_bytes_are_cut_anywhere(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 100)
    tokenizer = bytes_tokenizer()
    assert max(map(len, pieces_of(["x" * 12_345], tokenizer))) == 100
    tokenizer.split_special_tokens = False
    pieces = list(pieces_of(["[MASK]" * 1000], tokenizer))
    assert all(piece.startswith("[MASK]") for piece in pieces)
    assert max(map(len, pieces)) <= 100


def test_bytes_are_looked_up_with_the_same_ids(monkeypatch):
    """Every byte that occurs in UTF-8, special tokens that are text included; where
    those are tokens, nothing is looked up."""
    tokenizer = bytes_tokenizer()
    tokenizer.split_special_tokens = True
    texts = ["".join(map(chr, range(0x3000))), "", "[EOS] \U0001f600 \U0010ffff\0"]
    expected = token_ids(texts, tokenizer)
    monkeypatch.setattr(encoding, "token_ids", None)  # is not needed
    flat, lengths = encode_texts(texts, tokenizer)
    assert flat.dtype == np.int32
    assert flat.tolist() == [*itertools.chain(*expected)]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert encoding.byte_ids(tokenizer, False) is None
    assert encoding.byte_ids(text8_tokenizer(), True) is None


@pytest.mark.parametrize("name", ["bytes", "gpt2", "text8", "across_words"])
def test_ids_have_the_bytes_of_their_text(name):
    """Where they are known; a special token has none."""
    tokenizer = OWN[name]() if name in OWN else tokenizer_of(name)
    sizes = encoding.bytes_of_ids(tokenizer)
    text = "the cat sat" if name == "text8" else "the cat's \n é 你好 \U0001f600."
    ids = token_ids([text], tokenizer)[0]
    if sizes is not None:
        assert sizes[ids].sum() == len(text.encode())
        assert not sizes[tokenizer.all_special_ids].any()
    assert (sizes is None) == (name == "across_words")


def test_without_a_seam_a_text_stays_whole(caplog, monkeypatch):
    """Tokens that reach from word to word: nothing is known of where to cut."""
    monkeypatch.setattr(encoding, "PIECE", 50)
    monkeypatch.setattr(encoding, "SEPARATORS", (" ", "\n"))
    encoding.seams_of.cache_clear()
    tokenizer = finished("across_words")
    text = "the cat sat on the mat " * 100
    assert list(pieces_of([text], tokenizer)) == [text]
    assert not Seams.of(tokenizer, False)
    assert len([x for x in caplog.messages if "tokenized as a whole" in x]) == 1


def test_few_characters_are_tokenized_at_a_time(monkeypatch):
    """However many texts there are, and however long they are."""
    tokenizer, sizes = text8_tokenizer(), []

    def watched(texts, tokenizer):
        sizes.append(sum(map(len, texts)))
        return [[0] * len(text) for text in texts]

    monkeypatch.setattr(encoding, "token_ids", watched)
    flat, lengths = encode_texts(["a b " * 200_000, "", "c" * 10] * 2, tokenizer)
    assert lengths.tolist() == [800_000, 0, 10] * 2
    assert len(flat) == lengths.sum()
    limit = encoding.CHARACTERS_AT_A_TIME + encoding.PIECE
    assert max(sizes) <= limit
    assert flat.dtype == np.int32
