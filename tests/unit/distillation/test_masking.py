"""Exact numbers of masks at ratios that follow a law."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distillation.masking import RATIO_LAWS, masked_count, masked_positions

MEANS = {"linear": 1 / 2, "square": 1 / 3, "cosine": 2 / math.pi, "arccos": 2 / math.pi}


@pytest.mark.parametrize("name", RATIO_LAWS)
def test_ratios_are_in_the_unit_interval(name):
    for dtype, bits in ((torch.float64, 53), (torch.float32, 24)):
        ends = [0, 2**-bits, 0.25, 0.5, 0.75, 1 - 2**-bits]
        ratio = RATIO_LAWS[name](torch.tensor(ends, dtype=dtype))
        assert ratio.dtype == dtype
        assert ((ratio >= 0) & (ratio <= 1)).all()


@pytest.mark.parametrize("name", MEANS)
def test_means_of_the_laws(name):
    ratio = RATIO_LAWS[name](torch.rand(200_000, dtype=torch.float64))
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert abs(float(ratio.mean()) - MEANS[name]) < 5 * error


def test_arccos_has_fewer_low_ratios_than_cosine():
    """With the same mean: P(r < x) is about pi x / 2 and 2 x / pi near 0."""
    u = (torch.arange(100_000) + 0.5).double() / 100_000
    shares = {
        name: (RATIO_LAWS[name](u) < 0.2).double().mean()
        for name in ("arccos", "cosine")
    }
    assert shares["arccos"] != shares["cosine"]
    thin, thick = sorted(shares.values())
    assert thin < 0.7 * thick


def test_mage_is_a_normal_law_cut_at_both_ends():
    u = (torch.arange(1000) + 0.5).double() / 1000
    ratio = RATIO_LAWS["mage"](u)
    normal = torch.distributions.Normal(0.55, 0.25)
    low, high = (normal.cdf(torch.tensor(x, dtype=torch.float64)) for x in (0.5, 1.0))
    torch.testing.assert_close((normal.cdf(ratio) - low) / (high - low), u)


@given(
    length=st.integers(1, 40),
    ratios=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    first=st.integers(0, 1),
    seed=st.integers(0, 100),
)
def test_counts_are_exact(length, ratios, first, seed):
    """max(1, round(L r)) of each row; none before the first."""
    generator = torch.Generator().manual_seed(seed)
    counts = masked_count(length, torch.tensor(ratios, dtype=torch.float64))
    assert counts.min() >= 1
    for count, ratio in zip(counts.tolist(), ratios, strict=True):
        assert count == max(1, round(length * ratio))
    u = torch.rand(len(ratios), length + first, generator=generator)
    where = masked_positions(u, counts[:, None], first)
    assert where.dtype == torch.bool
    assert torch.equal(where.sum(dim=-1), counts)
    assert not where[:, :first].any()


def test_every_position_is_as_likely():
    u = torch.rand(20_000, 6)
    share = masked_positions(u, torch.tensor(2)).double().mean(dim=0)
    assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / 20_000) ** 0.5
