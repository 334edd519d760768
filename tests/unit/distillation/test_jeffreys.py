"""The gradient of the generator, and the losses of the auxiliary model."""

import pytest
import torch

from distillation.jeffreys import (
    jeffreys_gradient,
    smoothed_cross_entropy,
    soft_loss,
    surrogate,
)

BETAS = [0.0, 1.0, 0.5, -0.2, 1.3]
K = 6


def logits(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, K, generator=generator, dtype=dtype)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def divergence(z_psi, log_phi, beta):
    log_psi = z_psi.log_softmax(dim=-1)
    return (1 - beta) * kl(log_phi, log_psi) + beta * kl(log_psi, log_phi)


def gradient(z_psi, z_phi, beta):
    return jeffreys_gradient(z_psi.log_softmax(-1), z_phi.log_softmax(-1), beta)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_that_of_the_divergence(beta):
    """By autograd, and by finite differences."""
    z_psi, z_phi = logits(0, 7).requires_grad_(), logits(1, 7)
    log_phi = z_phi.log_softmax(dim=-1)
    divergence(z_psi, log_phi, beta).sum().backward()
    g = gradient(z_psi.detach(), z_phi, beta)
    torch.testing.assert_close(g, z_psi.grad, rtol=1e-9, atol=1e-12)
    z, step = z_psi.detach(), 1e-5
    for k in range(K):
        shift = step * torch.eye(K, dtype=torch.float64)[k]
        ends = [divergence(z + s * shift, log_phi, beta) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(g[:, k], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_0_in_sum_and_between_equals(beta, dtype):
    z_psi, z_phi = logits(0, 20, dtype=dtype), logits(1, 20, dtype=dtype)
    g = gradient(z_psi, z_phi, beta)
    limit = 1e-5 if dtype == torch.float32 else 1e-14
    assert float(g.sum(dim=-1).abs().max()) < limit
    assert not gradient(z_psi, z_psi.clone(), beta).any()
    # Also with what the logits of a token have in common.
    assert float(gradient(z_psi, z_psi + 3, beta).abs().max()) < limit


def test_beta_mixes_both_ends():
    """Linear in beta, also beyond 0 and 1."""
    forward, reverse = (gradient(logits(0, 5), logits(1, 5), x) for x in (0.0, 1.0))
    for beta in BETAS:
        expected = (1 - beta) * forward + beta * reverse
        got = gradient(logits(0, 5), logits(1, 5), beta)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_peaked_distributions_stay_finite(beta):
    """Those of a teacher that is sure, of a model that is sure of something else."""
    sure = torch.zeros(2, K, dtype=torch.float32)
    sure[0, 0], sure[1, 1] = 300, 300
    for z_psi, z_phi in ((sure, sure.flip(0)), (sure, 0 * sure), (0 * sure, sure)):
        assert gradient(z_psi, z_phi, beta).isfinite().all()


# ---------------------------------------------------------------- the loss


def test_the_gradient_of_the_loss_is_g():
    """And its value and gradient are those of the squared difference."""
    z = logits(2, 5).requires_grad_()
    g = gradient(logits(0, 5), logits(1, 5), 0.5)
    loss = surrogate(z, g)
    loss.sum().backward()
    torch.testing.assert_close(z.grad, g, rtol=0, atol=0)
    other = z.detach().clone().requires_grad_()
    squared = 0.5 * (other - (other - g).detach()).square().sum(dim=-1)
    squared.sum().backward()
    torch.testing.assert_close(loss, squared, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(z.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_small_gradients_survive_large_logits():
    """In float32 the squared difference has none of them."""
    z = torch.full((1, K), 3e4, dtype=torch.float32).requires_grad_()
    g = torch.full((1, K), 1e-5)
    surrogate(z, g).sum().backward()
    assert torch.equal(z.grad, g)
    other = z.detach().clone().requires_grad_()
    (0.5 * (other - (other - g).detach()).square()).sum().backward()
    assert not other.grad.any()


# ---------------------------------------------------------------- the auxiliary model


def test_smoothing_is_towards_the_mean_over_classes():
    log_p, x = logits(0, 9).log_softmax(dim=-1), torch.arange(9) % K
    plain = smoothed_cross_entropy(log_p, x, 0.0)
    torch.testing.assert_close(plain, -log_p[torch.arange(9), x])
    expected = torch.nn.functional.cross_entropy(
        log_p, x, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(smoothed_cross_entropy(log_p, x, 0.1), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_soft_loss_is_a_divergence(temperature):
    z, target = logits(0, 9), logits(1, 9).requires_grad_()
    loss = soft_loss(z.requires_grad_(), target, temperature)
    p, q = ((x / temperature).log_softmax(dim=-1) for x in (target, z))
    torch.testing.assert_close(loss, temperature**2 * kl(p, q))
    assert (loss > 0).all()
    assert soft_loss(z, z, temperature).detach().abs().max() < 1e-12
    loss.sum().backward()
    assert target.grad is None
