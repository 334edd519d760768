"""Guided samples against exact enumeration over two tokens: K = 5, two classes.

The network is a fixed table for each class and one for "no class", each depending on
all of x_t. Every sampler mixes the laws of a whole step,

    q proportional to q_cond^w q_uncond^(1 - w),

which is written out here. Chi-square tests of 20 000 samples of one seed at 1e-3 for
all of them together (Bonferroni).
"""

import enumeration
import pytest
import torch
from enumeration import KERNELS, Belief, ancestral, configure, p_value
from tiny import ALGORITHMS, SAMPLING, StubTokenizer
from torch import Tensor

from diffusion.absorbing import AbsorbingState
from sampling.guidance import guided_posterior

K, L, N, SEED = 5, 2, 20_000, 1
NONE = 2  # the label of no class
WEIGHTS = (None, 0.0, 0.5, 1.0, 2.5)
PAIRS = [pair for pair in SAMPLING if ALGORITHMS[pair[1]].takes_labels]
IDS = ["-".join(pair) for pair in PAIRS]
NUM_TESTS = 2 * (len(PAIRS) * len(WEIGHTS) + 3 * len(PAIRS))  # at most; two classes
SIGNIFICANCE = 1e-3 / NUM_TESTS
MIXED = {"psi__high_mode": "constant-0.3", "psi__middle_mode": "pure-pc"}


class Beliefs:
    """A `Belief` of each class and of none, by label."""

    def __init__(self, is_timed: bool, shift: float) -> None:
        self.each = [Belief(is_timed, shift, seed) for seed in range(3)]

    def __call__(
        self, xt: Tensor, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            return self.each[NONE](xt, sigma)
        logits = torch.stack([belief(xt, sigma) for belief in self.each])
        return logits[labels, torch.arange(len(xt))]


@pytest.fixture
def build(make_model, give_logits, monkeypatch):
    """A model of two tokens with classes, and its beliefs."""
    states = torch.cartesian_prod(torch.arange(K), torch.arange(K))
    monkeypatch.setattr(enumeration, "K", K)
    monkeypatch.setattr(enumeration, "STATES", states)

    def build(predictor, name, **sampling):
        overrides = f"algo={name}", f"sampling.predictor={predictor}"
        model = make_model(
            *overrides, "data.num_classes=2", tokenizer=StubTokenizer(K - 1)
        )
        assert model.vocab_size == K
        model.num_tokens = L
        is_score = model.config.algo.parameterization == "score"
        beliefs = Beliefs(model.time_conditioning, -1.2 if is_score else 0.0)
        give_logits(model, beliefs)
        configure(model, **(MIXED if predictor == "psi" else {}), **sampling)
        return model, beliefs.each

    return build


# ---------------------------------------------------------------- enumeration


def mix(q_cond: Tensor, q_uncond: Tensor, weight: float | None) -> Tensor:
    """The law of guided tokens, written out, (..., K)."""
    if not weight:
        return q_uncond
    q = q_cond**weight * q_uncond ** (1 - weight)
    q = torch.where((q_cond > 0) & (q_uncond > 0), q, 0)
    total = q.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, q / total, q_cond)


def step_law(model, pair, weight, alpha_t, alpha_s, kappa) -> Tensor:
    """Of each position given the joint state, (S, L, K)."""
    predictor = model.config.sampling.predictor

    def mixed(kernel, alpha_s):
        laws = [kernel(model, belief, alpha_t, alpha_s) for belief in pair]
        return mix(*laws, weight)

    if predictor == "psi":
        x0 = mixed(ancestral, torch.ones_like(alpha_s))
        noised = model.marginal(x0, alpha_s)
        return kappa * mixed(ancestral, alpha_s) + (1 - kappa) * noised
    return mixed(KERNELS[predictor], alpha_s)


def enumerated(model, pair, weight, num_steps: int) -> Tensor:
    """Exact distribution of samples, (K, K); noise removal is a last step."""
    prior = torch.full((L, K), 1 / K, dtype=torch.float64)
    if isinstance(model, AbsorbingState):
        prior = torch.eye(K).double()[[model.mask_index] * L]
    joint = torch.outer(*prior)
    plan = model.sampler.plan(model.noise, num_steps)
    last = plan[-1].alpha_s
    steps = [*plan, (last, torch.ones_like(last), 1.0)]
    if model.config.sampling.noise_removal == "greedy":
        steps.pop()
    for alpha_t, alpha_s, kappa in steps:
        levels = (level.double().view(1, 1) for level in (alpha_t, alpha_s))
        rows = step_law(model, pair, weight, *levels, kappa)
        joint = torch.einsum("s,sa,sb->ab", joint.flatten(), rows[:, 0], rows[:, 1])
    if model.config.sampling.noise_removal != "greedy":
        return joint
    laws = [enumeration.x_theta(model, belief, last.view(1, 1)) for belief in pair]
    best = mix(*laws, weight).argmax(dim=-1)  # (S, L)
    if isinstance(model, AbsorbingState):
        states = enumeration.STATES
        best = torch.where(states == model.mask_index, best, states)
    flat = torch.zeros(K * K, dtype=torch.float64)
    return flat.index_add(0, best[:, 0] * K + best[:, 1], joint.flatten()).view(K, K)


