"""The three ways to estimate the bound of masked diffusion have one mean; with T > 0
the bound tends to that of continuous time.

The toy is enumerable: a belief about clean tokens that depends on which others are
masked, and on what the network is told of the noise where it is told.
"""

import itertools
import math

import pytest
import torch
from tiny import nearly_whole

from diffusion.estimators import ESTIMATORS
from models.head import Head
from models.noise import SCHEDULES
from utils import ConfigError

TIMED = sorted(name for name, x in SCHEDULES.items() if x.has_log_uniform)
WAYS = {"plain": (), **{key: (f"training.{key}=True",) for key in ESTIMATORS}}
L = 3
X0 = torch.tensor([2, 0, 4])


def mdlm(make_model, noise, *settings):
    own = ("algo=mdlm", f"noise={noise}", f"model.length={L}", *settings)
    return make_model(*own, "training.loss_precision=float64")


@pytest.fixture(params=list(itertools.product(TIMED, WAYS)), ids="-".join)
def way(request):
    return request.param


def toy_table(model):
    shape, generator = (L + 1, model.vocab_size), torch.Generator().manual_seed(3)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def toy_logits(model, table=None):
    """Logits by how many tokens are masked and, where the network is told it, by t."""
    table = toy_table(model) if table is None else table

    def logits(xt, sigma, labels=None):
        masked = (xt == model.mask_index).sum(dim=-1)
        told = model.condition(sigma).double()[:, None, None]
        rows = table[masked][:, None].expand(-1, L, -1)
        return rows * (1 + torch.tanh(told))

    return logits


def exact_bound(model, logits, x0, num_nodes=400):
    """The integral over all times of the mean over all masks, nats, in the order of
    time of the model's estimator."""
    t, weights = nodes(model, num_nodes)
    levels = model.levels(t[:, None])
    total = torch.zeros((), dtype=torch.float64)
    for is_masked in itertools.product((False, True), repeat=L):
        where = torch.tensor(is_masked)
        xt = torch.where(where, model.mask_index, x0).expand(len(t), L)
        sigma = model.sigma(levels.alpha_t)
        nll = model.nll_per_token(
            model.process_logits(logits(xt, sigma), xt=xt, sigma=sigma),
            xt=xt,
            x0=x0.expand(len(t), L),
            alpha_t=levels.alpha_t,
            dalpha_t=levels.dalpha_t,
        )
        clean = levels.alpha_t[:, 0]
        k = int(where.sum())
        probability = (1 - clean) ** k * clean ** (L - k)
        total += (weights * probability * nll.sum(dim=-1)).sum()
    return total


def nodes(model, number):
    """Midpoints of equal parts of [sampling_eps, 1), and their weights."""
    eps = model.sampling_eps
    u = (torch.arange(number).double() + 0.5) / number
    return eps + (1 - eps) * u, torch.full_like(u, 1 / number)


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("noise", TIMED)
def test_their_means_are_one_number(make_model, noise, is_told):
    """By quadrature: (f_1 - f_0) E = int w E dt; and so are the gradients of the mean.

    After a change of variables a network that is told the time is another function.
    """
    found, gradients = [], []
    for name, settings in WAYS.items():
        if is_told and name == "change_of_variables":
            continue
        own = (*nearly_whole(noise), "training.sampling_eps=1e-9")
        model = mdlm(make_model, noise, *own, *settings)
        model.time_conditioning = is_told
        table = toy_table(model).requires_grad_()
        bound = exact_bound(model, toy_logits(model, table), X0, 5000)
        (gradient,) = torch.autograd.grad(bound, table)
        found.append(float(bound.detach()))
        gradients.append(gradient)
    assert found == pytest.approx([found[0]] * len(found), rel=5e-4)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("is_told", [False, True])
def test_draws_have_the_mean_of_the_quadrature(make_model, way, is_told, monkeypatch):
    """Of 20 000 rows, within 4.5 standard errors: 1e-4 for all twelve tests."""
    noise, name = way
    settings = (*WAYS[name], f"algo.time_conditioning={is_told}")
    rows = ("training.sampling_eps=1e-6", "training.antithetic_sampling=False")
    model = mdlm(make_model, noise, *settings, *rows)
    logits = toy_logits(model)
    eye = torch.eye(model.vocab_size, dtype=torch.float64)
    give(monkeypatch, model, logits, eye)
    nll = model.nll(X0.expand(20_000, L)).nll.double().sum(dim=-1)
    error = float(nll.std()) / len(nll) ** 0.5
    assert abs(float(nll.mean() - exact_bound(model, logits, X0))) < 4.5 * error


def give(monkeypatch, model, logits, eye):
    """Puts logits in the place of network and head."""
    monkeypatch.setattr(model, "hidden", logits)
    monkeypatch.setattr(model, "_head", lambda hidden: Head(hidden, eye, None))


def test_the_weight_is_constant(make_model, way):
    noise, name = way
    model = mdlm(make_model, noise, *WAYS[name])
    z = model.corrupt(torch.zeros(64, L, dtype=torch.long), model.sample_t(64))
    weight = -z.dalpha_t / (1 - z.alpha_t)
    levels = model.noise.log_uniform()
    constant = torch.full_like(weight, levels.f_1 - levels.f_0)
    assert torch.allclose(weight, constant, rtol=1e-9) == (name != "plain")


