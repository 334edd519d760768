"""Draws from categorical distributions, truncation and guidance, against their
definitions. Frequencies follow the probabilities in `test_sampler_laws`, too.
"""

import pytest
import torch

from sampling import categorical
from sampling.categorical import exponential_race, inverse_cdf, nucleus
from sampling.guidance import guided_posterior

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def with_uniforms(monkeypatch, value):
    """Makes every uniform the same number, or of the same tensor."""

    def uniform(like, generator):
        u = torch.as_tensor(value, dtype=like.dtype)
        return u.expand(like.shape).clone()

    monkeypatch.setattr(categorical, "_uniform", uniform)


# ---------------------------------------------------------------- inverse_cdf


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1e-6, 37.5])
def test_inverse_cdf_inverts_the_cdf(monkeypatch, dtype, scale):
    """The first token whose cumulative mass exceeds u times the total."""
    probs = scale * torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0], dtype=dtype)
    for u, token in (
        (0.0, 1),
        (0.24, 1),
        (0.26, 2),
        (0.74, 2),
        (0.76, 4),
        (1 - 2**-20, 4),
    ):
        with_uniforms(monkeypatch, u)
        assert inverse_cdf(probs.expand(3, 6), None).tolist() == [token] * 3


@DTYPES
def test_inverse_cdf_never_draws_what_has_no_probability(monkeypatch, dtype):
    """Not first, between or last, and not at the ends of the range of u: 0, and the
    largest number below 1 that torch.rand gives. Totals of many magnitudes."""
    K = 9
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(4000, K, dtype=torch.float64, generator=generator)
    probs *= torch.rand(4000, K, generator=generator) < 0.3
    probs[:K] += torch.eye(K)  # all mass on one token
    probs = probs[probs.sum(dim=-1) > 0]
    probs = probs * 10 ** (20 * torch.rand(len(probs), 1, generator=generator) - 10)
    probs = probs.to(dtype)
    assert (probs[:, 0] == 0).any()
    assert (probs[:, -1] == 0).any()
    largest = 1 - 2.0**-53 if dtype == torch.float64 else 1 - 2.0**-24
    for u in (0.0, largest):
        with_uniforms(monkeypatch, u)
        drawn = inverse_cdf(probs, None)
        assert int(drawn.max()) < K
        assert bool((probs.gather(-1, drawn[:, None]) > 0).all())
        possible = (probs > 0).long()
        first, last = possible.argmax(dim=-1), K - 1 - possible.flip(-1).argmax(dim=-1)
        assert torch.equal(drawn, first if u == 0 else last)


def test_inverse_cdf_draws_its_uniforms_in_the_type_of_the_rows(monkeypatch):
    """One per row; a float32 uniform has too few values for rare tokens."""
    seen, rand = [], torch.rand

    def spy(*args, **kwargs):
        seen.append((*args, kwargs["dtype"]))
        return rand(*args, **kwargs)

    monkeypatch.setattr(torch, "rand", spy)
    for dtype in (torch.float32, torch.float64):
        inverse_cdf(torch.ones(2, 3, 5, dtype=dtype), torch.Generator())
        assert seen.pop() == ((2, 3, 1), dtype)


@pytest.mark.parametrize("draw", [inverse_cdf, exponential_race])
def test_rows_are_independent(draw):
    """Of each other, and with shapes of any length; one token of 5 by chance 1/5."""
    probs = torch.ones(2000, 2, 5, dtype=torch.float64)
    x = draw(probs, torch.Generator().manual_seed(0))
    counts = (5 * x[:, 0] + x[:, 1]).bincount(minlength=25).double()
    assert float((counts - 80).abs().max()) < 5 * 80**0.5
    assert draw(probs[0, 0], torch.Generator().manual_seed(0)).shape == ()


def test_a_rare_token_is_drawn_in_float64_as_often_as_it_should_be(monkeypatch):
    """Of probability 1e-12, in the u that belong to it."""
    probs = torch.tensor([0.5, 1e-12, 0.5 - 1e-12], dtype=torch.float64)
    for u, token in ((0.5 - 1e-13, 0), (0.5 + 5e-13, 1), (0.5 + 1.1e-12, 2)):
        with_uniforms(monkeypatch, u)
        assert int(inverse_cdf(probs, None)) == token


# ---------------------------------------------------------------- exponential_race


def test_exponential_race_is_won_by_the_largest_ratio(monkeypatch):
    """argmax p / E with E = -log u, and a token without probability never wins."""
    probs = torch.tensor([[0.2, 0.7, 0.0, 0.1]] * 3, dtype=torch.float64)
    u = torch.tensor(
        [[0.5, 0.5, 1 - 1e-9, 0.5], [0.9, 0.5, 0.5, 0.5], [0.1, 0.01, 0.9, 0.99]],
        dtype=torch.float64,
    )
    with_uniforms(monkeypatch, u)
    expected = (probs / -u.log()).argmax(dim=-1)
    assert exponential_race(probs, None).tolist() == expected.tolist() == [1, 0, 3]


