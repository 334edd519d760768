"""Laws of the likelihood metric, the sample entropy and the judge's token count."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metrics.judge import counted_tokens
from metrics.likelihood import Likelihood, unigram_nll
from metrics.samples import sample_entropy


@pytest.fixture
def sequences(generator):
    """400 sequences of unequal length whose loss is about 2 nats a token."""
    num_tokens = torch.randint(1, 60, (400,), generator=generator).double()
    noise = torch.randn(400, dtype=torch.float64, generator=generator)
    return 2 * num_tokens + 3 * noise * num_tokens.sqrt(), num_tokens


def measured(*batches):
    metric = Likelihood()
    for nlls, num_tokens in batches:
        metric.update(nlls, num_tokens)
    return {name: float(value) for name, value in metric.compute().items()}


def test_nll_bpd_and_ppl(sequences):
    nlls, num_tokens = sequences
    got = measured(sequences)
    nll = float(nlls.sum() / num_tokens.sum())
    assert got["nll"] == pytest.approx(nll)
    assert got["bpd"] == pytest.approx(nll / math.log(2))
    assert got["ppl"] == pytest.approx(math.exp(nll))
    assert got["bpd_stderr"] == pytest.approx(got["nll_stderr"] / math.log(2))
    assert got["ppl_stderr"] == pytest.approx(math.exp(nll) * got["nll_stderr"])


def test_standard_error_is_the_delta_methods(sequences):
    """se^2 = N / (N - 1) sum (x - nll n)^2 / (sum n)^2, from the definition."""
    nlls, num_tokens = sequences
    residual = nlls - nlls.sum() / num_tokens.sum() * num_tokens
    variance = 400 / 399 * residual.square().sum() / num_tokens.sum() ** 2
    assert measured(sequences)["nll_stderr"] == pytest.approx(float(variance.sqrt()))


def test_standard_error_is_the_bootstraps(sequences, generator):
    """4000 resamples of the sequences; their spread is known to 1.1 % (1 sigma)."""
    nlls, num_tokens = sequences
    index = torch.randint(400, (4000, 400), generator=generator)
    spread = (nlls[index].sum(dim=1) / num_tokens[index].sum(dim=1)).std()
    assert measured(sequences)["nll_stderr"] == pytest.approx(float(spread), rel=0.06)


def test_batches_and_ranks_do_not_matter(sequences):
    """Any split into batches, and the sum of two ranks' states, give one result."""
    nlls, num_tokens = sequences
    whole = measured(sequences)
    for size in (1, 7, 200):
        parts = zip(nlls.split(size), num_tokens.split(size), strict=True)
        assert measured(*parts) == pytest.approx(whole)
    ranks = [Likelihood(), Likelihood()]
    ranks[0].update(nlls[:150], num_tokens[:150])
    ranks[1].update(nlls[150:], num_tokens[150:])
    merged = Likelihood()
    for name, reduction in merged._reductions.items():
        states = torch.stack([getattr(rank, name) for rank in ranks])
        setattr(merged, name, reduction(states))
    merged._update_count = 2
    assert {k: float(v) for k, v in merged.compute().items()} == pytest.approx(whole)


def test_sums_are_in_float64():
    """Small losses on top of a big sum are all there; float32 would lose each."""
    metric = Likelihood()
    metric.update(torch.tensor([2.0**30]), torch.tensor([1.0]))
    for _ in range(100):
        metric.update(torch.full((1,), 2.0**-10), torch.tensor([0.0]))
    assert metric.nll_sum.dtype == torch.float64
    assert float(metric.nll_sum) == 2.0**30 + 100 * 2.0**-10


def test_reset_forgets(sequences):
    metric = Likelihood()
    metric.update(*sequences)
    metric.reset()
    metric.update(torch.tensor([3.0]), torch.tensor([2.0]))
    assert float(metric.compute()["nll"]) == 1.5


def test_one_sequence_has_no_standard_error():
    assert math.isnan(
        measured((torch.tensor([3.0]), torch.tensor([2.0])))["nll_stderr"]
    )


def test_equal_sequences_have_no_spread():
    got = measured((torch.full((5,), 6.0), torch.full((5,), 3.0)))
    assert got["nll"] == 2.0
    assert got["nll_stderr"] == 0.0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_sample_entropy_is_that_of_the_histogram(tokens):
    p = np.bincount(tokens) / len(tokens)
    expected = -sum(x * math.log(x) for x in p if x > 0)
    got = sample_entropy(torch.tensor([tokens, tokens[::-1]]))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([expected] * 2, abs=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_counted_tokens_stop_after_the_first_eos(tokens):
    """Tokens that are no eos all count, of the eos only the first."""
    eos, seen, expected = 0, False, []
    for token in tokens:
        expected.append(token != eos or not seen)
        seen = seen or token == eos
    assert counted_tokens(torch.tensor([tokens]), eos)[0].tolist() == expected


def counted(ids, vocab_size):
    return np.bincount(np.ravel(ids), minlength=vocab_size)


def test_unigram_is_add_one_smoothing():
    """Three 0s and one 1 seen, K = 4: p = 4/8, 2/8, 1/8, 1/8."""
    train, valid = np.array([[0, 0], [0, 1]]), np.array([0, 1, 3, 3])
    expected = -(math.log(4 / 8) + math.log(2 / 8) + 2 * math.log(1 / 8)) / 4
    assert unigram_nll(counted(train, 4), counted(valid, 4)) == pytest.approx(expected)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_unigram_is_above_the_entropy_of_its_own_data(tokens):
    """No smoothing beats the empirical distribution on the data it was counted on."""
    ids = np.array(tokens)
    p = np.bincount(ids) / len(ids)
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    counts = counted(ids, 7)
    assert unigram_nll(counts, counts) >= entropy - 1e-12
