"""Laws of samplers: draws, nucleus, and what a sample must be for a known denoiser.

Frequencies are compared with probabilities at 5 sigma (6e-7 per cell; all cells of
this file together below 1e-3); seeds are fixed.
"""

import pytest
import torch
import torch.nn.functional as F
from enumeration import configure
from hypothesis import given
from hypothesis import strategies as st

from sampling.categorical import exponential_race, inverse_cdf, nucleus, tempered
from sampling.prompts import Given
from sampling.registry import build_sampler
from sampling.reverse_process import Chain, Step


def deviation(samples, probs):
    """Largest distance of a frequency from its probability, in sigma."""
    n = samples.numel()
    counts = samples.flatten().bincount(minlength=len(probs)).double()
    sigma = (n * probs * (1 - probs)).sqrt().clamp(min=1e-6)
    return float(((counts - n * probs).abs() / sigma).max())


# ---------------------------------------------------------------- categorical draws


@pytest.mark.parametrize("draw", [inverse_cdf, exponential_race])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_draws_follow_the_probabilities(generator, draw, dtype, scale):
    """Rows need not be normalised."""
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    rows = (scale * probs).to(dtype).expand(100_000, 5)
    samples = draw(rows, generator)
    assert samples.dtype == torch.int64
    assert deviation(samples, probs) < 5


@pytest.mark.parametrize("draw", [inverse_cdf, exponential_race])
def test_draws_leave_their_input_alone(generator, draw):
    probs = torch.rand(4, 5, 6, dtype=torch.float64, generator=generator)
    before = probs.clone()
    assert draw(probs, generator).shape == (4, 5)
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
    kept = probs[got > 0]
    assert kept.max() == probs.max()  # of equals, any
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
    """One token, as likely as any."""
    probs = torch.tensor([weights], dtype=torch.float64)
    probs = probs / probs.sum()
    got = nucleus(probs, 0.0)
    assert sorted(got[0].tolist()) == [0.0] * (len(weights) - 1) + [1.0]
    assert (got * probs).sum() == probs.max()


# ---------------------------------------------------------------- temperature


@given(weights, st.floats(1e-3, 100.0))
def test_a_temperature_is_a_power_of_the_probabilities(weights, temperature):
    """p^(1 / T), normalised; in float64, and the input stays."""
    probs = torch.tensor([weights], dtype=torch.float64)
    log_p = (probs / probs.sum()).log()
    before = log_p.clone()
    got = tempered(log_p, temperature).exp()
    assert torch.equal(log_p, before)
    expected = (log_p / temperature).softmax(dim=-1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tempered(log_p + 7, temperature).exp(), got)


def test_temperature_one_is_the_same_tensor():
    log_p = torch.randn(3, 5)
    assert tempered(log_p, 1.0) is log_p


@given(weights)
def test_temperature_zero_is_the_limit(weights):
    """All on the largest, the first of equals; tiny ones overflow nowhere."""
    log_p = torch.tensor([[*weights, -torch.inf, -1e6]], dtype=torch.float64)
    best = F.one_hot(log_p.argmax(dim=-1), log_p.shape[-1]).double()
    assert torch.equal(tempered(log_p, 0.0).exp(), best)
    tiny = tempered(log_p, 1e-300).exp()
    ties = (log_p == log_p.amax()).double()
    torch.testing.assert_close(tiny, ties / ties.sum())


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


def tokens_of(model, *args, **kwargs):
    return model.generate_samples(*args, **kwargs).tokens


def removals(model):
    """The ways that a sampler has of removing the last noise, but for none."""
    return sorted({*model.sampler.removals} - {"none"})


def use_removal(model, name):
    model.config.sampling.noise_removal = name
    model.sampler = build_sampler(model.config, type(model))


def believe(model, x0, laws, give_logits):
    """Makes a model certain of the sequences x0 (B, L), which it tells apart by their
    first token."""
    perfect = F.one_hot(x0, model.vocab_size).double()
    logits = laws.logits_for(model, perfect)

    def hidden(xt, sigma, labels=None):
        return logits[(xt[:, :1] == x0[:, 0]).long().argmax(dim=-1)]

    def autoregressive(x, cache):  # all sequences, what follows each token
        cache.length += x.shape[1]
        return logits[:, cache.length - x.shape[1] + 1 : cache.length + 1]

    give_logits(model, autoregressive if model.is_autoregressive else hidden)


@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("num_steps", [1, 8])
def test_a_perfect_denoiser_samples_x0(
    build, laws, give_logits, use_float64, num_steps
):
    """Each sequence its own, from its first token; in every way of removing noise."""
    model = build(f"sampling.use_float64={use_float64}")
    x0 = torch.arange(4)[:, None] + torch.arange(8) % 3
    if model.is_autoregressive:
        x0[:, 0] = model.tokenizer.bos_token_id
    believe(model, x0, laws, give_logits)
    known = torch.arange(8).expand(4, 8) == 0
    for name in removals(model):
        use_removal(model, name)
        options = {"num_steps": num_steps, "given": Given(x0, known)}
        assert torch.equal(tokens_of(model, 4, seeded(0), **options), x0)


