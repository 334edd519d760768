"""The truncated discretised logistic head, beside the bin masses written out."""

import math

import pytest
import torch

from models.logistic import FLOOR, logistic_logits

K = 12


def masses(mu: float, log_scale: float) -> torch.Tensor:
    """Of a logistic distribution in each of K bins of [-1, 1], (K,)."""
    inverse_scale = math.exp(2 - log_scale)
    edges = torch.linspace(-1, 1, K + 1, dtype=torch.float64)
    cdf = torch.sigmoid((edges - mu) * inverse_scale)
    return cdf[1:] - cdf[:-1]


@pytest.mark.parametrize("mu", [-1.0, -0.3, 0.0, 0.77, 1.0])
@pytest.mark.parametrize("log_scale", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("fix_logistic", [False, True])
def test_logits_are_log_masses(mu, log_scale, fix_logistic):
    """Up to the floor of 1e-6 of the mass up to a bin."""
    hidden = torch.tensor([mu, log_scale], dtype=torch.float64)
    ours = logistic_logits(hidden, vocab_size=K, fix_logistic=fix_logistic)
    expected = masses(mu, log_scale)
    limit = FLOOR * (1 if fix_logistic else 1.01)
    assert (ours.exp() - expected).abs().max() <= limit


def test_the_floor_is_under_one_tail_or_none():
    """Far above mu the bins have log(1e-6) each, unless `fix_logistic` is set; far
    below they fall with the distribution."""
    hidden = torch.tensor([0.0, -1.0], dtype=torch.float64)
    plain, fixed = (
        logistic_logits(hidden, vocab_size=K, fix_logistic=fix) for fix in (False, True)
    )
    assert plain[-1] == pytest.approx(math.log(FLOOR), abs=0.1)
    assert plain[0] < -16
    assert fixed[-1] < -16
    torch.testing.assert_close(fixed, fixed.flip(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fix_logistic", [False, True])
def test_finite_with_finite_gradients_wherever(dtype, fix_logistic):
    mu = torch.linspace(-1, 1, 9, dtype=dtype)
    log_scale = torch.linspace(-8, 12, 9, dtype=dtype)
    hidden = torch.cartesian_prod(mu, log_scale).requires_grad_()
    logits = logistic_logits(hidden, vocab_size=K, fix_logistic=fix_logistic)
    assert logits.isfinite().all()
    logits.log_softmax(dim=-1)[:, 3].sum().backward()
    assert hidden.grad.isfinite().all()


def test_any_leading_shape():
    hidden = torch.rand(2, 5, 2)
    logits = logistic_logits(hidden, vocab_size=K, fix_logistic=False)
    assert logits.shape == (2, 5, K)
    row = logistic_logits(hidden[1, 3], vocab_size=K, fix_logistic=False)
    assert torch.equal(logits[1, 3], row)
