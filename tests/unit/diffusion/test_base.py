"""The skeleton of diffusion: conditioning, shapes, and what the loss is made of."""

import pytest
import torch

from diffusion.base import Diffusion
from sampling.prompts import Given


@pytest.fixture
def model(make_model, diffusion_name):
    return make_model(f"algo={diffusion_name}")


def test_forward_gives_an_output_for_each_token(model, generator):
    xt = torch.randint(7, (3, 8), generator=generator)
    output = model(xt, torch.rand(3, 1, generator=generator) + 0.1)
    assert output.shape == (3, 8, 7)
    assert output.dtype == torch.float32
    assert bool(output.isfinite().all())


def test_denoisers_give_distributions_over_clean_tokens(model, generator):
    """`denoised` is normalised for every parameterisation, scores included, and has
    no mass on the mask; also with levels (n,) as samplers give them."""
    logits = torch.randn(24, 7, dtype=torch.float64, generator=generator)
    xt = torch.full((24,), 6)
    sigma = torch.linspace(0.1, 3, 24, dtype=torch.float64)
    x_theta = model.denoised(logits, xt=xt, sigma=sigma).exp()
    torch.testing.assert_close(x_theta.sum(dim=-1), torch.ones(24).double())
    clean = range(7) if model.mask_index is None else range(6)
    expected = logits[:, clean].softmax(dim=-1)
    torch.testing.assert_close(x_theta[:, clean], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conditioning", [True, False])
def test_time_conditioning(make_model, diffusion_name, monkeypatch, conditioning):
    """sigma = -log(alpha_t), one number a sequence; zeros where it is off."""
    model = make_model(
        f"algo={diffusion_name}", f"algo.time_conditioning={conditioning}"
    )
    given = []
    trunk = model.backbone.trunk

    def spy(xt, condition, **others):
        given.append(condition)
        return trunk(xt, condition, **others)

    monkeypatch.setattr(model.backbone, "trunk", spy)
    alpha_t = torch.tensor([[0.25], [0.5]], dtype=torch.float64)
    model(torch.full((2, 8), 6), model.sigma(alpha_t))
    expected = -torch.log(alpha_t[:, 0]).float() if conditioning else torch.zeros(2)
    (condition,) = given
    torch.testing.assert_close(condition, expected)


def test_the_nelbo_is_time_corruption_denoiser_and_loss(model, generator):
    """`nll` step by step, by hand, from all logits at once; and its weighted sum."""
    x0 = torch.arange(32).view(4, 8) % 6
    t = model.sample_t(4, batch_idx=3)
    z = model.corrupt(x0, t, batch_idx=3)
    expected = model.nll_per_token(
        model(z.xt, model.sigma(z.alpha_t)),
        xt=z.xt,
        x0=x0,
        alpha_t=z.alpha_t,
        dalpha_t=z.dalpha_t,
    )
    if hasattr(model, "reconstruction_nll"):
        expected = expected + model.reconstruction_nll(x0).nll
    weights = torch.rand(4, 8, generator=generator)
    got = model.nll(x0, weights, batch_idx=3)
    assert got.nll.shape == (4, 8)
    assert got.nll.dtype == torch.float64
    assert (got.nll > 0).any()
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(got.nll, expected, **close)
    torch.testing.assert_close(got.total, (weights * expected).sum(), **close)
    unweighted = model.nll(x0, batch_idx=3)
    assert torch.equal(unweighted.nll, got.nll)
    torch.testing.assert_close(unweighted.total, expected.sum(), **close)


def test_the_loss_trains_every_parameter(model):
    """After the head is off zero; what feeds a switched-off condition aside."""
    batch = {"input_ids": torch.arange(32).view(4, 8) % 6}
    batch["attention_mask"] = torch.ones(4, 8)
    model.train()
    model.loss(batch).loss.backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_undecided_tokens(model):
    """Masks; of a uniform state all tokens."""
    got = model.undecided(torch.arange(7)[None])[0].tolist()
    assert got == [model.mask_index is None or i == 6 for i in range(7)]


@pytest.mark.parametrize("method", ["process_logits", "nll_per_token", "posterior"])
def test_every_model_overrides_what_the_skeleton_leaves_open(model, method):
    assert getattr(type(model), method) is not getattr(Diffusion, method)


def test_scores_at_masks(make_model, absorbing_name, laws, generator):
    """log p_t(y) / p_t(m) = log p(y) a / (1 - a) for every token y."""
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=analytic")
    p = torch.rand(4, 7, dtype=torch.float64, generator=generator)
    p[:, 6] = 0
    p /= p.sum(dim=-1, keepdim=True)
    alpha_t = torch.tensor([0.01, 0.2, 0.5, 0.999], dtype=torch.float64)
    score = model.log_score(
        laws.logits_for(model, p), alpha_t=alpha_t, sigma=model.sigma(alpha_t)
    ).exp()
    expected = p[:, :6] * (alpha_t / (1 - alpha_t))[:, None]
    torch.testing.assert_close(score[:, :6], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_with_bos(make_model, diffusion_name, ignore_bos):
    """A clean bos first where training never noises it, unless another is given."""
    model = make_model(f"algo={diffusion_name}", f"algo.ignore_bos={ignore_bos}")
    model.tokenizer.bos_token_id = 5
    tokens = torch.tensor([[3, 3, 3], [3, 3, 3]])
    known = torch.tensor([[True, False, True], [False, True, False]])
    before = tokens.clone(), known.clone()
    got = model.with_bos(Given(tokens, known))
    assert torch.equal(tokens, before[0])
    assert torch.equal(known, before[1])
    assert got.known[0].tolist() == [True, False, True]
    assert got.known[1].tolist() == [ignore_bos, True, False]
    xt = got.put(torch.zeros(2, 3, dtype=torch.long))
    assert xt.tolist() == [[3, 0, 3], [5 if ignore_bos else 0, 3, 0]]
