"""Samplers that must agree: token for token under one seed, or in probabilities; and
the count of evaluations of the network.

Networks are float64 where tokens are compared, so that the size of a batch does not
show in them.
"""

from collections import Counter

import pytest
import torch

from models.attention import KVCache
from sampling.categorical import exponential_race
from sampling.prompts import Given
from sampling.registry import build_sampler
from sampling.reverse_process import Chain, Step, Tokens

B = 12
MODES = ("sampling.psi.high_mode", "sampling.psi.middle_mode", "sampling.psi.low_mode")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def use(model, predictor, is_lean=True, **psi):
    """Gives a model another sampler; the dense one draws in float64, too."""
    model.config.sampling.predictor = predictor
    model.config.sampling.psi.update(psi)
    model.sampler = build_sampler(model.config, type(model))
    if not is_lean:
        model.sampler.is_lean, model.sampler.draw = False, exponential_race


@pytest.fixture(params=[True, False], ids=["lean", "dense"])
def is_lean(request):
    return request.param


# ---------------------------------------------------------------- psi


@pytest.mark.parametrize("mode", ["pure-posterior", "constant-1"])
def test_psi_with_all_kappa_one_is_ancestral(make_model, diffusion_name, mode, is_lean):
    """Token for token, in every way of drawing."""
    model = make_model(f"algo={diffusion_name}", *(f"{key}={mode}" for key in MODES))
    use(model, "ancestral", is_lean)
    expected = model.generate_samples(B, seeded())
    use(model, "psi", is_lean)
    got = model.generate_samples(B, seeded())
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.evaluations, expected.evaluations)
    use(model, "psi", is_lean, middle_mode="constant-0.5")
    assert not torch.equal(model.generate_samples(B, seeded()).tokens, expected.tokens)


# ---------------------------------------------------------------- analytic


@pytest.mark.parametrize(
    ("alpha_t", "alpha_s"), [(0.1, 0.4), (0.5, 0.51), (1e-3, 0.2), (0.9, 0.999)]
)
def test_lean_analytic_reveals_as_the_ancestral_posterior_of_subs(
    make_model, absorbing_name, laws, generator, give_logits, alpha_t, alpha_s
):
    """(e^d - 1) S = (alpha_s - alpha_t) / (1 - alpha_t): just below that uniform all
    masks are revealed, as draws from p, and just above it none is."""
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=analytic")
    p = torch.rand(4, 8, 7, dtype=torch.float64, generator=generator)
    p[..., 6] = 0
    p /= p.sum(dim=-1, keepdim=True)
    logits = laws.logits_for(model, p)
    give_logits(model, lambda xt, sigma: logits)
    rows = []

    def draw(probs, generator):
        rows.append(probs / probs.sum(dim=-1, keepdim=True))
        return probs.argmax(dim=-1)

    model.sampler.draw = draw
    reveal = (alpha_s - alpha_t) / (1 - alpha_t)
    column = torch.ones(4, 1, dtype=torch.float64)
    step = Step(alpha_t * column, alpha_s * column)
    for u, reveals in ((reveal * (1 - 1e-9), True), (reveal * (1 + 1e-9), False)):
        xt = torch.full((4, 8), 6)
        chain = Chain(model, xt == 6, seeded())
        chain.uniform = lambda shape, u=u: torch.full(shape, u, dtype=torch.float64)
        xs = model.sampler.step(chain, xt, step)
        assert bool((xs != 6).all()) is reveals
        assert bool((xs == 6).all()) is not reveals
    torch.testing.assert_close(rows[0], p.flatten(0, 1), rtol=0, atol=1e-9)


def test_analytic_scores_sum_to_the_rate_of_reveal(
    make_model, absorbing_name, laws, generator
):
    """S = alpha_t / (1 - alpha_t) for the score that SUBS implies; the mask has no
    score."""
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=analytic")
    p = torch.rand(20, 7, dtype=torch.float64, generator=generator)
    p[..., 6] = 0
    p /= p.sum(dim=-1, keepdim=True)
    alpha_t = torch.rand(20, dtype=torch.float64, generator=generator)
    tokens = Tokens(
        rows=torch.arange(20),
        columns=torch.zeros(20, dtype=torch.long),
        logits=laws.logits_for(model, p),
        xt=torch.full((20,), 6),
        alpha_t=alpha_t,
        sigma=model.sigma(alpha_t),
    )
    scores = model.sampler.log_scores(model, tokens).exp()
    assert not scores[:, 6].any()
    torch.testing.assert_close(scores.sum(dim=-1), alpha_t / (1 - alpha_t))


# ---------------------------------------------------------------- cache, evaluations


def test_the_cache_changes_nothing_but_the_evaluations(
    make_model, absorbing_name, is_lean
):
    """Token for token; never more evaluations, and fewer where the network does not
    know the time and a dense step draws no change."""
    model = make_model(f"algo={absorbing_name}", "sampling.steps=24").double()
    use(model, "ancestral", is_lean)
    expected = model.generate_samples(B, seeded())
    use(model, "ancestral_cache", is_lean)
    got = model.generate_samples(B, seeded())
    assert torch.equal(got.tokens, expected.tokens)
    assert bool((got.evaluations <= expected.evaluations).all())
    has_fewer = bool((got.evaluations < expected.evaluations).any())
    assert has_fewer is (not is_lean and not model.time_conditioning)
    if not model.time_conditioning:
        assert bool((got.evaluations <= 8).all())  # of 8 masks, at worst one by one


