"""Laws of the Gaussian latents: what is drawn of them has the distribution that all
K entries would have.

`dense_latents` below is the definition, K normal draws per token. Distributions are
compared by tests of significance; `assert_likely` corrects for the number of
comparisons, so that each test here fails by chance with probability 1e-3 at most. Seeds
are fixed: a run that passes once always passes.
"""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from latents import top_draws
from scipy import integrate, stats
from torch import Tensor

from diffusion.gaussian import (
    TOP_LATENTS,
    Levels,
    TopDraws,
    TopLatents,
    argmax_pair,
    distinct,
    enough,
    log_mean_exp_below,
    pair_of,
    rounded_top_normals,
    top_normals,
)
from integral.transform import GammaRange, Spectral, gauss_levels
from training.row_streams import RowStream

K, k, N = 50, 5, 100_000
GAMMA = -1.0
SIGNIFICANCE = 1e-3
CLEAN = (0, 1, 25, K - 1)  # ids of x_0, the first and the last among them


def assert_likely(p_values) -> None:
    """Bonferroni: the smallest of n probabilities against 1e-3 / n."""
    p_values = [float(p) for p in p_values]
    assert p_values
    worst = min(p_values)
    assert worst * len(p_values) > SIGNIFICANCE, f"{worst} of {len(p_values)}"


def same_law(first: Tensor, second: Tensor) -> float:
    """Probability of two samples at least as different, by Kolmogorov and Smirnov."""
    samples = first.double().numpy().ravel(), second.double().numpy().ravel()
    return stats.ks_2samp(*samples, method="asymp").pvalue


def uniform(values: Tensor, count: int) -> float:
    """Chi-square probability of values that should be uniform on 0, ..., count - 1."""
    assert int(values.min()) >= 0
    assert int(values.max()) < count
    return stats.chisquare(values.bincount(minlength=count).numpy()).pvalue


def same_frequencies(first: Tensor, second: Tensor) -> float:
    """Chi-square probability of two samples of small numbers at least as different."""
    count = int(torch.maximum(first.max(), second.max())) + 1
    table = torch.stack([x.bincount(minlength=count) for x in (first, second)])
    return stats.chi2_contingency(table[:, table.sum(dim=0) > 0].numpy()).pvalue


def levels_at(gamma: float, tau: float = 1.0) -> Levels:
    gauss = gauss_levels(torch.tensor([[gamma]], dtype=torch.float64))
    return Levels(*gauss, torch.full((1, 1), tau, dtype=torch.float64))


def probability(gamma: float, vocab_size: int) -> float:
    """P(argmax = x_0) of the operator."""
    operator = Spectral(vocab_size, GammaRange(gamma - 1, gamma + 1))
    return float(operator.probability(torch.tensor([0.5], dtype=torch.float64))[0])


