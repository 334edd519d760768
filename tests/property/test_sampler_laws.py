"""Laws of samplers: draws, nucleus, and what a sample must be for a known denoiser.

Frequencies are compared with probabilities at 5 sigma (6e-7 per cell; all cells of
this file together below 1e-3); seeds are fixed.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from samplers import Ancestral, nucleus, sample_categorical


def deviation(samples, probs):
    """Largest distance of a frequency from its probability, in sigma."""
    n = samples.numel()
    counts = samples.flatten().bincount(minlength=len(probs)).double()
    sigma = (n * probs * (1 - probs)).sqrt().clamp(min=1e-6)
    return float(((counts - n * probs).abs() / sigma).max())


# ---------------------------------------------------------------- categorical draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_draws_follow_the_probabilities(generator, dtype, scale):
    """Rows need not be normalised."""
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    rows = (scale * probs).to(dtype).expand(100_000, 5)
    samples = sample_categorical(rows, generator)
    assert samples.dtype == torch.int64
    assert deviation(samples, probs) < 5


def test_draws_leave_their_input_alone(generator):
    probs = torch.rand(4, 5, 6, dtype=torch.float64, generator=generator)
    before = probs.clone()
    assert sample_categorical(probs, generator).shape == (4, 5)
    assert torch.equal(probs, before)


# ---------------------------------------------------------------- nucleus

weights = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=12)


@given(weights, st.floats(0.0, 0.999))
def test_nucleus_is_the_smallest_set_with_enough_mass(weights, top_p):
    """Against the definition: sort, add up, stop as soon as the mass exceeds top_p."""
    probs = torch.tensor(weights, dtype=torch.float64)
    probs = probs / probs.sum()
    before = probs.clone()
    got = nucleus(probs[None], top_p)[0]
    assert torch.equal(probs, before)
    assert float(got.sum()) == pytest.approx(1.0)
    assert got[probs.argmax()] > 0
    kept = probs[got > 0]
    assert kept.sum() > top_p - 1e-12
    assert kept.sum() - kept.min() <= top_p + 1e-12  # one less would be too few
    dropped = probs[got == 0]
    assert not len(dropped) or dropped.max() <= kept.min()
    torch.testing.assert_close(got[got > 0], kept / kept.sum())


@given(weights)
def test_nucleus_of_one_changes_nothing(weights):
    probs = torch.tensor([weights], dtype=torch.float64)
    assert torch.equal(nucleus(probs, 1.0), probs)


@given(weights)
def test_nucleus_of_zero_is_greedy(weights):
    probs = torch.tensor([weights], dtype=torch.float64)
    expected = F.one_hot(probs.argmax(dim=-1), len(weights)).double()
    assert torch.equal(nucleus(probs / probs.sum(), 0.0), expected)


# ---------------------------------------------------------------- every sampler


@pytest.fixture
def build(make_model, sampling_pair):
    """A model of one algorithm, with one of the samplers that fit it."""
    predictor, name = sampling_pair

    def build(*overrides, **kwargs):
        return make_model(
            f"algo={name}", f"sampling.predictor={predictor}", *overrides, **kwargs
        )

    return build


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def believe(model, x0, laws, monkeypatch):
    """Makes a model certain of the sequences x0 (B, L)."""
    perfect = F.one_hot(x0, model.vocab_size).double()

    def forward(xt, sigma):
        return laws.output_for(model, perfect, xt, torch.exp(-sigma))

    def next_token(x):
        return perfect[:, x.shape[1]].log().clamp(min=-1e6)

    monkeypatch.setattr(model, "forward", forward)
    if model.is_autoregressive:
        monkeypatch.setattr(model, "next_token", next_token)


@pytest.mark.parametrize("noise_removal", ["ancestral", "greedy"])
@pytest.mark.parametrize("num_steps", [1, 8])
def test_a_perfect_denoiser_samples_x0(
    build, laws, monkeypatch, noise_removal, num_steps
):
    model = build(f"sampling.noise_removal={noise_removal}")
    x0 = 2 + torch.arange(4 * 8).view(4, 8) % 4
    x0[:, 0] = model.tokenizer.bos_token_id
    believe(model, x0, laws, monkeypatch)
    x = model.generate_samples(4, seeded(0), num_steps=num_steps)
    assert torch.equal(x, x0)


@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("p_nucleus", [1.0, 0.9])
def test_samples_are_clean_tokens(build, laws, use_float64, p_nucleus):
    """(B, L) ids with no mask among them, in either precision, nucleus or not."""
    settings = (
        f"sampling.use_float64={use_float64}",
        f"sampling.p_nucleus={p_nucleus}",
    )
    for noise_removal in ("ancestral", "greedy"):
        model = build(f"sampling.noise_removal={noise_removal}", *settings)
        x = model.generate_samples(16, seeded(1))
        assert x.shape == (16, 8)
        assert x.dtype == torch.int64
        if model.mask_index is not None:
            assert not (x == model.mask_index).any()
        assert bool(((x >= 0) & (x < model.vocab_size)).all())


def test_a_mask_inside_the_vocabulary_is_not_sampled(build, stub_tokenizer):
    model = build(tokenizer=stub_tokenizer(7, 0, mask_token_id=2))
    if model.mask_index is None:
        pytest.skip("no mask")
    assert model.mask_index == 2
    assert not (model.generate_samples(64, seeded(1)) == 2).any()


def test_a_seed_replays_a_sample(build):
    model = build()
    first = model.generate_samples(16, seeded(1))
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(model.generate_samples(16, seeded(1)), first)
    assert not torch.equal(model.generate_samples(16, seeded(2)), first)


def test_greedy_nucleus_of_an_autoregressive_model_is_its_argmax(make_model):
    """p_nucleus = 0 leaves one choice, which a slow loop over argmax reproduces."""
    model = make_model("algo=ar", "sampling.p_nucleus=0")
    x = model.generate_samples(2, seeded(0))
    expected = torch.full((2, 1), model.tokenizer.bos_token_id)
    while expected.shape[1] < 8:
        best = model.next_token(expected).argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(x, expected)


def test_autoregressive_samples_start_with_bos(make_model, stub_tokenizer):
    tokenizer = stub_tokenizer()
    tokenizer.bos_token_id = 5
    model = make_model("algo=ar", tokenizer=tokenizer)
    assert (model.generate_samples(8, seeded(0))[:, 0] == 5).all()


def test_ignore_bos_puts_bos_first(build):
    """As in training, where position 0 is never noised."""
    model = build("algo.ignore_bos=True")
    x = model.generate_samples(32, seeded(0))
    assert (x[:, 0] == model.tokenizer.bos_token_id).all()


def test_absorbing_samplers_draw_from_a_fixed_belief(build, laws, monkeypatch):
    """If p never changes, each token is a draw from p, in any number of steps."""
    model = build()
    if model.mask_index is None or model.is_autoregressive:
        pytest.skip("not an absorbing state")
    p = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.15, 0.05, 0.0], dtype=torch.float64)

    def forward(xt, sigma):
        revealed = F.one_hot(xt, 7).double()
        x_theta = torch.where((xt == 6)[..., None], p, revealed)
        return laws.output_for(model, x_theta, xt, torch.exp(-sigma))

    monkeypatch.setattr(model, "forward", forward)
    for num_steps in (1, 16):
        x = model.generate_samples(5000, seeded(3), num_steps=num_steps)
        assert deviation(x, p) < 5


def test_the_time_grid_falls_from_one(build):
    if build().is_autoregressive:
        pytest.skip("no times")
    times = build().sampler.time_grid(10)
    assert times.shape == (11,)
    assert float(times[0]) == 1.0
    assert 0 < float(times[-1]) < 1e-4
    assert bool((times.diff() < 0).all())


# ---------------------------------------------------------------- Analytic


@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.1, 0.4), (0.5, 0.51), (0.3, 1.0)])
def test_analytic_is_the_ancestral_posterior_of_subs(
    make_model, generator, monkeypatch, alpha_t, alpha_s
):
    """With the score that SUBS implies, both kernels are the same to 1e-9."""
    model = make_model("algo=mdlm", "sampling.predictor=analytic")
    xt = torch.randint(7, (8, 8), generator=generator)
    assert (xt == model.mask_index).any()
    logits = torch.randn(8, 8, 7, dtype=torch.float64, generator=generator)
    log_x_theta = model.process_logits(logits, xt=xt, sigma=None)
    log_x_theta = model.carry_over(log_x_theta, xt)
    monkeypatch.setattr(model, "predict_x0", lambda xt, alpha_t: log_x_theta)
    levels = [torch.full((8, 1), a, dtype=torch.float64) for a in (alpha_t, alpha_s)]
    analytic = model.sampler.reverse_probs(model, xt, *levels)
    expected = model.posterior(
        log_x_theta.exp(), xt=xt, alpha_t=levels[0], alpha_s=levels[1]
    )
    torch.testing.assert_close(analytic, expected, rtol=0, atol=1e-9)


def test_analytic_leaves_no_mask_whatever_the_scores(make_model, monkeypatch):
    """Scores far below the true ones would keep every mask at sigma = 0."""
    model = make_model("algo=sedd", "sampling.predictor=analytic")
    log_score = torch.full((4, 8, 7), -9.0)
    log_score[..., 6] = 0
    monkeypatch.setattr(model, "forward", lambda xt, sigma: log_score)
    x = model.generate_samples(4, seeded(0), num_steps=1)
    assert not (x == model.mask_index).any()


def test_nucleus_acts_on_what_the_denoiser_believes(make_model, monkeypatch):
    """Both kernels reveal only tokens of the nucleus; what stays masked is the same."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04, 0.0, 0.0], dtype=torch.float64)
    level_t, level_s = (torch.tensor([[a]]).double() for a in (0.25, 0.75))
    xt = torch.full((1, 8), 6)
    for predictor in ("ancestral", "analytic"):
        model = make_model(
            "algo=mdlm", f"sampling.predictor={predictor}", "sampling.p_nucleus=0.75"
        )
        log_p = p.log().clamp(min=-1e6).expand(1, 8, 7)
        monkeypatch.setattr(model, "predict_x0", lambda xt, a, log_p=log_p: log_p)
        if isinstance(model.sampler, Ancestral):
            x_theta = model.sampler.predict_x0(model, xt, level_t)
            probs = model.posterior(x_theta, xt=xt, alpha_t=level_t, alpha_s=level_s)
        else:
            probs = model.sampler.reverse_probs(model, xt, level_t, level_s)
        stay = 0.25 / 0.75
        expected = torch.tensor([0.625, 0.375, 0, 0, 0, 0, 0]).double() * (1 - stay)
        expected[6] = stay
        torch.testing.assert_close(probs[0, 0], expected, rtol=0, atol=1e-9)
