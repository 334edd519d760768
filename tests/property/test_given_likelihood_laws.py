"""Likelihoods of unknown tokens given known ones: against enumeration, against one
token at a time, and as what every distribution obeys.

Shapes: B rows, L = 4 tokens, S corrupted rows, K = 7.
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import ALGORITHMS

from evaluation.scoring import Row, Scorer
from training.scorable import Stratum

IDS = (0, 3, 2, 5)  # bos, one token of context, two that are scored
BOUNDS = sorted(name for name, cls in ALGORITHMS.items() if not cls.is_autoregressive)
NUM_DRAWS = 4096
SETTINGS = ("training.loss_precision=float64",)


@pytest.fixture
def model_of(make_model):
    """A tiny model of an algorithm; discrete-time ones with few times."""

    def make(name):
        few = ["algo.T=10"] if ALGORITHMS[name].is_discrete_time else []
        return make_model(f"algo={name}", *few, *SETTINGS)

    return make


def quadrature(model):
    """Times and weights, (n,) each, of the mean over u in (0, 1).

    Discrete time: how much of u each time of the grid takes. Else Gauss nodes in
    log t, because integrands may have a logarithm at 0.
    """
    eps = model.sampling_eps
    if model.T > 0:
        edges = torch.arange(model.T + 1).double() / model.T
        return edges[1:], edges.clamp(min=eps).diff() / (1 - eps)
    v, w = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(32))
    t = torch.exp(math.log(eps) * (1 - v) / 2)
    return t, w * t * -math.log(eps) / 2 / (1 - eps)


@torch.no_grad()
def enumerated(model, laws, ids, num_known):
    """The bound, integrated over times and all corrupted rows, nats."""
    x0, K = torch.tensor([ids]), model.vocab_size
    unknown = len(ids) - num_known
    states = torch.cartesian_prod(*[torch.arange(K)] * unknown).view(-1, unknown)
    xt = x0.repeat(len(states), 1)
    xt[:, num_known:] = states
    total = 0.0
    for t, weight in zip(*quadrature(model), strict=True):
        alpha, dalpha = model.noise(t.view(1, 1))
        if model.T > 0:
            s = (t - 1 / model.T).clamp(min=0).view(1, 1)
            dalpha = model.T * (alpha - model.noise(s).alpha_t)
        q = laws.marginal(model, x0[0, num_known:], alpha[0])  # (unknown, K)
        q_xt = torch.stack([q[i, states[:, i]] for i in range(unknown)]).prod(dim=0)
        levels = (x.expand(len(xt), 1) for x in (alpha, dalpha))
        alpha_t, dalpha_t = levels
        loss = model.nll_per_token(
            model(xt, model.sigma(alpha_t)),
            xt=xt,
            x0=x0.expand_as(xt),
            alpha_t=alpha_t,
            dalpha_t=dalpha_t,
        )[:, num_known:].sum(dim=-1)
        total += float(weight * (q_xt * loss).sum())
    if hasattr(model, "reconstruction_nll"):
        total += float(model.reconstruction_nll(x0).nll[0, num_known:].sum())
    return total


@pytest.mark.parametrize("num_known", [2, 1], ids=["suffix", "whole"])
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_converges_to_its_enumerated_value(model_of, laws, name, num_known):
    """The scorer's mean of 4096 draws within 4 standard errors, as if times were
    not stratified; the standard error is of other draws."""
    model = model_of(name)
    with model.through(model.aux) if model.is_one_step else nullcontext():
        exact = enumerated(model, laws, IDS, num_known)
    scorer = Scorer(model, batch_size=2048, num_draws=NUM_DRAWS)
    row = Row(IDS, num_known)
    got = scorer.nll([row])[row]
    known = torch.arange(4).expand(1024, 4) < num_known
    x0 = torch.tensor([IDS]).expand(1024, 4)
    with torch.no_grad():
        draws = model.nll_given(x0, known, [Stratum(i) for i in range(1024)])
    error = float(draws.sum(dim=-1).std()) / math.sqrt(NUM_DRAWS)
    assert abs(got - exact) < 4 * error
    assert error < 0.05 * exact  # else the line above would say little


@torch.no_grad()
def test_probabilities_of_a_last_token_sum_to_one_or_less(model_of, laws, algo_name):
    """sum_y p(y | c) = 1; a bound of each makes it less."""
    model = model_of(algo_name)
    rows = [Row((*IDS[:3], int(y)), 3) for y in laws.clean(model)]
    nll = Scorer(model, batch_size=4096, num_draws=256).nll(rows)
    total = sum(math.exp(-nll[row]) for row in rows)
    if model.is_autoregressive:
        assert total == pytest.approx(1, abs=1e-5)
    else:
        assert 0.2 < total < 1.02  # draws; times below sampling_eps are left out


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_exact_likelihoods_are_those_of_one_token_at_a_time(model_of, batch_size):
    """Padded batches of mixed lengths, to 1e-5."""
    model = model_of("ar")
    ids = torch.randint(1, 6, (7, 8), generator=torch.Generator().manual_seed(0))
    rows = [
        Row((0, *x[:n].tolist()), num_known)
        for x, n, num_known in zip(
            ids, (7, 1, 4, 6, 2, 5, 3), (1, 1, 3, 6, 2, 1, 4), strict=True
        )
    ]
    scorer = Scorer(model, batch_size=batch_size)
    nll, greedy = scorer.nll(rows), scorer.greedy(rows)
    for row in rows:
        expected, choices = 0.0, []
        for i in range(row.num_known, len(row.ids)):
            log_p = model.next_token(torch.tensor([row.ids[:i]]))[0]
            expected -= float(log_p[row.ids[i]])
            choices.append(int(log_p.argmax()))
        assert nll[row] == pytest.approx(expected, abs=1e-5)
        assert greedy[row] == (tuple(choices) == row.ids[row.num_known :])


@torch.no_grad()
def test_greedy_tokens_of_an_exact_model_are_found(model_of):
    model = model_of("ar")
    ids = [0, 3]
    while len(ids) < 6:
        ids.append(int(model.next_token(torch.tensor([ids])).argmax()))
    other = [*ids[:-1], next(y for y in range(6) if y != ids[-1])]
    rows = [Row(tuple(ids), 2), Row(tuple(other), 2)]
    assert Scorer(model).greedy(rows) == {rows[0]: True, rows[1]: False}


@torch.no_grad()
def test_regret_is_the_distance_to_the_first_choice(model_of, laws, algo_name):
    """One token is best; regrets differ as the log-probabilities of one row do."""
    model = model_of(algo_name)
    clean = laws.clean(model)
    x0 = torch.tensor([IDS[:3]]).repeat(len(clean), 1)
    x0 = torch.cat([x0, clean[:, None]], dim=1)
    known = torch.tensor([True, True, True, False]).expand_as(x0)
    regret = model.regret_given(x0, known, [Stratum(5)] * len(x0))
    assert (regret[:, :3] == 0).all()
    assert (regret[:, 3] == 0).sum() == 1
    assert torch.exp(-regret[:, 3]).sum() > 1  # p(y) / max p
    if model.is_autoregressive:
        nll = model.nll_given(x0, known, [])[:, 3]
        expected = nll - nll.min()  # of another pass through a float32 network
        torch.testing.assert_close(regret[:, 3], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_known_tokens_stay_and_have_no_loss(model_of, diffusion_name):
    model = model_of(diffusion_name)
    x0 = torch.tensor([IDS]).repeat(64, 1)
    known = torch.tensor([True, False, True, False]).expand_as(x0)
    strata = [Stratum(seed) for seed in range(64)]
    generators = [stratum.generator() for stratum in strata]
    z = model.corrupt(x0, torch.ones(64).double(), known=known, generators=generators)
    assert (z.xt[known] == x0[known]).all()
    assert (z.xt[~known] != x0[~known]).any()
    nll = model.nll_given(x0, known, strata)
    assert (nll[known] == 0).all()
    assert (nll[~known] != 0).any()


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model_of, diffusion_name):
    model = model_of(diffusion_name)
    x0 = torch.tensor([IDS, (0, 1, 1, 4), (0, 2, 4, 4)])
    known = torch.arange(4).expand(3, 4) < 2
    strata = [Stratum(seed, 2, 5) for seed in (7, 8, 9)]
    together = model.nll_given(x0, known, strata)
    for i in range(3):
        alone = model.nll_given(x0[i : i + 1], known[i : i + 1], strata[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_strata_share_the_times_out(model_of, monkeypatch):
    """Draw j of n has a time in part j, as in a validation."""
    model, seen = model_of("mdlm"), []
    times = model.times
    monkeypatch.setattr(model, "times", lambda u: seen.append(u) or times(u))
    x0 = torch.tensor([IDS]).repeat(8, 1)
    known = torch.arange(4).expand(8, 4) < 2
    model.nll_given(x0, known, [Stratum(3, j, 8) for j in range(8)])
    assert torch.equal((seen[0] * 8).floor(), torch.arange(8).double())