@pytest.mark.parametrize("is_told", [False, True])
def test_what_the_network_is_told(make_model, way, is_told):
    """sigma; t itself after a change of variables; nothing without conditioning."""
    noise, name = way
    settings = (*WAYS[name], f"algo.time_conditioning={is_told}")
    model = mdlm(make_model, noise, *settings)
    t = model.sample_t(16)
    z = model.corrupt(torch.zeros(16, L, dtype=torch.long), t)
    told = model.condition(model.sigma(z.alpha_t)).double()
    expected = t if name == "change_of_variables" else model.sigma(z.alpha_t)[:, 0]
    expected = expected if is_told else torch.zeros_like(t)
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=1e-6)
    sampled = model.sigma(torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64))
    told = model.condition(sampled)
    if name == "change_of_variables" or not is_told:
        assert bool(((told >= 0) & (told <= 1)).all())  # of a sampler's last time, too


@pytest.mark.parametrize("is_told", [False, True])
def test_gradients_of_a_network_are_finite(make_model, way, is_told):
    noise, name = way
    settings = (*WAYS[name], f"algo.time_conditioning={is_told}")
    model = mdlm(make_model, noise, *settings)
    x0 = X0.expand(64, L)
    batch = {"input_ids": x0, "attention_mask": torch.ones(64, L)}
    model.loss(batch).loss.backward()
    gradients = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert any(bool(x.any()) for x in gradients)


def test_samples_are_drawn_whatever_the_estimator(make_model, way):
    """The schedule of the reverse process is not that of the estimator's times."""
    noise, name = way
    model = mdlm(make_model, noise, *WAYS[name], "algo.time_conditioning=True")
    ids = model.generate_samples(4, model.generator("test")).tokens
    assert ids.shape == (4, L)
    assert not (ids == model.mask_index).any()


# ---------------------------------------------------------------- discrete time


@pytest.mark.parametrize("noise", sorted(SCHEDULES))
def test_many_steps_tend_to_continuous_time(make_model, noise):
    """The bound of T steps falls to that of T = 0, by half for twice as many."""
    model = mdlm(make_model, noise, "training.sampling_eps=1e-9")
    logits = toy_logits(model)
    model.time_conditioning = False
    continuous = float(exact_bound(model, logits, X0, 5000))
    gaps = []
    for T in (250, 500, 1000):
        gaps.append(discrete_bound(model, logits, X0, T) - continuous)
    assert abs(gaps[2]) < 5e-3 * continuous
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.2)
    assert gaps[2] == pytest.approx(gaps[1] / 2, rel=0.2)


def discrete_bound(model, logits, x0, T):
    """Mean over the grid of the mean over all masks, of `algo.T=T`."""
    t = torch.arange(1, T + 1).double() / T
    model.T = T
    z = model.corrupt(x0.expand(T, L), t)
    model.T = 0
    total = 0.0
    for is_masked in itertools.product((False, True), repeat=L):
        where = torch.tensor(is_masked)
        xt = torch.where(where, model.mask_index, x0).expand(T, L)
        sigma = model.sigma(z.alpha_t)
        nll = model.nll_per_token(
            model.process_logits(logits(xt, sigma), xt=xt, sigma=sigma),
            xt=xt,
            x0=x0.expand(T, L),
            alpha_t=z.alpha_t,
            dalpha_t=z.dalpha_t,
        )
        clean, k = z.alpha_t[:, 0], int(where.sum())
        probability = (1 - clean) ** k * clean ** (L - k)
        total += float((probability * nll.sum(dim=-1)).mean())
    return total


def test_the_first_time_of_the_grid_is_finite(make_model):
    """Where the published form is 0 / 0: the weight there is T (alpha_0 - alpha_t) /
    (1 - alpha_t), which is T for schedules that begin at alpha_0 = 1."""
    for noise in SCHEDULES:
        model = mdlm(make_model, noise, "algo.T=4")
        z = model.corrupt(
            torch.zeros(1, L, dtype=torch.long), torch.tensor([0.25]).double()
        )
        alpha_0 = float(model.noise(torch.zeros(1).double()).alpha_t)
        weight = float(-z.dalpha_t / (1 - z.alpha_t))
        expected = 4 * (alpha_0 - float(z.alpha_t)) / (1 - float(z.alpha_t))
        assert weight == pytest.approx(expected)
        assert math.isfinite(weight)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("key", ESTIMATORS)
@pytest.mark.parametrize("noise", sorted(SCHEDULES))
def test_schedules_without_one_are_refused(make_model, key, noise):
    settings = (f"noise={noise}", f"training.{key}=True")
    if noise in TIMED:
        make_model("algo=mdlm", *settings)
        return
    with pytest.raises(ConfigError, match=f"training.{key}=True is not defined for"):
        make_model("algo=mdlm", *settings)


@pytest.mark.parametrize("key", ESTIMATORS)
def test_other_algorithms_are_refused(make_model, algo_name, key):
    if algo_name == "mdlm":
        return
    with pytest.raises(ConfigError, match=f"training.{key}=True.*the only value"):
        make_model(f"algo={algo_name}", f"training.{key}=True")


@pytest.mark.parametrize("key", ESTIMATORS)
def test_discrete_time_is_refused(make_model, key):
    with pytest.raises(ConfigError, match=f"training.{key}=True with algo.T=10"):
        make_model("algo=mdlm", "algo.T=10", f"training.{key}=True")


def test_both_are_refused(make_model):
    settings = [f"training.{key}=True" for key in ESTIMATORS]
    with pytest.raises(ConfigError, match="exclude each other"):
        make_model("algo=mdlm", *settings)
