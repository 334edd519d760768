"""The skeleton of diffusion: conditioning, shapes, and what the loss is made of."""

import pytest
import torch

from diffusion import Diffusion


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
    """predict_x0 is normalised for every parameterisation, scores included."""
    xt = torch.randint(7, (3, 8), generator=generator)
    alpha_t = torch.full((3, 1), 0.4, dtype=torch.float64)
    x_theta = model.predict_x0(xt, alpha_t).exp()
    torch.testing.assert_close(x_theta.sum(dim=-1), torch.ones(3, 8))


@pytest.mark.parametrize("conditioning", [True, False])
def test_time_conditioning(make_model, diffusion_name, monkeypatch, conditioning):
    """sigma = -log(alpha_t), one number a sequence; zeros where it is off."""
    model = make_model(
        f"algo={diffusion_name}", f"algo.time_conditioning={conditioning}"
    )
    given = []
    trunk = model.backbone.trunk

    def spy(xt, condition):
        given.append(condition)
        return trunk(xt, condition)

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


def test_greedy_tokens(model, laws):
    """The likeliest clean token; never the mask, and revealed ones stay."""
    x_theta = torch.tensor([0.1, 0.2, 0.1, 0.15, 0.05, 0.1, 0.3]).expand(1, 7, 7)
    got = model.most_likely_x0(x_theta, torch.arange(7)[None])[0].tolist()
    if model.mask_index is None:
        assert got == [6] * 7
    else:
        assert got == [0, 1, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("method", ["process_logits", "nll_per_token", "posterior"])
def test_every_model_overrides_what_the_skeleton_leaves_open(model, method):
    assert getattr(type(model), method) is not getattr(Diffusion, method)


def test_scores_of_revealed_tokens(make_model, absorbing_name):
    """log p_t(y) / p_t(x): 0 for y = x, log (1 - a) / a for the mask, else -inf."""
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=analytic")
    if model.config.algo.parameterization == "score":
        pytest.skip("the network gives the score")
    xt = torch.tensor([[2] * 8])
    log_score = model.log_score(xt, torch.tensor([[0.2]], dtype=torch.float64))[0, 0]
    assert log_score[2] == 0
    assert log_score[6].item() == pytest.approx(
        torch.tensor(4.0).log().item(), rel=1e-6
    )
    assert bool((log_score[[0, 1, 3, 4, 5]] <= -1e5).all())