@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("p_nucleus", [1.0, 0.9])
def test_samples_are_clean_tokens(build, use_float64, p_nucleus):
    """(B, L) ids with no mask among them, in either precision, nucleus or not."""
    model = build(
        f"sampling.use_float64={use_float64}", f"sampling.p_nucleus={p_nucleus}"
    )
    for name in removals(model):
        use_removal(model, name)
        x = tokens_of(model, 16, seeded(1))
        assert x.shape == (16, 8)
        assert x.dtype == torch.int64
        if model.mask_index is not None:
            assert not (x == model.mask_index).any()
        assert bool(((x >= 0) & (x < model.vocab_size)).all())


@pytest.mark.parametrize("use_float64", [True, False])
def test_temperature_zero_leaves_nothing_to_chance_but_noise(build, use_float64):
    """The tokens are clean; an absorbing state, of which all is revealed in one step,
    and an autoregressive model write the same in every sample."""
    model = build(f"sampling.use_float64={use_float64}", "sampling.temperature=0")
    x = tokens_of(model, 16, seeded(1), num_steps=1)
    if model.mask_index is None:
        return
    assert not (x == model.mask_index).any()
    if model.config.sampling.predictor not in ("first_hitting", "one_step"):
        assert bool((x == x[:1]).all())


def test_temperature_one_is_no_temperature(build):
    """Token for token, and a half gives others."""
    model = build()
    expected = tokens_of(model, 16, seeded(1))
    model.sampler.temperature = 1.0
    assert torch.equal(tokens_of(model, 16, seeded(1)), expected)
    model.sampler.temperature = 0.1
    assert not torch.equal(tokens_of(model, 16, seeded(1)), expected)


def test_a_mask_inside_the_vocabulary_is_not_sampled(build, stub_tokenizer):
    model = build(tokenizer=stub_tokenizer(7, 0, mask_token_id=2))
    if model.mask_index is None:
        pytest.skip("no mask")
    assert model.mask_index == 2
    assert not (tokens_of(model, 64, seeded(1)) == 2).any()


def test_a_seed_replays_a_sample(build):
    model = build()
    first = tokens_of(model, 16, seeded(1))
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(tokens_of(model, 16, seeded(1)), first)
    assert not torch.equal(tokens_of(model, 16, seeded(2)), first)


def test_greedy_nucleus_of_an_autoregressive_model_is_its_argmax(make_model):
    """p_nucleus = 0 leaves one choice, which a slow loop over argmax reproduces."""
    model = make_model("algo=ar", "sampling.p_nucleus=0")
    x = tokens_of(model, 2, seeded(0))
    expected = torch.full((2, 1), model.tokenizer.bos_token_id)
    while expected.shape[1] < 8:
        best = model.next_token(expected).argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
    assert torch.equal(x, expected)


def test_autoregressive_samples_start_with_bos(make_model, stub_tokenizer):
    tokenizer = stub_tokenizer()
    tokenizer.bos_token_id = 5
    model = make_model("algo=ar", tokenizer=tokenizer)
    assert (tokens_of(model, 8, seeded(0))[:, 0] == 5).all()


def test_ignore_bos_puts_bos_first(build):
    """As in training, where position 0 is never noised."""
    model = build("algo.ignore_bos=True")
    x = tokens_of(model, 32, seeded(0))
    assert (x[:, 0] == model.tokenizer.bos_token_id).all()


def test_absorbing_samplers_draw_from_a_fixed_belief(build, laws, give_logits):
    """If p never changes, each token is a draw from p, in any number of steps; in the
    order of drawn probabilities likely tokens are drawn again less often."""
    model = build()
    if model.mask_index is None or model.is_autoregressive:
        pytest.skip("not an absorbing state")
    if model.config.sampling.predictor == "confidence":
        configure(model, order="margin")
    p = torch.tensor([0.4, 0.05, 0.25, 0.1, 0.15, 0.05, 0.0], dtype=torch.float64)
    logits = laws.logits_for(model, p)
    give_logits(model, lambda xt, sigma: logits.expand(*xt.shape, 7))
    for num_steps in (1, 16):
        x = tokens_of(model, 5000, seeded(3), num_steps=num_steps)
        assert deviation(x, p) < 5


def test_the_time_grid_falls_from_one(build):
    model = build()
    if model.is_autoregressive:
        pytest.skip("no times")
    times = model.sampler.time_grid(model.noise, 10)
    assert times.shape == (11,)
    assert times.dtype == torch.float64
    assert float(times[0]) == 1.0
    assert 0 < float(times[-1]) < 1e-4
    assert bool((times.diff() < 0).all())


