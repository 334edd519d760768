"""The n-gram judge: against the definition, written as a loop."""

import math
from collections import Counter

import numpy as np
import pytest
from refusals import refused

from metrics.ngrams import NGramModel, largest_order


def by_definition(train, order, K, row, i):
    """p of token i of a row, by Witten and Bell's recursion."""
    p = 1 / K
    for n in range(1, order + 1):
        if i + 1 < n:
            break
        history, token = tuple(row[i + 1 - n : i]), row[i]
        follows = Counter(
            text[j + n - 1]
            for text in train.tolist()
            for j in range(len(text) - n + 1)
            if tuple(text[j : j + n - 1]) == history
        )
        if follows:
            total, kinds = follows.total(), len(follows)
            p = (follows[token] + kinds * p) / (total + kinds)
    return p


@pytest.mark.parametrize("order", [1, 2, 4])
def test_recursion(order):
    rng = np.random.default_rng(0)
    train, rows = rng.integers(5, size=(6, 9)), rng.integers(5, size=(3, 7))
    nll = NGramModel(train, order, 5).nll(rows)
    for row, values in zip(rows.tolist(), nll, strict=True):
        expected = [by_definition(train, order, 5, row, i) for i in range(7)]
        np.testing.assert_allclose(np.exp(-values), expected, rtol=1e-12)


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(1)
    model = NGramModel(rng.integers(6, size=(20, 8)), 3, 6)
    for history in ([0, 1], [5, 5], [3, 2]):
        rows = np.array([[*history, y] for y in range(6)])
        assert np.exp(-model.nll(rows)[:, -1]).sum() == pytest.approx(1)


def test_own_text_is_likelier_than_noise():
    text = np.arange(40).reshape(4, 10) % 7
    model = NGramModel(text, 3, 7)
    noise = np.random.default_rng(2).integers(7, size=(4, 10))
    assert model.nll(text).mean() < 0.7 * model.nll(noise).mean()


def test_rows_do_not_follow_from_each_other():
    """The last token of a row is no history of the next row's first."""
    model = NGramModel(np.array([[0, 1], [2, 3]]), 2, 4)
    after_one = NGramModel(np.array([[0, 1, 2, 3]]), 2, 4)
    rows = np.array([[1, 2]])
    assert model.nll(rows)[0, 1] > after_one.nll(rows)[0, 1]


def test_rows_shorter_than_the_order():
    nll = NGramModel(np.array([[0, 1, 0]]), 3, 2).nll(np.array([[1]]))
    assert nll[0, 0] == pytest.approx(-math.log((1 + 2 * 0.5) / (3 + 2)))


def test_orders_that_are_no_numbers_are_refused():
    rows = np.zeros((1, 4), dtype=np.int64)
    for order in (0, largest_order(50258) + 1):
        refused(lambda n=order: NGramModel(rows, n, 50258), f"eval.ngram_order={order}")
    assert NGramModel(rows, largest_order(50258), 50258).nll(rows).shape == (1, 4)
