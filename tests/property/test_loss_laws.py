"""Laws of the per-token losses: zero where the denoiser is perfect, never negative,
equal to the plain formulas, and to each other where theory says so. All in float64,
at times from 1e-3 to 1.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain import uniform_state_nll

N = 300  # random (x_0, x_t, p, t) per test


@pytest.fixture
def model(make_model, diffusion_name):
    return make_model(f"algo={diffusion_name}")


def draw(model, laws, generator, sharpness=1.0):
    """Random clean ids, times, noisy ids, beliefs: x0, xt (N, 1), z, x_theta."""
    clean = laws.clean(model)
    x0 = clean[torch.randint(len(clean), (N, 1), generator=generator)]
    t = 10 ** (-3 * torch.rand(N, dtype=torch.float64, generator=generator))
    if model.T > 0:
        t = (t * model.T).ceil() / model.T
    t[0] = 1.0
    z = model.corrupt(x0, t)
    xt = model.q_xt(x0, z.alpha_t, generator)
    size = (N, 1, model.vocab_size)
    logits = torch.randn(size, dtype=torch.float64, generator=generator)
    return x0, xt, z, (sharpness * logits).softmax(dim=-1)


def loss(model, output, x0, xt, z):
    return model.nll_per_token(
        output, xt=xt, x0=x0, alpha_t=z.alpha_t, dalpha_t=z.dalpha_t
    )


def without_mask(model, x_theta, xt):
    """Beliefs under SUBS: none in the mask, and revealed tokens for certain."""
    is_mask = torch.arange(model.vocab_size) == model.mask_index
    x_theta = x_theta.masked_fill(is_mask, 0)
    x_theta = x_theta / x_theta.sum(dim=-1, keepdim=True)
    revealed = F.one_hot(xt, model.vocab_size).double()
    return torch.where((xt == model.mask_index)[..., None], x_theta, revealed)


# ---------------------------------------------------------------- every objective


def test_a_perfect_denoiser_has_no_loss(model, laws, generator):
    """log p one-hot on x_0 (the true score for SEDD) gives 0 to rounding."""
    x0, xt, z, _ = draw(model, laws, generator)
    perfect = F.one_hot(x0, model.vocab_size).double()
    output = laws.output_for(model, perfect, xt, z.alpha_t)
    zero = torch.zeros(N, 1, dtype=torch.float64)
    torch.testing.assert_close(loss(model, output, x0, xt, z), zero, rtol=0, atol=1e-9)


def test_a_perfect_denoiser_has_no_nelbo(model, laws, monkeypatch):
    """The same through time, corruption, head and reconstruction, as in training.

    The trunk gives what the logits should be, and the head passes it on. SEDD's
    logits are K - 1 times the beliefs, of which `process_logits` makes scores.
    """
    x0 = laws.clean(model)[torch.arange(32).view(4, 8) % len(laws.clean(model))]
    K = model.vocab_size
    logits = F.one_hot(x0, K).double().log().clamp(min=-1e6)
    if model.config.algo.parameterization == "score":
        logits = logits + math.log(K - 1)
    identity = torch.nn.Linear(K, K, dtype=torch.float64)
    torch.nn.init.eye_(identity.weight)
    torch.nn.init.zeros_(identity.bias)
    monkeypatch.setattr(model.backbone.output_layer, "linear", identity)
    for right in (True, False):
        hidden = logits if right else logits.roll(1, dims=0)
        monkeypatch.setattr(model, "hidden", lambda xt, sigma, labels=None, h=hidden: h)
        for training in (True, False):
            model.train(training)
            total, nll = model.nll(x0)
            assert nll.shape == x0.shape
            assert total.dtype == nll.dtype == torch.float64
            assert bool((nll.abs() < 1e-9).all()) is right
            assert bool(total.abs() < 1e-7) is right


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_is_never_negative(model, laws, generator, sharpness):
    """Each loss is a divergence given x_t, for any belief whatsoever."""
    x0, xt, z, x_theta = draw(model, laws, generator, sharpness)
    output = laws.output_for(model, x_theta, xt, z.alpha_t)
    assert loss(model, output, x0, xt, z).min() > -1e-9


def test_the_truth_beats_every_other_belief(model, laws, generator):
    """Moving any belief towards x_0 lowers the loss wherever there is one."""
    x0, xt, z, x_theta = draw(model, laws, generator)
    better = 0.5 * x_theta + 0.5 * F.one_hot(x0, model.vocab_size)
    before, after = (
        loss(model, laws.output_for(model, p, xt, z.alpha_t), x0, xt, z)
        for p in (x_theta, better)
    )
    scored = before > 1e-9
    assert scored.any()
    assert bool((after < before)[scored].all())


def test_inputs_are_not_mutated(model, laws, generator):
    x0, xt, z, x_theta = draw(model, laws, generator)
    output = laws.output_for(model, x_theta, xt, z.alpha_t)
    inputs = [output, x0, xt, *(x for x in z if x is not None)]
    before = [x.clone() for x in inputs]
    loss(model, output, x0, xt, z)
    assert all(map(torch.equal, inputs, before))


def test_revealed_tokens_cost_nothing(make_model, absorbing_name, laws, generator):
    model = make_model(f"algo={absorbing_name}")
    x0, _, z, x_theta = draw(model, laws, generator)
    if model.config.algo.parameterization == "subs":
        x_theta = without_mask(model, x_theta, x0)
    output = laws.output_for(model, x_theta, x0, z.alpha_t)
    assert not loss(model, output, x0, x0, z).any()


# ---------------------------------------------------------------- uniform state


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_uniform_is_the_textbook_formula(
    make_model, uniform_name, laws, generator, sharpness
):
    """From dense xbar = K alpha_t p + 1 - alpha_t, as the benchmark's plain step."""
    model = make_model(f"algo={uniform_name}")
    x0, xt, z, x_theta = draw(model, laws, generator, sharpness)
    assert (x0 == xt).any()
    assert (x0 != xt).any()
    log_x_theta = x_theta.log()
    expected = uniform_state_nll(log_x_theta, xt, x0, z.alpha_t, z.dalpha_t)
    got = loss(model, log_x_theta, x0, xt, z)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- absorbing state


