"""Samplers by enumeration: the distribution of two tokens over all K^2 joint states,
step by step over the sampler's plan, in float64; and the comparison with samples.

Shapes: K = 7 tokens, L = 2 positions, S = K^2 states; kernels are (S, L, K), the
distribution of each position's next token given the joint state.
"""

import torch
import torch.nn.functional as F
from numpy.polynomial.legendre import leggauss
from scipy.stats import chisquare
from torch import Tensor

from diffusion.absorbing import AbsorbingState
from sampling.categorical import nucleus
from sampling.prompts import Given
from sampling.registry import build_sampler

K, L, N = 7, 2, 100_000
STATES = torch.cartesian_prod(torch.arange(K), torch.arange(K))  # (S, L)


class Belief:
    """A denoiser of two tokens, a fixed table: raw logits by position and by the whole
    of x_t, and mildly by time where the model is conditioned on it.

    Args:
        is_timed: Whether they depend on the time.
        shift: Added to all; a score model's scores then sum to 0.2 to 3 of what they
            should.
    """

    def __init__(self, is_timed: bool, shift: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = (K, K, L, K), (L, K)
        self.table, slope = (
            torch.randn(shape, dtype=torch.float64, generator=generator)
            for shape in shapes
        )
        self.table = self.table + shift
        self.slope = is_timed * slope

    def __call__(self, xt: Tensor, sigma: Tensor) -> Tensor:
        """Logits for ids (B, L) and sigma (B, 1), (B, L, K)."""
        return self.table[*xt.unbind(-1)] + torch.exp(-sigma)[..., None] * self.slope


def pair_model(make_model, give_logits, *overrides: str, is_timed: bool | None = None):
    """A model of two tokens whose network is a `Belief`, and the belief."""
    model = make_model(*overrides)
    model.num_tokens = L
    if is_timed is None:
        is_timed = model.time_conditioning
    is_score = model.config.algo.parameterization == "score"
    belief = Belief(is_timed, shift=-1.2 if is_score else 0.0)
    give_logits(model, belief)
    return model, belief


def configure(model, **sampling) -> None:
    """Changes `sampling.*` of a model; psi__mode is psi.mode."""
    for key, value in sampling.items():
        section, _, name = key.rpartition("__")
        target = model.config.sampling[section] if section else model.config.sampling
        target[name] = value
    model.sampler = build_sampler(model.config, type(model))


# ---------------------------------------------------------------- kernels


def x_theta(model, belief: Belief, alpha_t: Tensor, is_raw: bool = False) -> Tensor:
    """Probabilities of clean tokens in every state, (S, L, K), temperature and nucleus
    applied if not raw."""
    logits = belief(STATES, -alpha_t.log().expand(len(STATES), 1))
    if isinstance(model, AbsorbingState):
        logits[..., model.mask_index] = -torch.inf
    p = logits.softmax(dim=-1)
    return p if is_raw else truncated(model, p)


def truncated(model, p: Tensor) -> Tensor:
    """p^(1 / temperature), then the nucleus, normalised, (..., K)."""
    p = p ** (1 / model.sampler.temperature)
    return nucleus(p / p.sum(dim=-1, keepdim=True), model.sampler.p_nucleus)


def ancestral(model, belief, alpha_t, alpha_s, kappa=1.0) -> Tensor:
    levels = {"xt": STATES, "alpha_t": alpha_t}
    p = x_theta(model, belief, alpha_t)
    return model.posterior(p, alpha_s=alpha_s, **levels)


def psi(model, belief, alpha_t, alpha_s, kappa=1.0) -> Tensor:
    """kappa q(x_s | x_t) + (1 - kappa) sum_x0 q(x_s | x_0) q(x_0 | x_t)."""
    x0 = ancestral(model, belief, alpha_t, torch.ones_like(alpha_s))
    predicted = model.marginal(x0, alpha_s)
    return kappa * ancestral(model, belief, alpha_t, alpha_s) + (1 - kappa) * predicted


def analytic(model, belief, alpha_t, alpha_s, kappa=1.0) -> Tensor:
    """staggered(y) transition(y) at masks, normalised; to alpha_s = 1 without what
    would stay masked."""
    m, d = model.mask_index, (alpha_s / alpha_t).log()[..., None]
    scores = true_scores(model, belief, alpha_t)
    scores[..., m] = 1
    staggered = d.exp() * scores
    staggered[..., m] += ((1 - d.exp()) * scores).sum(dim=-1)
    transition = (1 - (-d).exp()).expand_as(scores).clone()
    transition[..., m] += (-d).exp()[..., 0]
    probs = (staggered * transition).clamp(min=0)
    if bool((alpha_s == 1).all()):
        probs[..., m] = 0
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.where((m == STATES)[..., None], probs, F.one_hot(STATES, K).double())


def true_scores(model, belief, alpha_t) -> Tensor:
    """s(y) = p_t(y) / p_t(m) that the belief means, 0 for the mask, (S, L, K)."""
    m, sigma = model.mask_index, -alpha_t.log()[..., None]
    logits = belief(STATES, sigma[..., 0].expand(len(STATES), 1))
    if model.config.algo.parameterization == "subs":
        logits[..., m] = -torch.inf
    if model.config.algo.parameterization == "score":
        scores = logits.exp() / (torch.expm1(sigma) * (K - 1))
    else:  # what D3PM believes of the mask is nobody's score
        scores = logits.softmax(dim=-1) * (alpha_t / (1 - alpha_t))[..., None]
    scores[..., m] = 0
    total = scores.sum(dim=-1, keepdim=True)
    return truncated(model, scores / total) * total


KERNELS = {
    "ancestral": ancestral,
    "ancestral_cache": ancestral,
    "analytic": analytic,
    "psi": psi,
}


# ---------------------------------------------------------------- distributions


def enumerate_samples(
    model, belief: Belief, num_steps: int, first: int | None = None
) -> Tensor:
    """Exact distribution of samples, (K, K).

    Args:
        model: Its sampler says which kernel and which plan.
        belief: Its network.
        num_steps: Of the plan; noise removal "ancestral" follows.
        first: The first token, where it is given.
    """
    predictor = model.config.sampling.predictor
    kernel = KERNELS["ancestral" if predictor == "first_hitting" else predictor]
    prior = torch.full((L, K), 1 / K, dtype=torch.float64)
    if isinstance(model, AbsorbingState):
        prior = F.one_hot(torch.full((L,), model.mask_index), K).double()
    if first is not None:
        prior[0] = F.one_hot(torch.tensor(first), K)
    joint = torch.outer(*prior)
    plan = model.sampler.plan(model.noise, num_steps)
    last = plan[-1].alpha_s
    for alpha_t, alpha_s, kappa in [*plan, (last, torch.ones_like(last), 1.0)]:
        levels = (level.double().view(1, 1) for level in (alpha_t, alpha_s))
        rows = kernel(model, belief, *levels, kappa)
        if first is not None:
            rows[:, 0] = F.one_hot(STATES[:, 0], K)
        joint = torch.einsum("s,sa,sb->ab", joint.flatten(), rows[:, 0], rows[:, 1])
    assert abs(float(joint.sum()) - 1) < 1e-9
    return joint


def first_hitting(model, belief: Belief, num_nodes: int = 12) -> Tensor:
    """Exact joint of the first-hitting process, (K, K), by Gauss-Legendre quadrature.

    With M = 1 - alpha_1, the masks are revealed when 1 - alpha is u_0 and u_1, uniform
    on (0, M): either first, the other one given it.
    """
    nodes, weights = (torch.tensor(x) for x in leggauss(num_nodes))
    nodes, weights = (nodes + 1) / 2, weights / 2  # of (0, 1)
    M = 1 - float(model.noise(torch.ones((), dtype=torch.float64)).alpha_t)
    m, joint = model.mask_index, torch.zeros(K, K, dtype=torch.float64)

    def p(u: Tensor) -> Tensor:
        return x_theta(model, belief, (1 - u).view(1, 1)).view(K, K, L, K)

    for node, weight in zip(nodes, weights, strict=True):
        earlier = p(M * node)
        later = sum(w * p(M * node * v) for v, w in zip(nodes, weights, strict=True))
        left_first = earlier[m, m, 0][:, None] * later[:, m, 1]
        right_first = earlier[m, m, 1][None, :] * later[m, :, 0].T
        joint += weight * node * (left_first + right_first)
    return joint


def ordered(model, belief: Belief, num_steps: int, first: int | None = None) -> Tensor:
    """Exact joint of samplers that choose the order, (K, K), as `enumerate_samples`.

    A step with both tokens masked draws both and keeps the surer one of them, or both;
    with one masked it reveals that, if any.
    """
    m, total = model.mask_index, 2 if first is None else 1
    joint = torch.zeros(K, K, dtype=torch.float64)
    joint[m if first is None else first, m] = 1
    is_bound = model.config.sampling.predictor == "entropy_bound"
    steps = _bound_steps if is_bound else _confidence_steps
    for count, levels in steps(model, num_steps, total):
        p, raw = (
            {
                masked: x_theta(
                    model, belief, levels[masked].view(1, 1), is_raw=is_raw
                ).view(K, K, L, K)
                for masked in range(1, total + 1)
            }
            for is_raw in (False, True)
        )
        new = joint.clone()
        new[m], new[:, m] = 0, 0
        new += joint[:, m, None] * p[1][:, m, 1] * _is_token(m)[:, None]
        new += joint[m] * p[1][m, :, 0].T * _is_token(m)
        if total == 2:
            pair = joint[m, m] * torch.outer(*p[2][m, m])
            scores = [score_of(model.config.sampling, row) for row in raw[2][m, m]]
            if is_bound:
                least = -max(float(score[0]) for score in scores)
                count = 2 if least <= model.config.sampling.gamma else 1
            is_first = scores[0][:, None] >= scores[1]
            if count == 2:
                new += pair
            else:
                new[:, m] += (pair * is_first).sum(dim=1)
                new[m] += (pair * ~is_first).sum(dim=0)
        joint = new
    assert abs(float(joint.sum()) - 1) < 1e-9
    return joint


def _is_token(mask_index: int) -> Tensor:
    return torch.arange(K) != mask_index


def _confidence_steps(model, num_steps: int, total: int):
    """How many masks each step reveals, but for those without any, and its level."""
    left, alpha_1 = total, model.sampler.plan(model.noise, num_steps)[0].alpha_t
    for index, step in enumerate(model.sampler.plan(model.noise, num_steps), start=1):
        expected = total * float((1 - step.alpha_s) / (1 - alpha_1))
        stay = round(expected) if index < num_steps else 0
        if stay < left:
            yield left - stay, {1: step.alpha_t, 2: step.alpha_t}
        left = stay


def _bound_steps(model, num_steps: int, total: int):
    """The level at which the network is asked, by the number of masks left."""
    noise = 1 - model.noise(torch.ones((), dtype=torch.float64)).alpha_t
    levels = {masked: 1 - noise * masked / total for masked in range(1, total + 1)}
    yield from [(1, levels)] * total


def score_of(sampling, p: Tensor) -> Tensor:
    """How sure a model is of each token it may draw, (K,) -> (K,)."""
    top = p.sort(descending=True).values
    scores = {
        "top_prob": p,
        "margin": (top[0] - top[1]).expand(K),
        "entropy": torch.special.entr(p).sum().neg().expand(K),
    }
    is_bound = sampling.predictor == "entropy_bound"
    return scores["entropy" if is_bound else sampling.order]


# By predictor, where tokens of a step depend on each other: the joint of samples.
JOINTS = {
    "first_hitting": lambda model, belief, num_steps: first_hitting(model, belief),
    "confidence": ordered,
    "entropy_bound": ordered,
}


def draw_counts(model, num_steps: int, seed: int, first: int | None = None) -> Tensor:
    """How often each pair of tokens occurs in N samples, (K, K)."""
    given = Given.nothing(N, L, model.device)
    if first is not None:
        given.tokens[:, 0], given.known[:, 0] = first, True
    generator = torch.Generator().manual_seed(seed)
    x = model.generate_samples(N, generator, num_steps, given=given).tokens
    return (x[:, 0] * K + x[:, 1]).bincount(minlength=K * K).view(K, K)


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of a chi-square test, cells with an expected count below 5 merged into one.

    0 if anything impossible was counted.
    """
    counts, expected = counts.flatten(), counts.sum() * probs.flatten()
    if counts[expected == 0].any():
        return 0.0
    counts, expected = counts[expected > 0], expected[expected > 0]
    order = expected.argsort()
    counts, expected = counts[order], expected[order]
    # The merged cell takes in larger ones until it has 5 itself.
    rare = max(int((expected < 5).sum()), int((expected.cumsum(0) < 5).sum()) + 1)
    cells = [
        torch.cat([x[:rare].sum()[None], x[rare:]]).numpy() for x in (counts, expected)
    ]
    return float(chisquare(*cells).pvalue)
