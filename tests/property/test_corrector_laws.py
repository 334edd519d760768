"""Laws of uniform states by enumeration of K = 3, L = 3: what a network that has learnt
a joint distribution says, the Gibbs corrector, and samples with it.

The network is the exact leave-one-out denoiser of a joint, which depends on all of x_t
and on the time. Shapes: S = K^L states, kernels (S, S) with rows x_t.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from enumeration import configure, p_value
from tiny import StubTokenizer

from sampling.correctors import CERTAINTIES, Gibbs
from sampling.prompts import Given
from sampling.reverse_process import Chain

K = L = 3
N = 100_000
STATES = torch.cartesian_prod(*[torch.arange(K)] * L)  # (S, L)
S = len(STATES)
ONEHOT = F.one_hot(STATES, K).double()  # (S, L, K)
SIGNIFICANCE = 1e-3 / 40  # of all chi-square tests of this file together
LEVELS = [1e-6, 0.001, 0.2, 0.7, 0.99, 1 - 1e-6]


def some_joint(seed=0):
    """Of three tokens that depend on each other, (S,)."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(S, dtype=torch.float64, generator=generator)).softmax(0)


def channel(alpha):
    """q(x_t | x_0) of one token, rows x_0, (K, K)."""
    return alpha * torch.eye(K, dtype=torch.float64) + (1 - alpha) / K


def joint_of_both(joint, alpha, but=None):
    """p(x_0, x_t) with rows x_t, (S, S); without the noise of one position, if any."""
    p = joint.expand(S, S)
    for i in range(L):
        if i != but:
            p = p * channel(alpha)[STATES[:, i]][:, STATES[:, i]].T
    return p


def marginal_of(joint, alpha):
    """p_t(x_t), (S,)."""
    return joint_of_both(joint, alpha).sum(dim=1)


def by_token(p):
    """From p(x_0, ...) with rows x_t to p(x_0^i = v | ...), (S, L, K)."""
    p = torch.einsum("tx,xiv->tiv", p, ONEHOT)
    return p / p.sum(dim=-1, keepdim=True)


def leave_one_out(joint, alpha):
    """p(x_0^i = v | x_t without i), (S, L, K)."""
    each = [by_token(joint_of_both(joint, alpha, but=i))[:, i] for i in range(L)]
    return torch.stack(each, dim=1)


def index_of(x):
    """Numbers of states (B, L), (B,)."""
    return x @ torch.tensor([K * K, K, 1])


def counts_of(x):
    return index_of(x).bincount(minlength=S)


@pytest.fixture
def build(make_model, give_logits):
    """A model whose network is the leave-one-out denoiser of a joint."""

    def build(joint, *overrides, **sampling):
        model = make_model("algo=duo_base", *overrides, tokenizer=StubTokenizer(K - 1))
        assert model.vocab_size == K
        model.num_tokens = L

        def logits(xt, sigma, labels=None):
            table = leave_one_out(joint, float(torch.exp(-sigma[0, 0]))).log()
            return table[index_of(xt)]

        give_logits(model, logits)
        configure(model, **sampling)
        return model

    return build


def chain_of(model, size, seed=0):
    free = torch.ones(size, L, dtype=torch.bool)
    return Chain(model, free, torch.Generator().manual_seed(seed))


def column(alpha, size):
    return torch.full((size, 1), alpha, dtype=torch.float64)


# ---------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("alpha", LEVELS)
def test_the_denoiser_is_that_of_the_leave_one_out_one(build, alpha):
    """And back, to 1e-12 of what enumeration says, in float64."""
    joint = some_joint()
    model = build(joint)
    loo = leave_one_out(joint, alpha).log()
    denoiser = by_token(joint_of_both(joint, alpha)).log()
    levels = {"xt": STATES, "alpha_t": column(alpha, S)}
    got = model.denoiser_of(loo + 5, **levels)  # up to a constant
    torch.testing.assert_close(got.exp(), denoiser.exp(), rtol=1e-12, atol=1e-12)
    got = model.leave_one_out_of(denoiser, **levels)
    torch.testing.assert_close(got.exp(), loo.exp(), rtol=1e-9, atol=1e-12)
    there_and_back = model.leave_one_out_of(model.denoiser_of(loo, **levels), **levels)
    torch.testing.assert_close(there_and_back.exp(), loo.exp(), rtol=1e-9, atol=1e-12)


