"""The lean reverse step is the posterior: `change_bound` times what `changed` draws,
the rest staying, to 1e-12 for every token of the vocabulary.

What `changed` draws is measured, not derived: the probabilities it hands to `draw`,
and by bisection the uniforms at which its outcome turns.
"""

import pytest
import torch
import torch.nn.functional as F

from diffusion.base import Diffusion
from diffusion.uniform import UniformState

# alpha_t, alpha_s: ordinary, tiny and almost clean levels, to the end, a plateau.
LEVELS = [
    (0.2, 0.6),
    (0.001, 0.002),
    (0.95, 0.999),
    (0.999, 0.99999),
    (0.4, 1.0),
    (1e-6, 1.0),
    (0.5, 0.5),
]
DRAWN, NOISE = -1, -2


def beliefs(model, generator):
    """Every x_t twice, with a flat belief and a sharp one: x_theta (n, K), xt (n,)."""
    K = model.vocab_size
    logits = torch.randn(2 * K, K, dtype=torch.float64, generator=generator)
    logits[K:] *= 10
    if model.mask_index is not None:
        logits[:, model.mask_index] = -torch.inf
    return logits.softmax(dim=-1), torch.arange(K).repeat(2)


def threshold(is_below):
    """Where is_below(u), (n,) bool, turns from True to False, (n,)."""
    low, high = (torch.full_like(is_below(None), x) for x in (0.0, 1.0))
    for _ in range(60):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def changed_uniform(model, x_theta, xt, levels, monkeypatch):
    """Distribution of `changed` of a uniform state, from its two uniforms, (n, K)."""
    K, zeros = model.vocab_size, torch.zeros(len(xt), dtype=torch.float64)
    drawn = []

    def outcome(u0, u1):
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.stack([u0, u1]))
        monkeypatch.setattr(
            model, "noise_tokens", lambda shape, g: torch.full(shape, NOISE)
        )

        def draw(probs, generator):
            drawn.append(probs)
            return torch.full(xt.shape, DRAWN)

        options = {"xt": xt, "draw": draw, "generator": None, **levels}
        return model.changed(x_theta, **options)

    changes = threshold(lambda u: zeros if u is None else outcome(zeros, u) < 0)
    share = threshold(lambda u: zeros if u is None else outcome(u, zeros) == DRAWN)
    monkeypatch.undo()
    p = drawn[-1] / drawn[-1].sum(dim=-1, keepdim=True)
    new = share[:, None] * p + (1 - share)[:, None] / K
    stays = F.one_hot(xt, K).double()
    return changes[:, None] * new + (1 - changes)[:, None] * stays


def changed_by_draw(changed, x_theta, xt, levels):
    """Distribution of a `changed` that is one draw, (n, K)."""
    drawn = []

    def draw(probs, generator):
        drawn.append(probs)
        return probs.argmax(dim=-1)

    got = changed(x_theta, xt=xt, draw=draw, generator=None, **levels)
    (probs,) = drawn
    assert torch.equal(got, probs.argmax(dim=-1))
    return probs / probs.sum(dim=-1, keepdim=True)


def transition(bound, new, xt):
    """Rows of bound * new + (1 - bound) onehot(xt), (n, K)."""
    assert bool((bound >= 0).all())
    assert bool((bound <= 1 + 1e-12).all())
    stays = F.one_hot(xt, new.shape[-1]).double()
    return bound[:, None] * new + (1 - bound)[:, None] * stays


@pytest.fixture(params=LEVELS, ids=str)
def levels(request, generator):
    """alpha_t and alpha_s of 14 tokens."""
    alphas = (torch.full((14,), a, dtype=torch.float64) for a in request.param)
    return dict(zip(("alpha_t", "alpha_s"), alphas, strict=True))


def bound_of(owner, xt, levels, *model):
    """`change_bound` of tokens (n,), asked in the shapes that samplers use."""
    wide = {"alpha_t": levels["alpha_t"][:1, None]}
    bounds = []
    for alpha_s in (levels["alpha_s"][:1, None], levels["alpha_s"][None]):
        bound = owner.change_bound(*model, xt[None], alpha_s=alpha_s, **wide)
        bounds.append(bound.expand(1, len(xt))[0])
    assert torch.equal(*bounds)
    return bounds[0]


def test_a_lean_step_is_the_posterior(
    make_model, diffusion_name, levels, generator, monkeypatch
):
    """For every process, bound and change together."""
    model = make_model(f"algo={diffusion_name}")
    x_theta, xt = beliefs(model, generator)
    if isinstance(model, UniformState):
        new = changed_uniform(model, x_theta, xt, levels, monkeypatch)
    else:
        new = changed_by_draw(model.changed, x_theta, xt, levels)
    got = transition(bound_of(model, xt, levels), new, xt)
    expected = model.posterior(x_theta, xt=xt, **levels)
    expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_step_of_a_process_without_its_own_is_the_posterior(
    make_model, diffusion_name, levels, generator
):
    """What `Diffusion` leaves to a new process: a draw wherever it is undecided."""
    model = make_model(f"algo={diffusion_name}")
    x_theta, xt = beliefs(model, generator)

    def changed(x_theta, **options):
        return Diffusion.changed(model, x_theta, **options)

    new = changed_by_draw(changed, x_theta, xt, levels)
    got = transition(bound_of(Diffusion, xt, levels, model), new, xt)
    expected = model.posterior(x_theta, xt=xt, **levels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_only_what_may_change_asks_for_the_network(make_model, diffusion_name):
    """The bound is tight: it is reached by some belief, and 0 where all stays."""
    model = make_model(f"algo={diffusion_name}")
    K = model.vocab_size
    one = torch.ones(1, dtype=torch.float64)
    levels = {"alpha_t": 0.2 * one.expand(K), "alpha_s": 0.6 * one.expand(K)}
    xt = torch.arange(K)
    certain = F.one_hot((xt + 1) % (K - 1), K).double()  # never x_t, never the mask
    stays = model.posterior(certain, xt=xt, **levels)
    stays = stays.gather(-1, xt[:, None])[:, 0]
    bound = bound_of(model, xt, levels)
    if isinstance(model, UniformState):  # noise may fall on x_t again
        noise = (1 - 0.2 / 0.6) * (1 - 0.6) / (1 - 0.2)
        stays = stays - noise / K
    torch.testing.assert_close(bound, 1 - stays, rtol=0, atol=1e-12)
