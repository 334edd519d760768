"""Tokenizers: round trips, special ids, fallbacks, and the vocabularies they give."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, tokenizer_of

from data.encoding import token_ids
from data.loading import published_separator
from data.tokenizers import TOKENIZERS, get_tokenizer, has_pad_alone, padding_id
from utils import ConfigError

TEXT8_ALPHABET = string.ascii_lowercase + " "
# Anything that UTF-8 can hold; special tokens are written with brackets.
unicode_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="[]"), max_size=40
)


@pytest.fixture(scope="module")
def text8():
    return TOKENIZERS["text8"]()


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return TOKENIZERS["bytes"]()


@pytest.fixture
def tokenizer_for(compose):
    def load(name, *overrides):
        return get_tokenizer(compose(f"data.tokenizer_name_or_path={name}", *overrides))

    return load


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- our own


@given(text=st.text(TEXT8_ALPHABET, max_size=60))
def test_text8_round_trip(text8, text):
    ids = encode(text8, text)
    assert len(ids) == len(text)
    assert text8.decode(ids) == text


@given(text=unicode_text)
def test_text8_takes_any_text(text8, text):
    """Lower case; what is outside the alphabet is unknown, a character at a time."""
    unknown = text8.unk_token_id
    ids = encode(text8, text)
    known = [c for c in text.lower() if c in TEXT8_ALPHABET]
    assert text8.decode([i for i in ids if i != unknown]) == "".join(known)


def test_text8_ids(text8):
    """35 entries, special tokens first, the mask at 4."""
    specials = ["[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]"]
    assert text8.convert_tokens_to_ids(specials) == [0, 1, 2, 3, 4, 5]
    assert text8.vocab_size == len(text8) == 35
    assert encode(text8, "a z") == [8, 34, 33]
    assert encode(text8, "É") == [text8.unk_token_id]
    assert (text8.mask_token_id, text8.bos_token_id, text8.eos_token_id) == (4, 2, 3)


@given(text=unicode_text)
def test_bytes_round_trip(bytes_tokenizer, text):
    """One id a UTF-8 byte, and back."""
    ids = encode(bytes_tokenizer, text)
    assert len(ids) == len(text.encode())
    assert bytes_tokenizer.decode(ids) == text


def test_bytes_ids(bytes_tokenizer):
    tokenizer = bytes_tokenizer
    special = [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.mask_token_id,
        tokenizer.pad_token_id,
    ]
    assert special == [256, 257, 258, 259]
    assert tokenizer.vocab_size == len(tokenizer) == 260
    assert len(set(encode(tokenizer, "".join(map(chr, range(128)))))) == 128


def test_synthetic_writes_numbers(tokenizer_for):
    """0 .. K - 3 in decimal, then bos and eos; every one of the K ids decodes."""
    tokenizer = tokenizer_for("synthetic", "data.vocab_size=256")
    assert encode(tokenizer, "17 3 0 ") == [17, 3, 0]
    assert tokenizer.decode([253, 0, 10]) == "253 0 10 "
    assert tokenizer.bos_token_id == 254
    assert tokenizer.eos_token_id == 255
    assert tokenizer.vocab_size == len(tokenizer) == 256
    assert tokenizer.mask_token_id is None
    assert tokenizer.decode([254, 7, 255]).count("[") == 2


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_batches_decode_as_rows_do(tokenizer_for, name):
    tokenizer = tokenizer_for(name)
    ids = [[0, 1, 2], [3, 4, 5]]
    assert tokenizer.batch_decode(ids) == [tokenizer.decode(row) for row in ids]


# ---------------------------------------------------------------- every tokenizer


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_bos_eos_and_pad_are_there(tokenizer_for, name):
    tokenizer = tokenizer_for(name)
    for token_id in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ):
        assert 0 <= token_id < len(tokenizer)


def test_published_tokenizers_get_what_they_lack(tokenizer_for, pretrained):
    """bos falls back to cls, eos to sep; a missing pad is added at the end."""
    tokenizer = tokenizer_for(pretrained)
    expected = {
        "gpt2": (50256, 50256, 50257, 50257, 50258, None),
        "bert-base-uncased": (101, 102, 0, 30522, 30522, 103),
    }[pretrained.rsplit("/", 1)[-1]]
    assert expected == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.vocab_size,
        len(tokenizer),
        tokenizer.mask_token_id,
    )


def test_vocabularies_of_models(tokenizer_for, pretrained):
    """Absorbing states and AR take vocab_size (+ 1 mask), uniform states len."""
    from algo import AR, DUO_BASE, MDLM

    tokenizer = tokenizer_for(pretrained)
    with_mask, uniform = {
        "gpt2": ((50258, 50257), (50258, None)),
        "bert-base-uncased": ((30522, 103), (30522, None)),
    }[pretrained.rsplit("/", 1)[-1]]
    assert MDLM.vocabulary(tokenizer) == AR.vocabulary(tokenizer) == with_mask
    assert DUO_BASE.vocabulary(tokenizer) == uniform


def test_vocabularies_of_models_with_our_tokenizers(tokenizer_for):
    from algo import DUO_BASE, MDLM

    assert MDLM.vocabulary(tokenizer_for("text8")) == (35, 4)
    assert MDLM.vocabulary(tokenizer_for("bytes")) == (260, 258)
    synthetic = tokenizer_for("synthetic", "data.vocab_size=256")
    assert MDLM.vocabulary(synthetic) == (257, 256)
    assert DUO_BASE.vocabulary(synthetic) == (256, None)


def test_an_unknown_tokenizer_is_refused(tokenizer_for, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data.tokenizers.hub_options", lambda _: {"local_files_only": True}
    )
    for name in ("text9", str(tmp_path)):
        with pytest.raises(ConfigError) as error:
            tokenizer_for(name)
        text = str(error.value)
        assert "\n" not in text
        assert f"data.tokenizer_name_or_path={name!r}" in text
        assert "text8" in text


@pytest.fixture
def kind(monkeypatch, tokenizer_for):
    """A tokenizer of a kind as a run has it."""

    def build(name, *overrides):
        monkeypatch.setitem(TOKENIZERS, name, lambda config: tokenizer_of(name))
        return tokenizer_for(name, *overrides)

    return build


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_id_is_in_the_vocabulary(kind, name):
    """K covers every id, and the mask is an entry of its own; but a pad that is all
    that lies behind the vocabulary has its place, as published."""
    from algo import AR, DUO_BASE, MDLM

    own = max(tokenizer_of(name).get_vocab().values())
    tokenizer = kind(name)
    ids = set(tokenizer.get_vocab().values())
    K, mask = MDLM.vocabulary(tokenizer)
    assert AR.vocabulary(tokenizer) == (K, mask)
    assert DUO_BASE.vocabulary(tokenizer) == (max(ids) + 1, None)
    assert own < K
    assert mask < K
    padding = padding_id(tokenizer, mask)
    assert padding < K
    assert len({mask, padding, tokenizer.bos_token_id, tokenizer.eos_token_id}) >= (
        2 + (tokenizer.bos_token_id != tokenizer.eos_token_id)
    )
    if tokenizer.mask_token_id is None:
        assert mask == K - 1
        assert mask not in ids - {tokenizer.pad_token_id}
        if not has_pad_alone(tokenizer):
            assert mask not in ids
    else:
        assert mask == tokenizer.mask_token_id
    published = tokenizer.vocab_size + (tokenizer.mask_token_id is None)
    behind = {i for i in ids if i >= tokenizer.vocab_size}
    assert (published == K) == (behind <= {tokenizer.pad_token_id})


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "gpt2_with_mask"])
def test_a_saved_tokenizer_has_the_same_vocabulary(kind, name, tmp_path, tokenizer_for):
    """An exported folder holds the pad that the tokenizer lacked."""
    from algo import DUO_BASE, MDLM

    tokenizer = kind(name)
    tokenizer.save_pretrained(tmp_path / name)
    again = tokenizer_for(str(tmp_path / name))
    for algorithm in (MDLM, DUO_BASE):
        assert algorithm.vocabulary(again) == algorithm.vocabulary(tokenizer)
    assert again.bos_token_id == tokenizer.bos_token_id


def test_a_missing_bos_is_eos_or_what_is_named(kind):
    assert kind("qwen").bos_token == "<eos>"
    tokenizer = kind("qwen", "data.bos_token='<pad>'")
    assert tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids("<pad>")
    assert kind("llama3").bos_token == "<bos>"
    assert kind("llama3", "data.bos_token='<eos>'").bos_token == "<eos>"
    assert kind("bert").bos_token == "[CLS]"
    with pytest.raises(ConfigError, match=r"data.bos_token='<nothing>' is no token"):
        kind("qwen", "data.bos_token='<nothing>'")


@pytest.mark.parametrize("name", sorted({*KINDS} - {"words"}))
def test_special_tokens_in_text_are_tokens_or_text(kind, name):
    """Also where the vocabulary holds them as it holds words (t5)."""
    for setting in ("keep", "split"):
        tokenizer = kind(name, f"data.special_tokens_in_text={setting}")
        no_place = has_pad_alone(tokenizer) and setting == "keep"
        for token in {*tokenizer.all_special_tokens} - {tokenizer.unk_token}:
            index = tokenizer.convert_tokens_to_ids(token)
            for text in (token, f"the {token} cat", f"a{token}b"):
                (ids,) = token_ids([text], tokenizer)
                is_token = setting == "keep"
                if no_place and token == tokenizer.pad_token:
                    is_token = False
                assert (index in ids) == is_token
                assert ids


def test_the_separator_of_published_runs_is_eos(kind, monkeypatch):
    """Also where special tokens in texts are text."""
    tokenizer = kind("gpt2", "data.special_tokens_in_text=split")
    assert published_separator(tokenizer) == tokenizer.eos_token_id


def test_a_tokenizer_without_eos_is_refused(tokenizer_for, monkeypatch):
    def bare(config):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        return PreTrainedTokenizerFast(tokenizer_object=core)

    monkeypatch.setitem(TOKENIZERS, "bare", bare)
    with pytest.raises(ConfigError, match="no eos/sep token"):
        tokenizer_for("bare")