# ---------------------------------------------------------------- one step


def column(value, size):
    return torch.full((size, 1), value, dtype=torch.float64)


def dense_rows(model, xt, logits, alpha_t, alpha_s, give_logits):
    """The rows of probabilities of a dense step's draws, normalised, (n, K); the step
    is the removal of noise where alpha_s is 1."""
    give_logits(model, lambda xt, sigma: logits)
    rows, sampler = [], model.sampler
    sampler.is_lean = False
    sampler.draw = lambda probs, generator: rows.append(probs) or probs.argmax(dim=-1)
    chain = Chain(model, torch.ones_like(xt, dtype=torch.bool), seeded(0))
    level_t = column(alpha_t, len(xt))
    if alpha_s == 1:
        sampler.remove_by_draw(chain, xt, level_t)
    else:
        sampler.step(chain, xt, Step(level_t, column(alpha_s, len(xt))))
    probs = torch.cat(rows)
    return probs / probs.sum(dim=-1, keepdim=True)


LEVELS = [(0.1, 0.4), (0.5, 0.51), (0.3, 1.0)]


@pytest.mark.parametrize(("alpha_t", "alpha_s"), LEVELS)
def test_analytic_is_the_ancestral_posterior_of_subs(
    make_model, absorbing_name, laws, generator, give_logits, alpha_t, alpha_s
):
    """With the score that SUBS implies, both kernels are the same to 1e-9."""
    p = torch.rand(8, 8, 7, dtype=torch.float64, generator=generator)
    p[..., 6] = 0
    p /= p.sum(dim=-1, keepdim=True)
    xt = torch.randint(7, (8, 8), generator=generator)
    xt[:, 0] = 6  # so that the network sees every sequence
    is_mask = xt == 6
    assert 8 < is_mask.sum() < 64
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=analytic")
    logits = laws.logits_for(model, p)
    analytic = dense_rows(model, xt, logits, alpha_t, alpha_s, give_logits)
    expected = model.posterior(
        p, xt=xt, alpha_t=column(alpha_t, 8), alpha_s=column(alpha_s, 8)
    )
    torch.testing.assert_close(analytic, expected[is_mask], rtol=0, atol=1e-9)
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=ancestral")
    ancestral = dense_rows(model, xt, logits, alpha_t, alpha_s, give_logits)
    torch.testing.assert_close(ancestral, expected[is_mask], rtol=0, atol=1e-9)


@pytest.mark.parametrize("is_lean", [True, False])
def test_analytic_leaves_no_mask_whatever_the_scores(make_model, give_logits, is_lean):
    """Scores far below the true ones would keep every mask at sigma = 0."""
    model = make_model("algo=sedd", "sampling.predictor=analytic")
    model.sampler.is_lean = is_lean
    logits = torch.full((1, 8, 7), -9.0)
    give_logits(model, lambda xt, sigma: logits.expand(len(xt), 8, 7))
    x = tokens_of(model, 4, seeded(0), num_steps=1)
    assert not (x == model.mask_index).any()


@pytest.mark.parametrize("predictor", ["ancestral", "analytic"])
def test_nucleus_acts_on_what_the_denoiser_believes(make_model, give_logits, predictor):
    """Both kernels reveal only tokens of the nucleus; what stays masked is the same."""
    p = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04, 0.0, 0.0], dtype=torch.float64)
    model = make_model(
        "algo=mdlm", f"sampling.predictor={predictor}", "sampling.p_nucleus=0.75"
    )
    stay = 0.25 / 0.75
    expected = torch.tensor([0.625, 0.375, 0, 0, 0, 0, 0]).double() * (1 - stay)
    expected[6] = stay
    logits = p.log().clamp(min=-1e6).expand(1, 8, 7)
    xt = torch.full((1, 8), 6)
    probs = dense_rows(model, xt, logits, 0.25, 0.75, give_logits)
    torch.testing.assert_close(probs, expected.expand(8, 7), rtol=0, atol=1e-9)


def test_analytic_keeps_revealed_tokens_under_either_compat(make_model):
    """Its transition is 0 from one token to another; algo.compat=reference lets only
    posterior draws of D3PM change what is revealed."""
    for compat in ("paper", "reference"):
        model = make_model(
            "algo=d3pm", "sampling.predictor=analytic", f"algo.compat={compat}"
        )
        step, pairs = model.sampler.step, []

        def noted(chain, xt, *rest, step=step, pairs=pairs):
            pairs.append((xt, step(chain, xt, *rest)))
            return pairs[-1][1]

        model.sampler.step = noted
        x = model.generate_samples(64, seeded(0)).tokens
        assert len(pairs) == model.sampler.num_steps
        for xt, xs in [*pairs, (pairs[-1][1], x)]:
            revealed = xt != model.mask_index
            assert torch.equal(xs[revealed], xt[revealed])