def counted(model):
    """Rows that the trunk evaluates from now on, by their first token."""
    rows, trunk = Counter(), model.backbone.trunk

    def spy(x, *args, **kwargs):
        rows.update(x[:, 0].tolist())
        return trunk(x, *args, **kwargs)

    model.backbone.trunk = spy
    return rows


@pytest.mark.parametrize("use_float64", [True, False])
def test_evaluations_are_counted_for_each_sequence(
    make_model, sampling_pair, use_float64
):
    """Rows that the trunk sees; a given first token says whose they are."""
    predictor, name = sampling_pair
    model = make_model(
        f"algo={name}",
        f"sampling.predictor={predictor}",
        f"sampling.use_float64={use_float64}",
    )
    rows = counted(model)
    tokens = torch.arange(6)[:, None].expand(6, 8)
    given = Given(tokens, torch.arange(8).expand(6, 8) == 0)
    evaluations = model.generate_samples(6, seeded(), given=given).evaluations
    assert evaluations.dtype == torch.int64
    assert bool((evaluations > 0).all())
    if model.is_autoregressive:
        assert evaluations.tolist() == [7] * 6
        assert rows.total() == 42
    else:
        assert evaluations.tolist() == [rows[i] for i in range(6)]


def test_first_hitting_evaluates_once_a_token(make_model, absorbing_name):
    """Of those that are not given, whatever the number of steps."""
    model = make_model(f"algo={absorbing_name}", "sampling.predictor=first_hitting")
    known = torch.arange(8) < torch.tensor([[0], [3], [8]])
    given = Given(torch.zeros(3, 8, dtype=torch.long), known)
    for num_steps in (1, 100):
        samples = model.generate_samples(3, seeded(), num_steps, given=given)
        assert samples.evaluations.tolist() == [8, 5, 0]


def test_lean_steps_without_a_change_are_free(make_model, diffusion_name):
    """Never more evaluations than steps; many steps cost at most one a change."""
    model = make_model(f"algo={diffusion_name}")
    assert bool((model.generate_samples(B, seeded(), 3).evaluations <= 4).all())
    evaluations = model.generate_samples(B, seeded(), 200).evaluations
    if model.mask_index is not None:
        assert bool((evaluations <= 8).all())
    assert bool((evaluations < 100).all())


# ---------------------------------------------------------------- autoregressive


@pytest.mark.parametrize("start", [1, 3, 7])
def test_cached_logits_are_those_of_the_whole_prefix(make_model, generator, start):
    """At every position, the first `start` tokens going in at once; to 1e-5."""
    model = make_model("algo=ar")
    x = torch.randint(6, (5, 8), generator=generator)
    cache, new = KVCache(8), x[:, :start]
    for position in range(start, 9):
        hidden = model.hidden(new, cache)[:, -1]
        got = model.process_logits(model.logits_for_loss(hidden))
        expected = model.next_token(x[:, :position])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        new = x[:, position : position + 1]
    assert cache.length == 8


@pytest.mark.parametrize("start", [1, 4])
@pytest.mark.parametrize("p_nucleus", [1.0, 0.7])
def test_autoregressive_samples_are_those_of_a_slow_loop(make_model, start, p_nucleus):
    """The whole prefix anew for each token, with the same uniforms."""
    model = make_model("algo=ar", f"sampling.p_nucleus={p_nucleus}")
    sampler, prompt = model.sampler, torch.tensor([0, 5, 3, 1])[:start]
    x = prompt.expand(B, start)
    generator = seeded()
    with torch.no_grad():
        while x.shape[1] < 8:
            probs = model.next_token(x).double().exp()
            probs = probs / probs.sum(dim=-1, keepdim=True)
            if p_nucleus < 1:
                order = probs.argsort(dim=-1, descending=True)
                ordered = probs.gather(-1, order)
                before = ordered.cumsum(dim=-1) - ordered
                ordered = ordered.masked_fill(before > p_nucleus, 0)
                probs = torch.zeros_like(probs).scatter(-1, order, ordered)
            new = sampler.draw(probs, generator)
            x = torch.cat([x, new[:, None]], dim=1)
    tokens = torch.zeros(B, 8, dtype=torch.long)
    tokens[:, :start] = prompt
    given = Given(tokens, torch.arange(8).expand(B, 8) < start)
    samples = model.generate_samples(B, seeded(), given=given)
    assert torch.equal(samples.tokens, x)
    assert len(x.unique(dim=0)) > 3
    assert samples.evaluations.tolist() == [8 - start] * B


def test_prompts_of_several_lengths_are_continued_as_if_alone(make_model):
    """What some sequences were not given is drawn; the others' tokens stay."""
    model = make_model("algo=ar", "sampling.p_nucleus=0")
    lengths = torch.tensor([1, 3, 6])
    tokens = torch.tensor([[0, 4, 2, 2, 5, 1, 3, 3]]).expand(3, 8)
    given = Given(tokens, torch.arange(8) < lengths[:, None])
    got = model.generate_samples(3, seeded(), given=given).tokens
    for row, length in enumerate(lengths.tolist()):
        x = tokens[row : row + 1, :length]
        while x.shape[1] < 8:
            best = model.next_token(x).argmax(dim=-1, keepdim=True)
            x = torch.cat([x, best], dim=1)
        assert torch.equal(got[row], x[0])
