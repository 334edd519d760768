"""Laws of DUO's soft inputs: what the network sees is softmax(w / tau) times the
embedding, with the gradient of that, and never more than a chunk of it at a time.
"""

import gc
import itertools
import weakref

import pytest
import torch
from latents import top_draws
from scipy import stats
from tiny import compose
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion.curriculum import Curriculum
from diffusion.gaussian import (
    TOP_LATENTS,
    DenseLatents,
    Levels,
    TopLatents,
    enough,
)
from integral.transform import gauss_levels
from models import head

B, L, K, D = 3, 5, 23, 4
CHUNKS = (1, 4, 15, 100)


def chunked(monkeypatch, tokens: int, vocab_size: int = K) -> None:
    """As many tokens at a time as from here on fit."""
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * vocab_size * tokens)


def some_levels(tau: float = 0.3) -> Levels:
    """Of B sequences, with temperatures that differ from token to token."""
    gamma = torch.linspace(-3, 1, B, dtype=torch.float64)[:, None]
    per_token = torch.linspace(0.5, 2, B * L, dtype=torch.float64).view(B, L)
    return Levels(*gauss_levels(gamma), tau * per_token)


def some_ids(vocab_size: int = K, seed: int = 0, shape=(B, L)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def plain_latents(latents: DenseLatents) -> Tensor:
    """w of all tokens at once from the object's own noise, (B, L, K) float32."""
    sizes = [len(latents.x0.flatten()[rows]) for rows in latents.chunks]
    eps = torch.cat([latents.noise(i, (n, K)) for i, n in enumerate(sizes)])
    levels = latents.levels
    onehot = torch.nn.functional.one_hot(latents.x0.flatten(), K)
    w = levels.gauss_alpha[:, None] * onehot + levels.gauss_sigma[:, None] * eps
    return w.view(B, L, K)


def plain_average(latents: DenseLatents, embedding: Tensor) -> Tensor:
    tau = latents.levels.tau.view(B, L, 1)
    weights = (plain_latents(latents) / tau).softmax(dim=-1)
    return weights.to(embedding.dtype) @ embedding


def some_embedding(dtype: torch.dtype, vocab_size: int = K, size: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(vocab_size, size, dtype=dtype, generator=generator)
    return rows.requires_grad_()


# ---------------------------------------------------------------- all entries


@pytest.mark.parametrize("tokens", CHUNKS)
def test_dense_input_is_the_plain_formula(monkeypatch, tokens):
    """Value, argmax and gradient, whatever the size of the chunks."""
    chunked(monkeypatch, tokens)
    latents = DenseLatents(some_ids(), some_levels(), K, range(7, 7 + B))
    at_once = tokens // L  # whole rows, or parts of one
    expected = -(-B // at_once) if at_once else B * -(-L // tokens)
    assert len(latents.chunks) == expected
    assert torch.equal(latents.xt, plain_latents(latents).argmax(dim=-1))
    upstream = torch.randn(B, L, D, generator=torch.Generator().manual_seed(2))
    found = []
    for average in (latents.embed, lambda E: plain_average(latents, E)):
        embedding = some_embedding(torch.float32)
        value = average(embedding)
        (gradient,) = torch.autograd.grad(value, embedding, upstream)
        found.append((value.detach(), gradient))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [4, 100])
def test_dense_gradient_by_differences(monkeypatch, tokens):
    chunked(monkeypatch, tokens)
    latents = DenseLatents(some_ids(), some_levels(), K, range(7, 7 + B))
    embedding = some_embedding(torch.float64)
    assert torch.autograd.gradcheck(latents.embed, (embedding,))


def test_the_same_object_gives_the_same_numbers(monkeypatch):
    """The noise is drawn anew for forward and for backward, and is the same."""
    chunked(monkeypatch, 4)
    first, again, other = (
        DenseLatents(some_ids(), some_levels(), K, range(seed, seed + B))
        for seed in (7, 7, 17)
    )
    embedding = some_embedding(torch.float32)
    before = torch.random.get_rng_state()
    value = first.embed(embedding)
    for x in (first, again):
        assert torch.equal(x.embed(embedding), value)
        assert torch.equal(x.xt, first.xt)
    for i in range(len(first.chunks)):
        assert torch.equal(first.weights(i), first.weights(i))
    assert not torch.allclose(other.embed(embedding), value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dense_noise_is_normal_and_differs_between_chunks(monkeypatch):
    chunked(monkeypatch, 1000, vocab_size=50)
    x0 = some_ids(50, shape=(20, 200))
    levels = Levels(*(torch.ones(1, 1) for _ in range(3)))
    latents = DenseLatents(x0, levels, 50, range(20))
    noise = [latents.noise(i, (1000, 50)) for i in range(4)]
    p_values = [stats.kstest(eps.flatten().numpy(), "norm").pvalue for eps in noise]
    assert min(p_values) * len(p_values) > 1e-3
    for first, second in itertools.combinations(noise, 2):
        flat = torch.stack([first.flatten(), second.flatten()])
        assert abs(float(flat.corrcoef()[0, 1])) < 5 / flat.shape[1] ** 0.5


class Alive(TorchDispatchMode):
    """Entries along a vocabulary axis that any operation returned: the most at once
    in one tensor, and all that are still there."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.largest = vocab_size, 0
        self.results = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and self.vocab_size in x.shape:
                self.largest = max(self.largest, x.numel())
                self.results[id(x)] = x
        return results

    def now(self) -> int:
        gc.collect()
        return sum(x.numel() for x in self.results.values())


@pytest.mark.parametrize("is_plain", [False, True], ids=["ours", "plain"])
def test_no_tensor_of_tokens_times_vocabulary(monkeypatch, is_plain):
    """Not at any time, and no chunk between forward and backward.

    The plain formula beside it, so that the test can fail.
    """
    size, tokens, N = 997, 4, B * L
    chunked(monkeypatch, tokens, size)
    embedding = some_embedding(torch.float32, size, size=2)
    with Alive(size) as alive:
        latents = DenseLatents(some_ids(size), some_levels(), size, range(7, 7 + B))
        if is_plain:
            parts = [latents.weights(i) for i in range(len(latents.chunks))]
            value = (torch.cat(parts) @ embedding).square()
            del parts
        else:
            value = latents.embed(embedding).square()
        between = alive.now()
        value.sum().backward()
    if is_plain:
        assert alive.largest == N * size
        assert between >= N * size
    else:
        assert alive.largest == tokens * size
        assert between <= size * 2  # of the embedding itself
    assert embedding.grad is not None


# ---------------------------------------------------------------- the largest entries


def some_top(kept: int, compat: str = "paper") -> TopLatents:
    generator = torch.Generator().manual_seed(3)
    draws = top_draws(torch.Size([B, L]), K, kept, generator)
    return TOP_LATENTS[compat].of(draws, some_ids(), some_levels(), K)


@pytest.mark.parametrize("kept", [1, 5, K - 1])
def test_sparse_input_is_a_weighted_sum_of_rows(kept):
    """And its gradient is that of the sum, also by differences."""
    soft = some_top(kept)
    assert soft.ids.shape == soft.weights.shape == (B, L, kept)
    dense = torch.zeros(B, L, K, dtype=torch.float64)
    dense = dense.scatter_add(-1, soft.ids, soft.weights)
    embedding = some_embedding(torch.float64)
    torch.testing.assert_close(soft.embed(embedding), dense @ embedding)
    assert torch.autograd.gradcheck(soft.embed, (embedding,))
    rows = some_embedding(torch.float32)
    value = soft.embed(rows)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, (dense @ rows.double()).float())
    assert (soft.weights >= 0).all()
    assert (soft.weights.sum(dim=-1) <= 1 + 1e-12).all()
    if kept == K - 1:  # all but the smaller of the last two
        assert (soft.weights.sum(dim=-1) > 1 - soft.weights.amin(dim=-1) - 1e-12).all()


# ---------------------------------------------------------------- the curriculum

MODES = {
    "dense": {"mode": "simple"},
    "few are all": {"mode": "simple", "gumbel_tau_log10_start": -4.0},
    "k=1": {"mode": "efficient_cached", "top_k": 1},
    "k=5": {"mode": "efficient_cached", "top_k": 5},
    "all others": {"mode": "efficient_cached", "top_k": 1000},
    "series": {"mode": "series", "top_k": 3},
}


def curriculum_of(settings: dict, vocab_size: int, compat: str = "paper") -> Curriculum:
    options = [f"algo.curriculum.{key}={value}" for key, value in settings.items()]
    config = compose("algo=duo", f"algo.compat={compat}", *options)
    return Curriculum(config, vocab_size)


def check_clean(curriculum: Curriculum, vocab_size: int) -> None:
    """Tokens that are to stay are themselves, to the last bit; others are not."""
    shape = torch.Size([64, 8])
    x0, t = some_ids(vocab_size, shape=shape), torch.linspace(0, 1, 64).double()
    is_clean = torch.arange(8) == 0
    soft = curriculum.draw(x0, t, 0, range(64), is_clean)
    embedding = some_embedding(torch.float32, vocab_size).detach()
    rows, input_ = embedding[x0], soft.embed(embedding)
    assert torch.equal(soft.xt[:, 0], x0[:, 0])
    assert torch.equal(input_[:, 0], rows[:, 0])
    assert (soft.xt[:, 1:] != x0[:, 1:]).any()
    assert (input_[:, 1:] != rows[:, 1:]).any()
    assert input_.isfinite().all()


@pytest.mark.parametrize("vocab_size", [19, 300])
@pytest.mark.parametrize("name", MODES)
def test_clean_tokens_stay(name, vocab_size):
    curriculum = curriculum_of(MODES[name], vocab_size)
    check_clean(curriculum, vocab_size)


def test_clean_tokens_stay_as_published():
    settings = {"mode": "efficient_cached", "top_k": 2}
    check_clean(curriculum_of(settings, 300, "reference"), 300)


@pytest.mark.parametrize(
    ("name", "kind", "kept"),
    [
        ("dense", DenseLatents, None),
        ("few are all", TopLatents, 16),
        ("k=1", TopLatents, 1),
        ("k=5", TopLatents, 5),
        ("all others", TopLatents, 299),
    ],
)
def test_what_each_mode_draws(name, kind, kept):
    soft = curriculum_of(MODES[name], 300).draw(
        some_ids(300), torch.full((B,), 0.5), 0, range(B)
    )
    assert isinstance(soft, kind)
    assert kept is None or soft.ids.shape == (B, L, kept)


@pytest.mark.parametrize("log10_tau", [-4.0, -3.0, -2.7, -2.4])
def test_few_entries_are_enough_at_every_time(log10_tau):
    """As many as the softest input needs, which is that with the least noise."""
    size = 200
    settings = {"mode": "simple", "gumbel_tau_log10_start": log10_tau}
    settings |= {"gamma_min": -4.0, "gamma_max": 1.0}
    curriculum = curriculum_of(settings, size)
    soft = curriculum.draw(some_ids(size), torch.ones(B), 0, range(B))
    assert isinstance(soft, TopLatents)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigmas = gauss_levels(curriculum.operator.gammas.gamma(t))[1].tolist()
    needed = [enough(size, 10**log10_tau / sigma) for sigma in sigmas]
    assert soft.ids.shape[-1] == max(needed)
    assert log10_tau == -4 or max(needed) > min(needed)


def test_few_entries_have_the_law_of_all():
    """At a low temperature mode `simple` draws 32 of 200 entries; the three largest
    weights, and x_t = x_0, have the distribution of a dense softmax."""
    size, rows = 200, 20_000
    tau = {"gumbel_tau_log10_start": -3.0, "gumbel_tau_log10_end": -3.0}
    curriculum = curriculum_of({"mode": "simple", **tau}, size)
    x0 = some_ids(size, shape=(rows, 1))
    t = torch.full((rows,), 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    soft = curriculum.draw(x0, t, 0, range(rows))
    assert isinstance(soft, TopLatents)
    assert soft.ids.shape[-1] < size / 4
    torch.testing.assert_close(soft.weights.sum(dim=-1), torch.ones(x0.shape).double())

    gauss_alpha, gauss_sigma = gauss_levels(curriculum.operator.gammas.gamma(t[:1]))
    eps = torch.randn(rows, size, dtype=torch.float64, generator=generator)
    w = gauss_sigma * eps
    w = w.scatter_add(1, x0, gauss_alpha.expand(rows, 1))
    right = (w / 1e-3).softmax(dim=-1).topk(3).values
    ours = soft.weights[:, 0].topk(3).values
    assert (right[:, 0] < 0.999).double().mean() > 0.02
    ours, right = (x.numpy().round(9) for x in (ours, right))  # many are 1 but for that
    p_values = [
        stats.ks_2samp(ours[:, i], right[:, i], method="asymp").pvalue for i in range(3)
    ]
    counts = [int((x == x0).sum()) for x in (soft.xt, w.argmax(dim=-1, keepdim=True))]
    table = [[n, rows - n] for n in counts]
    p_values.append(stats.chi2_contingency(table).pvalue)
    assert min(p_values) * len(p_values) > 1e-3


def test_dense_draws_have_the_probability_of_the_operator():
    """x_t = x_0 with probability P of each time, at K = 50."""
    size, rows = 50, 20_000
    curriculum = curriculum_of({"mode": "simple"}, size)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x0 = some_ids(size, shape=(len(t), rows))
    soft = curriculum.draw(x0, t, 0, range(len(t)))
    assert isinstance(soft, DenseLatents)
    alpha = curriculum.operator(t).alpha_t
    P = alpha + (1 - alpha) / size
    counts = (soft.xt == x0).sum(dim=-1).tolist()
    pairs = zip(counts, P.tolist(), strict=True)
    p_values = [stats.binomtest(n, rows, p).pvalue for n, p in pairs]
    assert min(p_values) * len(p_values) > 1e-3