def counts_of(model, label: int | None, num_steps: int) -> Tensor:
    """How often each pair of tokens occurs in N samples of a class, (K, K)."""
    labels = None if label is None else torch.full((N,), label)
    generator = torch.Generator().manual_seed(SEED)
    x = model.generate_samples(N, generator, num_steps, labels=labels).tokens
    return (x[:, 0] * K + x[:, 1]).bincount(minlength=K * K).view(K, K)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize(("predictor", "name"), PAIRS, ids=IDS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_guided_samples_follow_the_enumeration(
    build, monkeypatch, predictor, name, weight
):
    """Of every sampler and algorithm, for each class, for every kind of weight."""
    model, beliefs = build(predictor, name, guid_weight=weight)
    for label in (0, 1):
        pair = beliefs[label], beliefs[NONE]
        if predictor in enumeration.JOINTS:
            plain = enumeration.x_theta
            with monkeypatch.context() as patch:
                patch.setattr(
                    enumeration,
                    "x_theta",
                    lambda model, pair, alpha_t, plain=plain, **raw: mix(
                        *(plain(model, x, alpha_t, **raw) for x in pair), weight
                    ),
                )
                expected = enumeration.JOINTS[predictor](model, pair, 3)
        else:
            expected = enumerated(model, pair, weight, 3)
        assert p_value(counts_of(model, label, 3), expected) > SIGNIFICANCE


@pytest.mark.parametrize(
    "setting",
    [{"noise_removal": "greedy"}, {"p_nucleus": 0.8}, {"use_float64": False}],
    ids=lambda setting: next(iter(setting)),
)
@pytest.mark.parametrize("predictor", ["ancestral", "psi"])
@pytest.mark.parametrize("name", ["mdlm", "duo_base"])
def test_guidance_holds_with_other_settings(build, predictor, name, setting):
    """The greedy end, the nucleus (of each law), float32 draws."""
    model, beliefs = build(predictor, name, guid_weight=2.0, **setting)
    expected = enumerated(model, (beliefs[0], beliefs[NONE]), 2.0, 3)
    assert p_value(counts_of(model, 0, 3), expected) > SIGNIFICANCE
    other = enumerated(model, (beliefs[1], beliefs[NONE]), 2.0, 3)
    assert p_value(counts_of(model, 0, 3), other) < SIGNIFICANCE


@pytest.mark.parametrize(("predictor", "name"), PAIRS, ids=IDS)
def test_without_labels_there_is_no_class(build, predictor, name):
    """Nor with them where the weight is 0: the same samples of a seed."""
    model, _ = build(predictor, name, guid_weight=0.0)
    assert torch.equal(counts_of(model, None, 2), counts_of(model, 0, 2))


def test_a_guided_step_is_one_call_of_twice_the_batch(build, monkeypatch):
    """Both laws are evaluated as one batch, and counted as two evaluations."""
    model, _ = build("ancestral", "mdlm", guid_weight=3.0)
    asked, hidden = [], model.hidden

    def noted(xt, sigma, labels):
        asked.append(labels.tolist())
        return hidden(xt, sigma, labels)

    monkeypatch.setattr(model, "hidden", noted)
    samples = model.generate_samples(2, num_steps=1, labels=torch.tensor([1, 0]))
    assert asked == [[1, 0, NONE, NONE]] * len(asked)
    assert samples.evaluations.tolist() == [2 * len(asked)] * 2


def test_labels_that_cannot_be_are_refused(make_model, build):
    model, _ = build("ancestral", "mdlm", guid_weight=1.0)
    with pytest.raises(ValueError, match="guid_weight needs labels"):
        model.generate_samples(2)
    with pytest.raises(ValueError, match="models with classes"):
        make_model("algo=mdlm").generate_samples(2, labels=torch.zeros(2).long())


def test_a_mixture_of_equal_laws_is_that_law():
    """Whatever the weight; and tokens that one of them excludes are excluded."""
    q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    for weight in (None, 0.0, 0.3, 1.0, 4.0):
        torch.testing.assert_close(guided_posterior(q, q, weight), q)
    other = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]], dtype=torch.float64)
    mixed = guided_posterior(q, other, 2.0)
    assert mixed[0].tolist() == [0.0, 1.0, 0.0]
    apart = torch.tensor([[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    assert torch.equal(guided_posterior(q, apart, 2.0)[0], q[0])  # no common token