@DTYPES
def test_exponential_race_at_the_ends_of_the_uniforms(monkeypatch, dtype):
    """Neither u = 0 nor the largest u gives NaN or an impossible token."""
    probs = torch.tensor([0.0, 0.3, 0.7, 0.0], dtype=dtype)
    largest = 1 - 2.0**-53 if dtype == torch.float64 else 1 - 2.0**-24
    for u in (0.0, largest):
        with_uniforms(monkeypatch, u)
        assert int(exponential_race(probs, None)) == 2


def test_exponential_race_draws_noise_for_every_token(monkeypatch):
    """In the type of the rows: float32 is what makes rare tokens rarer."""
    seen, uniform = [], categorical._uniform

    def spy(like, generator):
        seen.append((tuple(like.shape), like.dtype))
        return uniform(like, generator)

    monkeypatch.setattr(categorical, "_uniform", spy)
    exponential_race(torch.ones(2, 5), torch.Generator())
    assert seen == [((2, 5), torch.float32)]


# ---------------------------------------------------------------- nucleus


def plain_nucleus(probs, top_p):
    """Sort, keep what has at most top_p before it, normalise."""
    values, order = probs.sort(dim=-1, descending=True)
    keep = values.cumsum(dim=-1) - values <= top_p
    values = values * keep
    values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, values)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("wide_too", [True, False])
def test_nucleus_of_rows_wider_than_the_candidates(
    monkeypatch, generator, top_p, wide_too
):
    """Sharp rows need the candidates only, flat ones the whole sort; in one batch."""
    monkeypatch.setattr(categorical, "NUCLEUS_CANDIDATES", 8)
    logits = torch.randn(40, 3, 50, dtype=torch.float64, generator=generator)
    logits *= torch.linspace(0.1 if wide_too else 50, 50, 40)[:, None, None]
    probs = logits.softmax(dim=-1)
    top = probs.topk(8, dim=-1).values.sum(dim=-1)
    is_wide = top <= top_p
    if top_p >= 0.3:
        assert bool(is_wide.any()) is wide_too
        assert not is_wide.all()
    before = probs.clone()
    got = nucleus(probs, top_p)
    assert torch.equal(probs, before)
    torch.testing.assert_close(got, plain_nucleus(probs, top_p), rtol=1e-12, atol=0)


def test_nucleus_of_a_large_vocabulary(generator):
    """With the real number of candidates, on both sides of it."""
    K = 4 * categorical.NUCLEUS_CANDIDATES
    logits = torch.randn(4, K, dtype=torch.float64, generator=generator)
    probs = (logits * torch.tensor([0.0, 0.5, 3, 20])[:, None]).softmax(dim=-1)
    got = nucleus(probs, 0.9)
    kept = (got > 0).sum(dim=-1).tolist()
    assert kept[1] > categorical.NUCLEUS_CANDIDATES > kept[2]
    assert kept[0] == pytest.approx(0.9 * K, abs=2)
    expected = plain_nucleus(probs, 0.9)
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-9, atol=0)


def test_nucleus_of_one_returns_its_rows():
    probs = torch.rand(3, 4)
    assert nucleus(probs, 1.0) is probs


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize("weight", [-0.5, 0.5, 2.0, 3.5])
def test_guidance_is_the_softmax_of_the_weighted_logs(generator, weight):
    """softmax(w log a + (1 - w) log b)."""
    a, b = torch.randn(2, 5, 3, 7, dtype=torch.float64, generator=generator).softmax(-1)
    expected = a**weight * b ** (1 - weight)
    expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(guided_posterior(a, b, weight), expected)


def test_guidance_of_weight_none_zero_and_one():
    """One of the two, untouched, zeros and all."""
    a = torch.tensor([[0.0, 0.4, 0.6]], dtype=torch.float64)
    b = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert torch.equal(guided_posterior(a, b, None), b)
    assert torch.equal(guided_posterior(a, b, 0), b)
    assert torch.equal(guided_posterior(a, b, 0.0), b)
    assert torch.equal(guided_posterior(a, b, 1), a)


@pytest.mark.parametrize("weight", [0.5, 2.0, -1.0])
def test_guidance_excludes_what_either_excludes(weight):
    """A negative exponent of 0 must not make a token certain."""
    a = torch.tensor([[0.0, 0.2, 0.5, 0.3]], dtype=torch.float64)
    b = torch.tensor([[0.3, 0.0, 0.4, 0.3]], dtype=torch.float64)
    got = guided_posterior(a, b, weight)[0]
    assert got[:2].tolist() == [0, 0]
    expected = a[0, 2:] ** weight * b[0, 2:] ** (1 - weight)
    torch.testing.assert_close(got[2:], expected / expected.sum())


def test_guidance_without_a_common_token_is_finite():
    a, b = torch.eye(3, dtype=torch.float64)[:2, None]
    got = guided_posterior(a, b, 2.0)
    assert bool(got.isfinite().all())
    assert float(got.sum()) == pytest.approx(1)
