"""Held-out text under the measures of samples."""

import math

import numpy as np
import pytest

from data.rows import TokenRows
from evaluation.held_out import MOST, held_out
from metrics.ngrams import NGramModel


def test_entropy_is_that_of_each_rows_own_tokens():
    """0 for one token, log 2 for two of each, in nats."""
    found = held_out(TokenRows(np.array([[1, 1, 1, 1], [0, 1, 0, 1]])), None)
    assert found["rows"] == 2
    assert found["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["entropy_stderr"] == pytest.approx(math.log(2) / 2)
    assert found["ngram_ppl"] is None


def test_the_judge_is_that_of_samples():
    ids = np.random.default_rng(0).integers(0, 4, (8, 16))
    judge = NGramModel(ids, 2, 4)
    found = held_out(TokenRows(ids), judge)
    nll = judge.nll(ids).mean(axis=1)
    assert found["ngram_ppl"] == pytest.approx(math.exp(nll.mean()))
    error = math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(8)
    assert found["ngram_ppl_stderr"] == pytest.approx(error)


def test_rows_with_padding_are_left_out():
    ids = np.array([[1, 2, 3, 4], [1, 0, 0, 0], [1, 1, 1, 1]])
    found = held_out(TokenRows(ids, num_valid=np.array([4, 1, 4])), None)
    assert found["rows"] == 2
    assert found["entropy"] == pytest.approx(math.log(4) / 2)


def test_rows_of_padding_alone_say_nothing():
    found = held_out(TokenRows(np.zeros((3, 4), int), np.array([1, 2, 3])), None)
    assert found["rows"] == 0
    assert found["entropy"] is None


def test_one_row_has_no_error():
    found = held_out(TokenRows(np.array([[1, 2, 3, 4]])), None)
    assert found["entropy"] == pytest.approx(math.log(4))
    assert found["entropy_stderr"] is None


def test_many_rows_are_thinned_evenly():
    """The first half of one token, the second of two."""
    ids = np.zeros((3 * MOST, 2), int)
    ids[len(ids) // 2 :, 1] = 1
    found = held_out(TokenRows(ids), None)
    assert found["rows"] == MOST
    assert found["entropy"] == pytest.approx(math.log(2) / 2, rel=1e-3)
