"""Pixels as tokens: there and back, and what a run asks of the tokenizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from tiny import ALGORITHMS

from data.marks import tokenizer_mark
from data.pixels import PixelTokenizer, flipped, pixel_ids, side_of
from data.tokenizers import PIXELS, get_tokenizer, ids_of
from integral.__main__ import count_tokens


def images(num: int, side: int, seed: int) -> np.ndarray:
    shape = (num, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@given(num=st.integers(0, 4), side=st.integers(1, 9), seed=st.integers(0, 99))
def test_images_come_back(num, side, seed):
    """From ids of any type; the order is channel, row, column."""
    pictures, tokenizer = images(num, side, seed), PixelTokenizer()
    ids = pixel_ids(pictures)
    expected = pictures.transpose(0, 3, 1, 2)
    for some in (ids, ids.astype(np.int64), torch.from_numpy(ids.astype(np.int32))):
        decoded = tokenizer.batch_decode(some)
        assert decoded.dtype == torch.uint8
        assert np.array_equal(decoded.numpy(), expected)
    for row, picture in zip(ids, pictures, strict=True):
        assert np.array_equal(tokenizer.decode(row.tolist()).numpy(), picture)
        assert tokenizer.encode(picture).tolist() == row.tolist()
    assert np.array_equal(flipped(ids), pixel_ids(pictures[:, :, ::-1]))
    assert np.array_equal(flipped(flipped(ids)), ids)


@pytest.mark.parametrize("name", PIXELS)
def test_what_a_run_asks_of_it(compose, name):
    """K and mask of every process, the operator's K, a mark."""
    config = compose("data=images", f"data.tokenizer_name_or_path={name}")
    tokenizer = get_tokenizer(config)
    for algorithm in ALGORITHMS.values():
        expected = (256, None)
        if algorithm.has_mask or algorithm.is_autoregressive:
            expected = (257, 256)
        assert algorithm.vocabulary(tokenizer) == expected
    assert ids_of(tokenizer) == set(range(256))
    assert count_tokens(name) == 256
    assert tokenizer_mark(tokenizer) == tokenizer_mark(PixelTokenizer())


@pytest.mark.parametrize("wrong", [256, 257, -1, 1000])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_an_id_that_is_no_value_is_said(wrong, place):
    """It would be a value by accident in a byte."""
    ids = torch.zeros(3, 12, dtype=torch.long)
    ids[1, place] = wrong
    tokenizer = PixelTokenizer()
    refused(lambda: tokenizer.batch_decode(ids), "1 pixels in 1 of 3", str(wrong))
    refused(lambda: tokenizer.decode(ids[1]), str(wrong))
    assert tokenizer.decode(ids[0]).sum() == 0


@pytest.mark.parametrize("length", [0, 1, 3 * 15, 16, 3 * 16 + 1])
def test_other_lengths_are_no_images(length):
    refused(lambda: side_of(length), f"{length} tokens")