def test_sedd_with_the_score_of_subs_is_mdlm(make_model, laws, generator):
    """The score that MDLM implies, put into score entropy, gives MDLM's loss.

    `log_score` leaves the mask's own entry to SEDD's `carry_over`.
    """
    mdlm, sedd = make_model("algo=mdlm"), make_model("algo=sedd")
    x0, xt, z, x_theta = draw(mdlm, laws, generator)
    log_x_theta = without_mask(mdlm, x_theta, xt).log().clamp(min=-1e6)
    sigma = mdlm.sigma(z.alpha_t)
    log_score = mdlm.log_score(x_theta.log(), alpha_t=z.alpha_t, sigma=sigma)
    log_score = sedd.carry_over(log_score, xt)
    expected = loss(mdlm, log_x_theta, x0, xt, z)
    assert (expected > 0).any()
    torch.testing.assert_close(
        loss(sedd, log_score, x0, xt, z), expected, rtol=1e-9, atol=1e-9
    )


def d3pm_divergence(model, x_theta, x0, alpha_t):
    """T KL(q(x_s | x_t = m, x_0) || p_theta(x_s | x_t = m)) from dense matrices.

    p_theta(x_s | x_t) is proportional to q(x_t | x_s) sum_y q(x_s | y) p(y), where y
    also ranges over the mask.
    """
    K, m = model.vocab_size, model.mask_index
    t = 1 - alpha_t
    s = (t - 1 / model.T).clamp(min=0)
    to_mask = torch.full((len(x0), 1, K), 1.0).double()  # q(x_t = m | x_s)
    to_mask *= ((t - s) / (1 - s))[..., None]
    to_mask[..., m] = 1
    divergences = []
    for belief in (F.one_hot(x0, K).double(), x_theta):
        at_s = (1 - s)[..., None] * belief
        at_s[..., m] += s
        joint = to_mask * at_s
        divergences.append(joint / joint.sum(dim=-1, keepdim=True))
    q, p = divergences
    return model.T * torch.where(q > 0, q * (q / p).log(), 0.0).sum(dim=-1)


