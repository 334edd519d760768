"""The negative ELBO integrated over all times and noisy sequences, by enumeration.

With the exact denoiser of a known distribution pi the bound is tight: its mean over
x_0 ~ pi is the entropy of pi. Whatever the denoiser believes, the bound is one.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import nearly_whole

from models.noise import SCHEDULES
from utils import ConfigError


@pytest.fixture
def model(make_model, diffusion_name, schedule_name):
    """Every objective under every schedule it is defined for; T = 200 if discrete."""
    overrides = [f"algo={diffusion_name}", f"noise={schedule_name}"]
    overrides += nearly_whole(schedule_name)
    try:
        model = make_model(*overrides)
        return model if model.T == 0 else make_model(*overrides, "algo.T=200")
    except ConfigError:
        pytest.skip(f"{diffusion_name} is not defined for {schedule_name}")


def levels(model):
    """Quadrature over t: nodes' alpha_t, dalpha_t, (n, 1), and weights, (n,).

    The grid of a discrete-time model; else 48 Gauss nodes in t^(1/3), because the
    integrand may have a logarithm at 0.
    """
    if model.T > 0:
        t = torch.arange(1, model.T + 1).double() / model.T
        weights = torch.full_like(t, 1 / model.T)
    else:
        u, w = torch.from_numpy(_gauss(48)).unbind()
        t, weights = u**3, 3 * u**2 * w
    z = model.corrupt(torch.zeros(len(t), 1, dtype=torch.long), t)
    return z.alpha_t, z.dalpha_t, weights


def _gauss(n):
    import numpy as np

    u, w = np.polynomial.legendre.leggauss(n)
    return np.stack([(u + 1) / 2, w / 2])


def expected_loss(model, laws, x0, weight_x0, denoiser):
    """sum over x_0, x_t and integral over t of the loss, nats per sequence.

    Args:
        x0: Clean sequences, (N, L).
        weight_x0: Weight of each, (N,).
        denoiser: (xt (M, L), alpha_t (1, 1)) -> probabilities (M, L, K).
    """
    K, L = model.vocab_size, x0.shape[1]
    every_xt = torch.cartesian_prod(*[torch.arange(K)] * L).view(-1, L)
    pairs = torch.cartesian_prod(torch.arange(len(x0)), torch.arange(len(every_xt)))
    clean, noisy = x0[pairs[:, 0]], every_xt[pairs[:, 1]]
    total = 0.0
    for alpha_t, dalpha_t, weight in zip(*levels(model), strict=True):
        column = alpha_t[None].expand(len(pairs), 1)
        x_theta = denoiser(every_xt, alpha_t[None])[pairs[:, 1]]
        output = laws.output_for(model, x_theta, noisy, column)
        nll = model.nll_per_token(
            output, xt=noisy, x0=clean, alpha_t=column, dalpha_t=dalpha_t[None]
        )
        q_xt = laws.marginal(model, clean, column).gather(-1, noisy[..., None])
        probability = weight_x0[pairs[:, 0]] * q_xt[..., 0].prod(dim=-1)
        possible = probability > 0
        losses = nll.sum(dim=-1)[possible]
        total += float(weight * (probability[possible] * losses).sum())
    return total


def test_the_bound_is_tight_for_the_exact_denoiser(model, laws, generator):
    """Two dependent tokens: the mean NELBO is their entropy.

    Exact is the belief about x_0 at a position given x_t at the other one. That is
    p(x_0 | x_t) at a mask, and the optimum of the uniform state's parameterisation,
    whose posterior brings in the position's own x_t.
    """
    K = model.vocab_size
    clean = laws.clean(model)
    x0 = torch.cartesian_prod(clean, clean)
    pi = torch.randn(len(x0), dtype=torch.float64, generator=generator)
    pi = (2 * pi).softmax(dim=0)
    onehot = F.one_hot(x0, K).double()  # (N, 2, K)

    def denoiser(xt, alpha_t):
        q = laws.marginal(model, x0, alpha_t)  # (N, 2, K)
        beliefs = []
        for position, other in ((0, 1), (1, 0)):
            joint = pi * q[:, other, xt[:, other]].T  # (M, N)
            joint = joint / joint.sum(dim=-1, keepdim=True)
            beliefs.append(joint @ onehot[:, position])
        x_theta = torch.stack(beliefs, dim=1)  # (M, 2, K)
        if model.mask_index is None:
            return x_theta
        revealed = (xt != model.mask_index)[..., None]
        return torch.where(revealed, F.one_hot(xt, K).double(), x_theta)

    entropy = float(-(pi * pi.log()).sum())
    bound = expected_loss(model, laws, x0, pi, denoiser)
    tolerance = 5e-4 if model.T == 0 else 2e-2  # O(1 / T) above the entropy
    assert bound == pytest.approx(entropy, rel=tolerance)


def test_masked_bound_with_a_fixed_belief(make_model, absorbing_name, laws, generator):
    """One token, p not depending on time: (alpha_0 - alpha_1) (-log p(x_0))."""
    for noise in SCHEDULES:
        settings = (f"noise={noise}", *nearly_whole(noise))
        try:
            model = make_model(f"algo={absorbing_name}", *settings)
        except ConfigError:
            assert (absorbing_name, noise) != ("d3pm", "log-linear")
            assert absorbing_name == "d3pm"
            continue
        p = torch.rand(model.vocab_size, dtype=torch.float64, generator=generator)
        p[model.mask_index] = 0
        p = p / p.sum()

        def denoiser(xt, alpha_t, p=p, model=model):
            revealed = F.one_hot(xt, model.vocab_size).double()
            return torch.where((xt == model.mask_index)[..., None], p, revealed)

        for x0 in laws.clean(model):
            one = torch.ones(1, dtype=torch.float64)
            bound = expected_loss(model, laws, x0.view(1, 1), one, denoiser)
            assert bound == pytest.approx(-math.log(p[x0]), rel=1e-4)


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_mdlm_in_discrete_time_telescopes(make_model, laws, T):
    """With T > 0 the sum over the grid is (alpha_0 - alpha_1) (-log p) for any T."""
    model = make_model("algo=mdlm", f"algo.T={T}")
    alpha_t, dalpha_t, weights = levels(model)
    xt = torch.full((len(alpha_t), 1), model.mask_index)
    output = torch.full((len(alpha_t), 1, model.vocab_size), 0.25).double().log()
    nll = model.nll_per_token(
        output, xt=xt, x0=torch.zeros_like(xt), alpha_t=alpha_t, dalpha_t=dalpha_t
    )
    bound = float((weights[:, None] * (1 - alpha_t) * nll).sum())
    assert bound == pytest.approx((1 - 1e-3) * math.log(4), rel=1e-9)


def test_uniform_bound_covers_the_likelihood(
    make_model, uniform_name, schedule_name, laws, generator
):
    """One token, any fixed p: at least -log of what the ancestral chain generates.

    The chain's p(x_0) comes from 2000 steps of matrix products with `posterior`.
    """
    settings = nearly_whole(schedule_name)
    model = make_model(f"algo={uniform_name}", f"noise={schedule_name}", *settings)
    K = model.vocab_size
    p = (2 * torch.randn(K, dtype=torch.float64, generator=generator)).softmax(dim=0)
    alpha = model.noise(torch.linspace(1, 0, 2001, dtype=torch.float64)).alpha_t
    alpha_t, alpha_s = alpha[:-1, None], alpha[1:, None]
    every = torch.arange(K).expand(2000, K)
    steps = model.posterior(
        p.expand(2000, K, K), xt=every, alpha_t=alpha_t, alpha_s=alpha_s
    )
    chain = torch.full((K,), 1 / K, dtype=torch.float64)
    for step in steps:
        chain = chain @ step
    one = torch.ones(1, dtype=torch.float64)
    for x0 in range(K):
        bound = expected_loss(
            model, laws, torch.tensor([[x0]]), one, lambda xt, a: p.expand(K, 1, K)
        )
        assert bound > -math.log(chain[x0]) - 1e-3
