"""Losses in float32: finite, with finite gradients, and close to float64, from the
first time that training draws to the last.
"""

import pytest
import torch

from models.head import Loss, TokenNLL

TIMES = (1e-3, 3e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0)


@pytest.fixture
def model(make_model, stub_tokenizer, diffusion_name):
    """K = 50 here: more entries to sum than the tiny vocabulary has."""
    return make_model(f"algo={diffusion_name}", tokenizer=stub_tokenizer(49, 1))


def loss_and_gradient(model, logits, x0, xt, z):
    logits = logits.clone().requires_grad_()
    output = model.process_logits(logits, xt=xt, sigma=model.sigma(z.alpha_t))
    nll = model.nll_per_token(
        output, xt=xt, x0=x0, alpha_t=z.alpha_t, dalpha_t=z.dalpha_t
    )
    nll.sum().backward()
    return nll.detach(), logits.grad


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 8.0])
def test_float32_logits_are_enough(model, laws, generator, t, sharpness):
    """Relative error of each loss below 1e-4, and below 1e-5 of the typical loss."""
    x0 = torch.randint(49, (64, 8), generator=generator)
    z = model.corrupt(x0, torch.full((64,), t, dtype=torch.float64))
    xt = model.q_xt(x0, z.alpha_t, generator)
    xt[:, :2] = model.q_xt(x0[:, :2], torch.zeros(1, 1), generator)  # surely noisy
    logits = sharpness * torch.randn(64, 8, model.vocab_size, generator=generator)
    exact, exact_gradient = loss_and_gradient(model, logits.double(), x0, xt, z)
    got, gradient = loss_and_gradient(model, logits, x0, xt, z)
    assert bool(got.isfinite().all())
    assert bool(gradient.isfinite().all())
    typical = float(exact.abs().mean())
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * typical)
    scale = float(exact_gradient.abs().max())
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=1e-3, atol=1e-4 * scale
    )


@pytest.mark.parametrize("t", TIMES)
def test_extreme_logits_stay_finite(model, generator, t):
    """A network that is wildly sure, rightly or wrongly, gives a finite loss."""
    x0 = torch.randint(49, (16, 8), generator=generator)
    z = model.corrupt(x0, torch.full((16,), t, dtype=torch.float64))
    xt = model.q_xt(x0, z.alpha_t, generator)
    for sign in (1, -1):
        logits = torch.zeros(16, 8, model.vocab_size)
        logits.scatter_(-1, x0[..., None], sign * 60.0)
        nll, gradient = loss_and_gradient(model, logits, x0, xt, z)
        assert bool(nll.isfinite().all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("precision", ["bf16", "float32", "float64"])
def test_loss_precision_is_the_type_of_the_logits(make_model, algo_name, precision):
    """Under bf16 autocast: half-precision logits, float32 logits, and cast to float64.

    The loss itself is never in half precision.
    """
    model = make_model(f"algo={algo_name}", f"training.loss_precision={precision}")
    hidden = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits_for_loss(hidden)
        total, nll = model.nll(torch.full((2, 8), 3))
    expected = torch.float64 if precision == "float64" else torch.float32
    assert logits.dtype == expected
    for x in (total, nll):
        assert x.dtype in (torch.float32, torch.float64)
    assert bool(nll.isfinite().all())
    plain = hidden @ model.backbone.output_layer.linear.weight.T
    plain = plain + model.backbone.output_layer.linear.bias
    error = ((logits - plain).abs().max() / plain.abs().max()).item()
    if precision == "bf16":
        assert 1e-4 < error < 2e-2
    else:
        assert error < 1e-6


# ---------------------------------------------------------------- reduction


def reduce(nll, valid):
    """`Loss.reduce` of given losses, weighted as `TrainerBase.loss` does it."""
    return Loss.reduce(TokenNLL((Loss.weights(valid) * nll).sum(), nll), valid)


def test_reduce_against_a_loop(generator):
    """Sums over each sequence's valid tokens, and the mean over all of them."""
    nll = torch.rand(5, 8, generator=generator, dtype=torch.float64)
    valid = (torch.rand(5, 8, generator=generator) < 0.5).float()
    valid[2] = 0
    got = reduce(nll, valid)
    sums = [
        sum(x for x, v in zip(*row, strict=True) if v)
        for row in zip(nll.tolist(), valid.tolist(), strict=True)
    ]
    assert got.nlls.tolist() == pytest.approx(sums)
    assert got.num_tokens.tolist() == valid.sum(dim=1).tolist()
    assert float(got.loss) == pytest.approx(sum(sums) / float(valid.sum()))


def test_a_batch_without_valid_tokens_has_no_loss():
    losses = reduce(torch.ones(2, 3), torch.zeros(2, 3))
    assert float(losses.loss) == 0.0
    assert losses.nlls.tolist() == losses.num_tokens.tolist() == [0, 0]


def test_padding_does_not_matter(generator):
    nll = torch.rand(3, 4, generator=generator)
    valid = torch.tensor([[1, 1, 0, 0]] * 3)
    other = nll.clone()
    other[:, 2:] = 1e6
    assert all(map(torch.equal, reduce(nll, valid), reduce(other, valid)))
