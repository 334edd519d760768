"""Laws of the posterior q(x_s | x_t, x_0), by enumeration over a small vocabulary."""

from itertools import product

import pytest
import torch

ALPHAS = [(0.2, 0.6), (0.001, 0.002), (0.95, 0.999), (0.4, 1.0), (0.999, 1.0)]


@pytest.fixture
def model(make_model, diffusion_name):
    return make_model(f"algo={diffusion_name}")


def column(value, batch):
    return torch.full((batch, 1), value, dtype=torch.float64)


def kernel(model, laws, alpha_ts):
    """Forward transition q(x_t | x_s), rows x_s, (K, K)."""
    every = torch.arange(model.vocab_size)
    return laws.marginal(model, every, alpha_ts)


def posterior(model, x_theta, xt, alpha_t, alpha_s):
    """`model.posterior` over flat lists, (N, K) and (N,) -> (N, K)."""
    N = len(xt)
    return model.posterior(
        x_theta[:, None],
        xt=xt[:, None],
        alpha_t=column(alpha_t, N),
        alpha_s=column(alpha_s, N),
    )[:, 0]


def possible_pairs(model, laws, alpha_t):
    """All (x_0, x_t) with q(x_t | x_0) > 0."""
    x0, xt = torch.cartesian_prod(
        laws.clean(model), torch.arange(model.vocab_size)
    ).unbind(-1)
    q_xt = laws.marginal(model, x0, alpha_t)
    possible = q_xt.gather(-1, xt[:, None])[:, 0] > 0
    return x0[possible], xt[possible]


def onehot(x, K):
    return torch.nn.functional.one_hot(x, K).double()


@pytest.mark.parametrize(("alpha_t", "alpha_s"), ALPHAS)
def test_rows_are_distributions(model, generator, alpha_t, alpha_s):
    """For any belief of the denoiser, mass on the mask included."""
    K = model.vocab_size
    logits = 5 * torch.randn(400, K, dtype=torch.float64, generator=generator)
    x_theta = logits.softmax(dim=-1)
    xt = torch.randint(K, (400,), generator=generator)
    before = x_theta.clone()
    q_xs = posterior(model, x_theta, xt, alpha_t, alpha_s)
    assert bool((q_xs >= 0).all())
    ones = torch.ones(400, dtype=torch.float64)
    torch.testing.assert_close(q_xs.sum(dim=-1), ones, rtol=0, atol=1e-12)
    assert torch.equal(x_theta, before)


@pytest.mark.parametrize(("alpha_t", "alpha_s"), ALPHAS)
def test_is_bayes_rule(model, laws, alpha_t, alpha_s):
    """q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0)."""
    x0, xt = possible_pairs(model, laws, alpha_t)
    likelihood = kernel(model, laws, alpha_t / alpha_s)[:, xt].T  # (N, K) over x_s
    joint = likelihood * laws.marginal(model, x0, alpha_s)
    expected = joint / joint.sum(dim=-1, keepdim=True)
    got = posterior(model, onehot(x0, model.vocab_size), xt, alpha_t, alpha_s)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("alpha_t", "alpha_s"), ALPHAS)
def test_forward_and_backward_agree(model, laws, alpha_t, alpha_s):
    """sum over x_t of q(x_t | x_0) q(x_s | x_t, x_0) = q(x_s | x_0)."""
    x0, xt = possible_pairs(model, laws, alpha_t)
    q_xs = posterior(model, onehot(x0, model.vocab_size), xt, alpha_t, alpha_s)
    q_xt = laws.marginal(model, x0, alpha_t).gather(-1, xt[:, None])
    total = torch.zeros(model.vocab_size, model.vocab_size, dtype=torch.float64)
    total.index_add_(0, x0, q_xt * q_xs)
    clean = laws.clean(model)
    expected = laws.marginal(model, clean, alpha_s)
    torch.testing.assert_close(total[clean], expected, rtol=0, atol=1e-12)


def test_two_steps_are_one(model, laws):
    """sum over x_s of q(x_s | x_t, x_0) q(x_r | x_s, x_0) = q(x_r | x_t, x_0)."""
    K = model.vocab_size
    alpha_t, alpha_s, alpha_r = 0.2, 0.5, 0.8
    x0, xt = possible_pairs(model, laws, alpha_t)
    x_theta = onehot(x0, K)
    first = posterior(model, x_theta, xt, alpha_t, alpha_s)
    both = torch.zeros_like(first)
    for xs in range(K):
        step = posterior(model, x_theta, torch.full_like(xt, xs), alpha_s, alpha_r)
        both += first[:, xs : xs + 1] * step
    whole = posterior(model, x_theta, xt, alpha_t, alpha_r)
    torch.testing.assert_close(both, whole, rtol=0, atol=1e-12)


def test_a_perfect_denoiser_ends_on_x0(model, laws):
    """With alpha_s = 1 all mass is on x_0, whatever x_t was."""
    x0, xt = possible_pairs(model, laws, 0.3)
    expected = onehot(x0, model.vocab_size)
    got = posterior(model, expected, xt, 0.3, 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_float32_beliefs_give_float32_posteriors(model, generator):
    K = model.vocab_size
    x_theta = torch.rand(2, 8, K, generator=generator).softmax(dim=-1)
    xt = torch.randint(K, (2, 8), generator=generator)
    q_xs = model.posterior(
        x_theta, xt=xt, alpha_t=column(0.2, 2), alpha_s=column(0.3, 2)
    )
    assert q_xs.dtype == torch.float32


def test_revealed_tokens_stay(make_model, absorbing_name, laws, generator):
    """A token once revealed is never drawn again, whatever the denoiser believes."""
    model = make_model(f"algo={absorbing_name}")
    K = model.vocab_size
    for xt, (alpha_t, alpha_s) in product(laws.clean(model), ALPHAS):
        x_theta = torch.rand(1, K, generator=generator).double().softmax(dim=-1)
        q_xs = posterior(model, x_theta, xt[None], alpha_t, alpha_s)
        assert torch.equal(q_xs, onehot(xt[None], K))