def clean_tokens() -> Tensor:
    return torch.tensor(CLEAN).repeat(N // len(CLEAN))[:, None]  # (N, 1)


def others_of(ids: Tensor, x0: Tensor, vocab_size: int = K) -> Tensor:
    """Places of ids among those other than x_0; -1 for x_0 itself."""
    return torch.where(ids == x0, -1, ids - (ids > x0).long())


# ---------------------------------------------------------------- all entries


class Dense(NamedTuple):
    """N tokens with all their entries."""

    x0: Tensor  # (N, 1)
    eps: Tensor  # (N, K)

    def latents(self, gamma: float) -> Tensor:
        gauss_alpha, gauss_sigma, _ = levels_at(gamma)
        w = gauss_sigma * self.eps
        return w.scatter_add(1, self.x0, gauss_alpha.expand(self.x0.shape))


@pytest.fixture(scope="module")
def dense() -> Dense:
    generator = torch.Generator().manual_seed(1)
    x0 = clean_tokens()
    eps = torch.randn(len(x0), K, dtype=torch.float64, generator=generator)
    return Dense(x0, eps)


class Sparse(NamedTuple):
    """The same number of tokens with their k largest entries."""

    x0: Tensor  # (N, 1)
    draws: TopDraws
    soft: TopLatents


@pytest.fixture(scope="module")
def sparse():
    """sparse(tau): fresh draws for every temperature."""

    def make(tau: float, compat: str = "paper") -> Sparse:
        generator = torch.Generator().manual_seed(round(1000 * tau))
        x0 = clean_tokens()
        draws = top_draws(x0.shape, K, k, generator)
        levels = levels_at(GAMMA, tau)
        soft = TOP_LATENTS[compat].of(draws, x0, levels, K)
        return Sparse(x0, draws, soft)

    return make


def largest_others(dense: Dense, w: Tensor) -> Tensor:
    """The k largest entries other than that of x_0, descending, (N, k)."""
    return w.scatter(1, dense.x0, -torch.inf).topk(k).values


# ---------------------------------------------------------------- the largest entries


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_weights_have_the_law_of_dense_ones(dense, sparse, tau):
    """Where the entries below the k-th other one count with their expectation.

    That is taken from the distribution function of a dense draw's own k-th.
    """
    w = dense.latents(GAMMA)
    others, own = largest_others(dense, w), w.gather(1, dense.x0)
    kth, sigma = others[:, -1:], levels_at(GAMMA).gauss_sigma
    s, z = sigma / tau, kth / sigma
    below = [torch.from_numpy(stats.norm.cdf(x)) for x in (z - s, z)]
    expected = (K - 1 - k) * torch.exp(s**2 / 2) * below[0] / below[1]
    rest = torch.exp(torch.minimum(own, kth) / tau) + expected
    kept = (w.topk(k).values / tau).exp()
    right = kept / (kept.sum(dim=-1, keepdim=True) + rest)
    ours = sparse(tau).soft.weights[:, 0].sort(descending=True).values
    assert right[:, 0].std() > 0.01
    found = [same_law(ours[:, i], right[:, i]) for i in range(k)]
    assert_likely([*found, same_law(ours.sum(dim=-1), right.sum(dim=-1))])


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_ratios_of_weights_have_the_law_of_a_dense_softmax(dense, sparse, tau):
    """They do not depend on the entries that are not drawn."""
    right = (dense.latents(GAMMA) / tau).softmax(dim=-1).topk(k).values
    ours = sparse(tau).soft.weights[:, 0].sort(descending=True).values
    assert_likely(
        same_law(ours[:, i] / ours[:, 0], right[:, i] / right[:, 0])
        for i in range(1, k)
    )


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_the_tail_has_the_mean_of_the_dense_one(dense, sparse, tau):
    """Mass outside of the k largest, in units of the k-th other entry's."""
    w = dense.latents(GAMMA)
    kth = largest_others(dense, w)[:, -1:]
    relative = ((w - kth) / tau).exp()
    kept = ((w.topk(k).values - kth) / tau).exp()
    right = relative.sum(dim=-1) - kept.sum(dim=-1)

    x0, draws, soft = sparse(tau)
    sigma = levels_at(GAMMA).gauss_sigma
    z = top_normals(draws.u, K - 1)[:, 0]
    weights = soft.weights[:, 0]
    assert not (soft.ids[:, 0, 0] == x0[:, 0]).any()  # slot 0 is the largest other's
    unit = (sigma[0] * (z[:, -1] - z[:, 0]) / tau).exp() * weights[:, 0]
    ours = (1 - weights.sum(dim=-1)) / unit
    assert_likely([stats.ttest_ind(ours, right, equal_var=False).pvalue])
    assert ours.std() < right.std()  # an expectation stands for the draw


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_the_clean_token_is_kept_as_often_and_in_the_same_rank(dense, sparse, tau):
    w = dense.latents(GAMMA)
    right = (w > w.gather(1, dense.x0)).sum(dim=-1).clamp(max=k)
    x0, _, soft = sparse(tau)
    is_own = soft.ids[:, 0] == x0
    own = torch.where(is_own, soft.weights[:, 0], 0).sum(dim=-1, keepdim=True)
    rank = (soft.weights[:, 0] > own).sum(dim=-1)
    ours = torch.where(is_own.any(dim=-1), rank, k)
    assert_likely([same_frequencies(ours, right)])
    assert torch.equal(soft.xt[:, 0] == x0[:, 0], ours == 0)


@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("size", [2, 3, 10])
def test_with_all_others_kept_it_is_the_dense_softmax(size, tau):
    """Of the entries that the draws stand for: nothing is left to an expectation."""
    generator = torch.Generator().manual_seed(size)
    x0 = torch.randint(size, (200, 1), generator=generator)
    draws = top_draws(x0.shape, size, size - 1, generator)
    levels = levels_at(GAMMA, tau)
    soft = TopLatents.of(draws, x0, levels, size)
    others = levels.gauss_sigma * top_normals(draws.u, size - 1)[:, 0]
    own = levels.gauss_alpha + levels.gauss_sigma * draws.eps
    kth, ids = others[:, -1:], soft.ids[:, 0]
    missing = size * (size - 1) // 2 - ids.sum(dim=-1, keepdim=True)
    assert torch.equal(missing == x0, own <= kth)
    w = torch.zeros(len(x0), size, dtype=torch.float64)
    w.scatter_(1, ids, torch.cat([others[:, :-1], torch.maximum(own, kth)], dim=-1))
    w.scatter_(1, missing, torch.minimum(own, kth))
    right = (w / tau).softmax(dim=-1)
    torch.testing.assert_close(soft.weights[:, 0], right.gather(1, ids))
    assert torch.equal(soft.xt, w.argmax(dim=-1, keepdim=True))


def test_ids_are_distinct_and_uniform(sparse):
    """Of every slot and every pair of slots, for each x_0; x_0 at most once."""
    x0, _, soft = sparse(1.0)
    ids = soft.ids[:, 0]
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert int(ids.min()) == 0
    assert int(ids.max()) == K - 1
    assert not (ids[:, :-1] == x0).any()  # it is in the last slot
    places, p_values = others_of(ids, x0), []
    for clean, slot in itertools.product(CLEAN, range(k)):
        here = places[x0[:, 0] == clean, slot]
        p_values.append(uniform(here[here >= 0], K - 1))
    for first, second in itertools.combinations(range(k), 2):
        a, b = places[:, first], places[:, second]
        is_other = b >= 0
        a, b = a[is_other], b[is_other]
        b = b - (b > a).long()
        p_values.append(uniform(a * (K - 2) + b, (K - 1) * (K - 2)))
    assert_likely(p_values)


@pytest.mark.parametrize("gamma", [-3.0, -1.0, 1.0])
@pytest.mark.parametrize("kept", [1, k, K - 1])
def test_argmax_is_the_uniform_diffusion(gamma, kept):
    """x_0 with the operator's P(gamma), every other token alike; for any k."""
    x0 = clean_tokens()
    generator = torch.Generator().manual_seed(kept)
    draws = top_draws(x0.shape, K, kept, generator)
    xt = TopLatents.of(draws, x0, levels_at(gamma), K).xt
    assert xt.shape == x0.shape
    count = int((xt == x0).sum())
    places = others_of(xt, x0)
    p_values = [stats.binomtest(count, N, probability(gamma, K)).pvalue]
    p_values += [
        uniform(here[here >= 0], K - 1)
        for here in (places[x0 == clean] for clean in CLEAN)
    ]
    assert_likely(p_values)


def test_probability_is_that_of_an_integral():
    """`probability`, on which these tests rely, by adaptive quadrature."""
    for gamma, size in itertools.product((-3.0, -1.0, 1.0), (2, K, 50_258)):
        s = math.exp(-gamma / 2)

        def integrand(z, s=s, size=size):
            return math.exp(
                stats.norm.logpdf(z - s) + (size - 1) * stats.norm.logcdf(z)
            )

        right, _ = integrate.quad(integrand, -4, s + 12, points=[s, 4], epsabs=1e-11)
        assert probability(gamma, size) == pytest.approx(right, abs=1e-9)


def test_the_published_argmax_is_another_one(sparse):
    """x_t = x_0 wherever x_0 is kept, which is more often than alpha_t says."""
    x0, _, soft = sparse(1.0, "reference")
    count = int((soft.xt == x0).sum())
    P = probability(GAMMA, K)
    assert stats.binomtest(count, N, P, alternative="greater").pvalue < 1e-30
    assert torch.equal(soft.xt == x0, (soft.ids == x0[..., None]).any(dim=-1))


@pytest.mark.parametrize(("kept", "published"), [(8, 0.80), (32, 0.90), (128, 0.95)])
def test_the_published_argmax_at_full_size(kept, published):
    """The numbers measured on the published code, at K = 50258; ours beside them."""
    size, gamma, count = 50_258, -3.0, 4000
    generator = torch.Generator().manual_seed(kept)
    x0 = torch.randint(size, (count, 1), generator=generator)
    draws = top_draws(x0.shape, size, kept, generator)
    shares = {}
    for compat, kind in TOP_LATENTS.items():
        soft = kind.of(draws, x0, levels_at(gamma), size)
        shares[compat] = float((soft.xt == x0).double().mean())
    P = probability(gamma, size)
    assert pytest.approx(0.596, abs=5e-4) == P
    limit = stats.norm.isf(SIGNIFICANCE / 4) / math.sqrt(count)
    assert abs(shares["paper"] - P) < limit * math.sqrt(P * (1 - P))
    spread = math.sqrt(published * (1 - published))
    assert abs(shares["reference"] - published) < 0.01 + limit * spread  # of two digits


# ---------------------------------------------------------------- their parts


def test_draws_are_what_they_should_be():
    """u uniform, eps normal, slot j uniform on 0, ..., K - 1 - k + j, any order; none
    of them goes with another."""
    generator = torch.Generator().manual_seed(2)
    draws = top_draws(torch.Size([N // 10, 10]), K, k, generator)
    assert draws.u.shape == draws.slots.shape == draws.order.shape == (N // 10, 10, k)
    assert draws.u.dtype == draws.eps.dtype == torch.float64
    u, slots, order = (draws[i].view(-1, k) for i in (0, 2, 3))
    p_values = [stats.kstest(u[:, j].numpy(), "uniform").pvalue for j in range(k)]
    p_values.append(stats.kstest(draws.eps.flatten().numpy(), "norm").pvalue)
    p_values += [uniform(slots[:, j], K - k + j) for j in range(k)]
    ranks = {order: i for i, order in enumerate(itertools.permutations(range(k)))}
    rank = torch.tensor([ranks[tuple(row)] for row in order.tolist()])
    p_values.append(uniform(rank, len(ranks)))
    parts = [x.double() for x in (u, slots, order, draws.eps.view(-1, 1))]
    for first, second in itertools.combinations(parts, 2):
        both = torch.cat([first, second], dim=-1).T.corrcoef()
        cross = both[: first.shape[-1], first.shape[-1] :].abs().flatten()
        p_values += (2 * stats.norm.sf(cross.numpy() * math.sqrt(N))).tolist()
    assert_likely(p_values)


@pytest.mark.parametrize(("count", "kept"), [(5, 3), (6, 2), (4, 4), (5, 1), (1, 1)])
def test_every_set_is_as_likely(count, kept):
    """All values of the draws, one after the other: each set as often, and with a
    random order each sequence."""
    sizes = [count - kept + j + 1 for j in range(kept)]
    slots = torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, kept)
    ids = distinct(slots, count)
    sets = Counter(frozenset(row) for row in ids.tolist())
    assert len(sets) == math.comb(count, kept)
    assert all(len(row) == kept for row in sets)
    assert set(sets.values()) == {math.factorial(kept)}
    orders = torch.tensor(list(itertools.permutations(range(kept)))).view(-1, kept)
    rows = Counter()
    for order in orders:
        rows.update(map(tuple, ids.gather(-1, order.expand(ids.shape)).tolist()))
    assert len(rows) == math.perm(count, kept)
    assert set(rows.values()) == {math.factorial(kept)}


def test_the_order_of_a_set_is_not_uniform_by_itself():
    """So that the permutation is needed: the first id is never one of the last."""
    slots = torch.cartesian_prod(*(torch.arange(3 + j) for j in range(3)))
    ids = distinct(slots, 5)
    assert set(ids[:, 0].tolist()) == {0, 1, 2}
    assert set(ids[:, 2].tolist()) == {0, 1, 2, 3, 4}


def test_distinct_leaves_its_argument_alone():
    slots = torch.tensor([[0, 0, 0], [2, 2, 4]])
    before = slots.clone()
    assert distinct(slots, 5).tolist() == [[0, 3, 4], [2, 3, 4]]
    assert torch.equal(slots, before)


@pytest.mark.parametrize(
    ("count", "kept"), [(49, 5), (5, 5), (1, 1), (2, 2), (50_257, 3)]
)
def test_order_statistics(count, kept):
    """Phi(z_j) is Beta(count - j + 1, j); ratios of neighbours are independent."""
    generator = torch.Generator().manual_seed(count)
    u = torch.rand(N, kept, dtype=torch.float64, generator=generator)
    z = top_normals(u, count)
    assert (z.diff(dim=-1) < 0).all()
    # sf keeps what a number close to 1 would lose
    tail = torch.from_numpy(stats.norm.sf(z.numpy()))
    p_values = [
        stats.kstest(tail[:, j].numpy(), stats.beta(j + 1, count - j).cdf).pvalue
        for j in range(kept)
    ]
    log_U = torch.log1p(-tail)
    for j in range(1, kept):  # given U_(j), the next is a maximum of count - j
        share = ((log_U[:, j] - log_U[:, j - 1]) * (count - j)).exp()
        p_values.append(stats.kstest(share.numpy(), "uniform").pvalue)
        rank = stats.spearmanr(share.numpy(), z[:, j - 1].numpy())
        p_values.append(rank.pvalue)
    assert_likely(p_values)


def test_order_statistics_of_sorted_draws():
    """Against K - 1 normal draws, sorted."""
    generator = torch.Generator().manual_seed(3)
    options = {"dtype": torch.float64, "generator": generator}
    right = torch.randn(N // 5, K - 1, **options).topk(k).values
    ours = top_normals(torch.rand(N, k, **options), K - 1)
    p_values = [same_law(ours[:, j], right[:, j]) for j in range(k)]
    gaps = [x[:, 0] - x[:, -1] for x in (ours, right)]
    assert_likely([*p_values, same_law(*gaps)])


@pytest.mark.parametrize("count", [1, 49, 50_257])
def test_published_order_statistics_are_rounded_only(count):
    """U to 16 digits, of which few are left where 1 - U is small."""
    u = torch.tensor([1e-10, 0.1, 0.5, 0.9, 1 - 1e-9], dtype=torch.float64)[:, None]
    exact, published = top_normals(u, count), rounded_top_normals(u, count)
    torch.testing.assert_close(exact, published, rtol=1e-3, atol=1e-9)
    right = -stats.norm.isf(u.numpy() ** (1 / count))
    assert (exact - torch.from_numpy(right)).abs().max() < 1e-3


@pytest.mark.parametrize("count", [1, 2, 34, 49, 50_257])
def test_a_uniform_draw_of_0_is_a_number(count):
    assert top_normals(torch.zeros(1, 1, dtype=torch.float64), count).isfinite().all()


def log_mean_by_quadrature(z: float, scale: float) -> float:
    """log of the mean of exp(scale Z) over Z < z, with its largest value taken out."""
    peak = min(z, scale)
    top = scale * peak - peak**2 / 2
    width = min(12.0, 60 / (scale - z)) if scale > z else 12.0

    def integrand(x: float) -> float:
        return math.exp(scale * x - x**2 / 2 - top)

    points = [scale] if scale < z else None
    low = peak - width
    value, _ = integrate.quad(
        integrand, low, z, points=points, epsabs=0, epsrel=1e-12, limit=500
    )
    log_density = math.log(value) - math.log(2 * math.pi) / 2
    return top + log_density - float(stats.norm.logcdf(z))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5, 2.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("z", [-8.0, -1.0, 0.0, 2.0, 4.5, 9.0])
def test_mean_of_the_tail(z, scale):
    """The formula subtracts numbers of size scale^2, which sets its rounding."""
    pair = (torch.tensor([x], dtype=torch.float64) for x in (z, scale))
    ours = float(log_mean_exp_below(*pair))
    slack = 1e-10 + 1e-15 * scale**2
    assert ours == pytest.approx(log_mean_by_quadrature(z, scale), abs=slack, rel=1e-12)
    assert ours <= scale * z + slack


# ---------------------------------------------------------------- how many are enough


@pytest.mark.parametrize(
    ("size", "ratio", "rows"),
    [
        (50, 0.001, 2000),
        (50, 0.01, 2000),
        (200, 0.02, 2000),
        (1000, 0.002, 2000),
        (1000, 0.01, 2000),
        (1000, 0.05, 2000),
        (50_258, 0.002, 100),
        (50_258, 0.02, 100),
    ],
)
def test_what_is_left_out_is_negligible(size, ratio, rows):
    """The share of a dense softmax outside of its k largest entries."""
    kept = enough(size, ratio)
    generator = torch.Generator().manual_seed(size)
    w = torch.randn(rows, size, generator=generator) / ratio
    top = w.topk(kept).values.double().logsumexp(dim=-1)
    dropped = 1 - (top - w.double().logsumexp(dim=-1)).exp()
    assert dropped.max() < torch.finfo(torch.float32).eps / 2


def test_enough_grows_with_the_temperature():
    for size in (2, 3, 16, 18, 50, 1000, 50_258):
        found = [enough(size, 10**x) for x in torch.arange(-6, 3, 0.25).tolist()]
        numbers = [math.inf if kept is None else kept for kept in found]
        assert numbers == sorted(numbers)
        assert all(kept is None or kept < size - 1 for kept in found)
        assert found[-1] is None
        assert (found[0] is None) == (size <= 17)  # else 16 are enough
    assert enough(1000, 0.01) < enough(1000, 0.05)


# ---------------------------------------------------------------- two noise levels

PAIR = -1.0, -2.0  # gamma at t and at s


def outcome(xt: Tensor, xs: Tensor, x0: Tensor) -> Tensor:
    """Which of (x_t, x_s) is x_0, and whether they are the same, as a number."""
    return (4 * (xt == x0) + 2 * (xs == x0) + (xt == xs).long()).flatten()


def test_pairs_have_the_law_of_a_shared_noise(dense):
    """Jointly, at each level, and in which token it is otherwise."""
    x0 = dense.x0
    right = [dense.latents(gamma).argmax(dim=-1, keepdim=True) for gamma in PAIR]
    stream = RowStream([4], range(len(x0)))
    ours = argmax_pair(x0, *map(levels_at, PAIR), K, stream)
    p_values = [same_frequencies(outcome(*ours, x0), outcome(*right, x0))]
    for gamma, x in zip(PAIR, ours, strict=True):
        P = probability(gamma, K)
        p_values.append(stats.binomtest(int((x == x0).sum()), N, P).pvalue)
        places = others_of(x, x0)
        for clean in CLEAN:
            here = places[x0 == clean]
            p_values.append(uniform(here[here >= 0], K - 1))
    assert_likely(p_values)
    xt, xs = ours
    both = (xt != x0) & (xs != x0)
    assert both.any()
    assert torch.equal(xt[both], xs[both])
    assert not ((xt == x0) & (xs != x0)).any()  # less noise keeps x_0


@pytest.mark.parametrize("size", [2, 3, 6])
def test_pairs_of_a_small_vocabulary(size):
    """Where one token more or less among the others shows."""
    generator = torch.Generator().manual_seed(size)
    x0 = torch.randint(size, (N // 10, 10), generator=generator)
    stream = RowStream([size], range(len(x0)))
    pair = argmax_pair(x0, *map(levels_at, PAIR), size, stream)
    counts = [int((x == x0).sum()) for x in pair]
    assert_likely(
        stats.binomtest(count, N, probability(gamma, size)).pvalue
        for gamma, count in zip(PAIR, counts, strict=True)
    )


def test_pairs_of_a_dense_noise_are_its_argmaxes(dense):
    x0, eps = dense.x0, dense.eps
    largest, other = eps.scatter(1, x0, -torch.inf).max(dim=-1, keepdim=True)
    own = eps.gather(1, x0)
    ours = pair_of(x0, *map(levels_at, PAIR), own, largest, other)
    for gamma, x in zip(PAIR, ours, strict=True):
        right = dense.latents(gamma).argmax(dim=-1, keepdim=True)
        assert torch.equal(x, right)
    assert not torch.equal(*ours)