@pytest.mark.parametrize("T", [5, 1000])
def test_d3pm_is_the_dense_divergence_of_one_step(make_model, laws, generator, T):
    """Mass on the mask included; hence bounded below, at the first time too."""
    model = make_model("algo=d3pm", f"algo.T={T}", "noise.eps=0")
    x0, _, z, x_theta = draw(model, laws, generator)
    z = z._replace(alpha_t=z.alpha_t.clamp(min=1e-3))
    xt = torch.full_like(x0, model.mask_index)
    expected = d3pm_divergence(model, x_theta, x0, z.alpha_t)
    got = loss(model, x_theta.log(), x0, xt, z)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_d3pm_is_finite_at_the_first_time_of_the_grid(make_model, generator):
    """s = 0 is a limit, not 0 / 0; eps puts the first s even below 0."""
    model = make_model("algo=d3pm", "algo.T=1000")
    z = model.corrupt(torch.zeros(1, 1).long(), torch.tensor([1e-3]).double())
    logits = torch.randn(1, 1, model.vocab_size, generator=generator).double()
    output = logits.log_softmax(dim=-1).requires_grad_()
    xt = torch.full((1, 1), model.mask_index)
    value = loss(model, output, torch.zeros_like(xt), xt, z)
    value.sum().backward()
    t, p = 1 - z.alpha_t.item(), output.detach().exp()[0, 0]
    only_term = math.log(1 + z.alpha_t.item() * p[6].item() / t) - math.log(p[0].item())
    assert value.item() == pytest.approx(only_term / t, rel=1e-9)
    assert bool(output.grad.isfinite().all())


def test_d3pm_tends_to_mdlm(make_model, laws, generator):
    """Without mass on the mask the two agree, as T grows and eps goes to 0."""
    settings = ("noise.eps=1e-7",)
    mdlm = make_model("algo=mdlm", *settings)
    d3pm = make_model("algo=d3pm", "algo.T=1000000", *settings)
    x0, xt, z, x_theta = draw(mdlm, laws, generator)
    log_x_theta = without_mask(mdlm, x_theta, xt).log().clamp(min=-1e6)
    torch.testing.assert_close(
        loss(d3pm, log_x_theta, x0, xt, z),
        loss(mdlm, log_x_theta, x0, xt, z),
        rtol=1e-4,  # D3PM keeps its t below 1 - 1e-4
        atol=1e-6,
    )


def test_d3pm_with_mass_on_the_mask_has_a_limit(make_model, laws, generator):
    """(log(1 + a q / t) - log p) / t + d/dt log(1 + a q / t) with a = 1 - t."""
    model = make_model("algo=d3pm", "algo.T=1000000", "noise.eps=1e-7")
    x0, _, z, x_theta = draw(model, laws, generator)
    z = z._replace(alpha_t=z.alpha_t.clamp(min=1e-3))
    xt = torch.full_like(x0, model.mask_index)
    t = 1 - z.alpha_t
    q = x_theta[..., model.mask_index]
    log_xt = torch.log1p((1 - t) * q / t)
    slope = -q / t**2 / log_xt.exp()
    log_p = x_theta.gather(-1, x0[..., None])[..., 0].log()
    expected = (log_xt - log_p) / t + slope
    got = loss(model, x_theta.log(), x0, xt, z)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)


# ---------------------------------------------------------------- losses and samplers


def test_the_loss_is_the_rate_of_the_samplers_divergence(model, laws, generator):
    """loss = lim KL(q(x_s | x_t, x_0) || q(x_s | x_t, x_theta)) / (t - s), s -> t.

    Ties the objective to the posterior that `Ancestral` draws from.
    """
    if model.T > 0 or model.config.algo.parameterization == "score":
        pytest.skip("continuous-time x_0 parameterisations only")
    x0, xt, _, x_theta = draw(model, laws, generator)
    if model.mask_index is not None:
        x_theta = without_mask(model, x_theta, xt)
    t, dt = torch.linspace(0.05, 1, N, dtype=torch.float64)[:, None], 1e-6
    alpha_t, dalpha_t = model.noise(t)
    alpha_s = model.noise(t - dt).alpha_t
    true = F.one_hot(x0, model.vocab_size).double()
    q, p = (
        model.posterior(belief, xt=xt, alpha_t=alpha_t, alpha_s=alpha_s)
        for belief in (true, x_theta)
    )
    expected = torch.where(q > 0, q * (q / p).log(), 0.0).sum(dim=-1) / dt
    output = laws.output_for(model, x_theta, xt, alpha_t)
    got = model.nll_per_token(output, xt=xt, x0=x0, alpha_t=alpha_t, dalpha_t=dalpha_t)
    assert (got > 0.1).any()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
