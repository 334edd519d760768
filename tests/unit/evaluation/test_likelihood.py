"""What stands beside a likelihood."""

import numpy as np
import pytest

from data.rows import TokenRows
from data.tokenizers import bytes_tokenizer, text8_tokenizer
from evaluation.likelihood import _tokens_per_byte


def row(tokenizer, text, length):
    """bos, text, eos, then padding; and how much of it is no padding."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids)), len(ids)


@pytest.mark.parametrize("build", [bytes_tokenizer, text8_tokenizer])
def test_tokens_for_each_byte_are_of_the_text_alone(build):
    """Padding has no loss and no bytes; bos and eos have a loss and no bytes."""
    tokenizer = build()
    rows = [row(tokenizer, text, 16) for text in ("hello world", "a b c")]
    ids = np.array([x for x, _ in rows], dtype=np.int32)
    num_valid = np.array([x for _, x in rows], dtype=np.int32)
    padded = TokenRows(ids, num_valid)
    assert _tokens_per_byte(padded, tokenizer) == (13 + 7) / (11 + 5)
    full = TokenRows(ids[:1, :13])
    assert _tokens_per_byte(full, tokenizer) == 13 / 11


def test_letters_of_several_bytes_count_as_these():
    tokenizer = bytes_tokenizer()
    ids, _ = row(tokenizer, "é你", 7)
    assert _tokens_per_byte(TokenRows(np.array([ids])), tokenizer) == 7 / 5


def test_rows_without_text_have_no_ratio():
    tokenizer = bytes_tokenizer()
    ids = np.full((2, 4), tokenizer.eos_token_id)
    assert _tokens_per_byte(TokenRows(ids), tokenizer) is None


def test_a_tokenizer_without_bytes_of_its_own_has_none():
    assert _tokens_per_byte(TokenRows(np.zeros((2, 4), np.int32)), object()) is None