def test_conversions_at_the_end_of_time_are_finite(build):
    """At alpha = 1 the denoiser is x_t."""
    model = build(some_joint())
    levels = {"xt": STATES, "alpha_t": column(1.0, S)}
    loo = torch.zeros(S, L, K, dtype=torch.float64)
    denoiser = model.denoiser_of(loo, **levels)
    torch.testing.assert_close(denoiser.exp(), ONEHOT, rtol=0, atol=1e-12)
    assert bool(model.leave_one_out_of(denoiser, **levels).isfinite().all())


@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.1, 0.4), (0.6, 0.95), (0.9, 1.0)])
def test_the_posterior_of_leave_one_out_is_the_true_one(build, alpha_t, alpha_s):
    """p(x_s^i | x_t) of the joint: what x_theta has to be (and not the denoiser)."""
    joint = some_joint()
    model = build(joint)
    r = alpha_t / alpha_s
    both = marginal_of(joint, alpha_s) * torch.stack(
        [channel(r)[:, STATES[:, i]][STATES[:, i]] for i in range(L)]
    ).prod(dim=0)  # p(x_s, x_t), rows x_t; the channel is symmetric
    expected = by_token(both)
    levels = {
        "xt": STATES,
        "alpha_t": column(alpha_t, S),
        "alpha_s": column(alpha_s, S),
    }
    got = model.posterior(leave_one_out(joint, alpha_t), **levels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    denoiser = by_token(joint_of_both(joint, alpha_t))
    assert (model.posterior(denoiser, **levels) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", LEVELS)
def test_the_conditional_of_a_token_is_the_marginal_of_leave_one_out(build, alpha):
    """p(x_t^i = v | x_t without i), which the corrector draws from."""
    joint = some_joint()
    p_t = marginal_of(joint, alpha)
    got = build(joint).marginal(leave_one_out(joint, alpha), column(alpha, S))
    for i in range(L):
        others = [j for j in range(L) if j != i]
        same = (STATES[:, None, others] == STATES[:, others]).all(dim=-1)
        expected = same.double() * p_t @ ONEHOT[:, i]
        expected = expected / expected.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(got[:, i], expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the corrector


@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("sweeps", [1, 6])
def test_single_redraws_keep_the_law(build, use_float64, alpha, sweeps):
    """100 000 draws of p_t, each redrawn some times, are draws of p_t."""
    joint = some_joint()
    model = build(
        joint, use_float64=use_float64, corrector="gibbs", corrector_steps=sweeps
    )
    p_t = marginal_of(joint, alpha)
    generator = torch.Generator().manual_seed(1)
    xt = STATES[p_t.multinomial(N, replacement=True, generator=generator)]
    sampler, chain = model.sampler, chain_of(model, N)
    new = sampler.corrector(sampler, chain, xt, column(alpha, N))
    assert p_value(counts_of(new), p_t) > SIGNIFICANCE
    changed = (new != xt).sum(dim=-1)
    assert 0 < changed.max() <= sweeps
    if alpha == 0.5:  # what starts elsewhere is not there yet
        start = STATES[torch.zeros(N, dtype=torch.long)]
        early = sampler.corrector(sampler, chain, start, column(alpha, N))
        assert p_value(counts_of(early), p_t) < SIGNIFICANCE


def test_redraws_lead_to_the_law(build):
    """From anywhere, in many sweeps; not if all are redrawn at once."""
    joint, alpha = some_joint(), 0.7
    p_t = marginal_of(joint, alpha)
    start = STATES[torch.zeros(N, dtype=torch.long)]
    for parallel, is_right in ((1, True), (3, False)):
        model = build(
            joint,
            corrector="gibbs",
            corrector_steps=40,
            corrector_parallel=parallel,
        )
        sampler, chain = model.sampler, chain_of(model, N)
        new = sampler.corrector(sampler, chain, start, column(alpha, N))
        assert (p_value(counts_of(new), p_t) > SIGNIFICANCE) is is_right


def redraw_kernel(joint, alpha):
    """Of one position at random, (S, S)."""
    law = alpha * leave_one_out(joint, alpha) + (1 - alpha) / K
    kernels = []
    for i in range(L):
        rows = ONEHOT.clone()
        rows[:, i] = law[:, i]
        kernels.append(as_kernel(rows))
    return sum(kernels) / L


def as_kernel(rows):
    """Of positions that are drawn independently, (S, L, K) -> (S, S)."""
    return torch.einsum("sa,sb,sc->sabc", *rows.unbind(dim=1)).reshape(S, S)


def enumerated(model, joint, num_steps):
    """The law of samples of ancestral or psi, corrected as the config says, (S,)."""
    sampling = model.config.sampling
    p = torch.full((S,), 1 / S, dtype=torch.float64)
    plan = model.sampler.plan(model.noise, num_steps)
    last = plan[-1].alpha_s
    for alpha_t, alpha_s, kappa in [*plan, (last, torch.ones_like(last), 1.0)]:
        loo = leave_one_out(joint, float(alpha_t))
        levels = {"xt": STATES, "alpha_t": alpha_t.view(1, 1)}
        one = torch.ones(1, 1, dtype=torch.float64)
        rows = model.posterior(loo, alpha_s=alpha_s.view(1, 1), **levels)
        noised = model.marginal(
            model.posterior(loo, alpha_s=one, **levels), alpha_s.view(1, 1)
        )
        p = p @ as_kernel(kappa * rows + (1 - kappa) * noised)
        t = float(model.noise.inverse(alpha_s))
        is_last = float(alpha_s) == 1
        in_window = sampling.corrector_t_min <= t <= sampling.corrector_t_max
        if sampling.corrector and in_window and not is_last:
            for _ in range(sampling.corrector_steps):
                p = p @ redraw_kernel(joint, float(alpha_s))
    return p


SETTINGS = {
    "ancestral": {},
    "two sweeps": {"corrector_steps": 2},
    "window": {"corrector_t_min": 0.2, "corrector_t_max": 0.8},
    "psi": {"predictor": "psi", "psi__middle_mode": "constant-0.5"},
}


@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_corrected_samples_follow_the_enumeration(build, setting, use_float64):
    joint = some_joint()
    settings = {"corrector": "gibbs", **SETTINGS[setting], "use_float64": use_float64}
    model = build(joint, **settings)
    x = model.generate_samples(N, torch.Generator().manual_seed(1), 4).tokens
    expected = enumerated(model, joint, 4)
    assert p_value(counts_of(x), expected) > SIGNIFICANCE
    model.config.sampling.corrector = None
    assert p_value(counts_of(x), enumerated(model, joint, 4)) < SIGNIFICANCE


def distance(p, q):
    return float((p - q).abs().sum() / 2)  # total variation


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("evaluations", [8, 16, 32])
def test_a_corrector_is_worth_its_evaluations(build, seed, evaluations):
    """Half as many steps, each with a redraw of one token, come closer to the joint
    than all steps alone: at least by a fifth in total variation. The network runs as
    often."""
    joint = some_joint(seed)
    model = build(joint, use_float64=False)  # where every step runs the network
    plain = enumerated(model, joint, evaluations)
    counts = model.generate_samples(2, num_steps=evaluations).evaluations
    configure(model, corrector="gibbs")
    corrected = enumerated(model, joint, evaluations // 2)
    again = model.generate_samples(2, num_steps=evaluations // 2).evaluations
    assert torch.equal(again, counts)
    assert distance(corrected, joint) < 0.8 * distance(plain, joint)


# ---------------------------------------------------------------- which positions


def test_given_tokens_are_not_redrawn(build):
    """By any choice of positions, however many are asked for."""
    for select in CERTAINTIES:
        model = build(
            some_joint(),
            corrector="gibbs",
            corrector_parallel=7,
            corrector_select=select,
        )
        known = torch.tensor([[True, False, False], [True, True, True]] * 50)
        tokens = torch.tensor([[1, 0, 2], [2, 1, 1]] * 50)
        generator = torch.Generator().manual_seed(0)
        given = Given(tokens, known)
        samples = model.generate_samples(100, generator, 4, given=given)
        assert torch.equal(samples.tokens[known], tokens[known])
        assert samples.evaluations[1::2].tolist() == [0] * 50
        assert len(samples.tokens[::2].unique(dim=0)) > 3


@pytest.mark.parametrize("select", [name for name in CERTAINTIES if name != "random"])
def test_the_least_certain_position_is_redrawn(build, select):
    """At temperature 0, by what the network says, at any temperature of samples."""
    joint, alpha = some_joint(), 0.6
    loo = leave_one_out(joint, alpha)
    top = loo.sort(dim=-1, descending=True).values
    certainty = {
        "lowest_max": top[..., 0],
        "lowest_current": loo.gather(-1, STATES[..., None])[..., 0],
        "lowest_margin": top[..., 0] / top[..., 1],
    }[select]
    settings = {"corrector_select": select, "corrector_temperature": 0}
    for temperature in (1.0, 0.0):
        model = build(joint, corrector="gibbs", temperature=temperature, **settings)
        sampler, changed = model.sampler, torch.zeros(S, L, dtype=torch.bool)
        for seed in range(30):
            chain = chain_of(model, S, seed)
            new = sampler.corrector(sampler, chain, STATES, column(alpha, S))
            changed |= new != STATES
            assert chain.evaluations.tolist() == [1] * S
        lowest = F.one_hot(certainty.argmin(dim=-1), L).bool()
        assert not bool((changed & ~lowest).any())
        assert changed.any(dim=-1).double().mean() > 0.9


def test_a_temperature_of_the_choice_lets_others_be_redrawn(build):
    """Drawn with weights exp(-certainty / temperature)."""
    joint, alpha = some_joint(), 0.6
    loo = leave_one_out(joint, alpha)
    can_show = (loo.argmin(dim=-1) != STATES).all(dim=-1)
    state = int(can_show.nonzero()[0])
    weights = loo[state].amax(dim=-1) ** -2.0  # at temperature 1/2
    model = build(
        joint,
        corrector="gibbs",
        corrector_select="lowest_max",
        corrector_temperature=0.5,
    )
    sampler, xt = model.sampler, STATES[state].expand(N, L)
    model.sampler.draw = lambda probs, generator: probs.argmin(dim=-1)
    new = sampler.corrector(sampler, chain_of(model, N), xt, column(alpha, N))
    found = (new != xt).sum(dim=0)
    assert found.sum() == N
    assert p_value(found, weights / weights.sum()) > SIGNIFICANCE


@pytest.mark.parametrize("select", CERTAINTIES)
def test_certain_positions_are_redrawn_as_well(build, give_logits, select):
    """A given token does not take their place, however certain the network is."""
    model = build(
        some_joint(), corrector="gibbs", corrector_parallel=2, corrector_select=select
    )
    logits = torch.tensor([0.0, -torch.inf, -torch.inf], dtype=torch.float64)
    give_logits(model, lambda xt, sigma: logits.expand(*xt.shape, K))
    sampler, xt = model.sampler, torch.ones(50, L, dtype=torch.long)
    free = torch.tensor([False, True, True]).expand(50, L)
    chain = Chain(model, free, torch.Generator().manual_seed(0))
    new = sampler.corrector(sampler, chain, xt, column(1.0, 50))
    assert new.tolist() == [[1, 0, 0]] * 50


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_as_many_are_redrawn_as_asked_for(build, monkeypatch, parallel):
    """Each set of positions as often, and the head sees no others."""
    model = build(some_joint(), corrector="gibbs", corrector_parallel=parallel)
    asked, tokens = [], Chain.tokens

    def noted(chain, xt, alpha_t, where):
        asked.append(where)
        return tokens(chain, xt, alpha_t, where)

    monkeypatch.setattr(Chain, "tokens", noted)
    sampler, chain = model.sampler, chain_of(model, N)
    xt = STATES[torch.zeros(N, dtype=torch.long)]
    sampler.corrector(sampler, chain, xt, column(1.0, N))  # nothing turns to noise
    (where,) = asked
    assert bool((where.sum(dim=-1) == parallel).all())
    sets = [sum(1 << i for i in c) for c in itertools.combinations(range(L), parallel)]
    found = (where * torch.tensor([1, 2, 4])).sum(dim=-1).bincount(minlength=8)
    assert bool((found[sets] / N - 1 / len(sets)).abs().max() < 0.01)
    asked.clear()
    chain = chain_of(model, N)
    sampler.corrector(sampler, chain, xt, column(0.25, N))
    share = float(asked[0].double().mean())
    assert share == pytest.approx(0.25 * parallel / L, abs=0.01)
    ran = asked[0].any(dim=-1)
    assert torch.equal(chain.evaluations, ran.long())


# ---------------------------------------------------------------- guidance, windows


def test_a_guided_corrector_draws_from_the_mixed_law(build, make_model, give_logits):
    """q_cond^w q_uncond^(1 - w) of the two conditionals."""
    joints, weight, alpha = (some_joint(0), some_joint(1)), 2.0, 0.6
    model = build(
        joints[0], "data.num_classes=2", corrector="gibbs", guid_weight=weight
    )

    def logits(xt, sigma, labels):
        both = [leave_one_out(joint, alpha).log()[index_of(xt)] for joint in joints]
        return torch.where((labels == 0)[:, None, None], *both)

    give_logits(model, logits)
    sampler, rows = model.sampler, []

    def draw(probs, generator):
        rows.append(probs)
        return probs.argmax(dim=-1)

    sampler.draw = draw
    conditions = torch.zeros(S).long(), torch.full((S,), 2)
    free = torch.ones(S, L, dtype=torch.bool)
    chain = Chain(model, free, torch.Generator().manual_seed(0), conditions=conditions)
    sampler.corrector.parallel = 3
    sampler.corrector(sampler, chain, STATES, column(alpha, S))
    q, r = (alpha * leave_one_out(j, alpha) + (1 - alpha) / K for j in joints)
    expected = q**weight * r ** (1 - weight)
    expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.cat(rows).view(S, L, K), expected)


@pytest.mark.parametrize(
    ("window", "expected"),
    [((0, 1), 8), ((0.2, 0.8), 5), ((0, 0.4), 4), ((1e-5, 1e-5), 1)],
)
def test_the_window_is_of_the_times_after_steps(make_model, window, expected):
    """Both ends included; the times are nearly 7/8, 6/8, ..., and 1e-5."""
    model = make_model("algo=duo_base", "sampling.steps=8", "sampling.corrector=gibbs")
    configure(model, corrector_t_min=window[0], corrector_t_max=window[1])
    plan, due = model.sampler.plan(model.noise, 8), model.sampler.corrector.is_due
    assert sum(due(model.noise, step.alpha_s) for step in plan) == expected


def test_a_corrector_is_built_from_settings_alone(compose):
    config = compose("algo=duo_base", "sampling.corrector=gibbs").sampling
    corrector = Gibbs(config)
    assert (corrector.num_sweeps, corrector.parallel) == (1, 1)
