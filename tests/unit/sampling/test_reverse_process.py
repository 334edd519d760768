"""The reverse process of one call: what is evaluated, and how often."""

import sys

import pytest
import torch

from sampling.reverse_process import Chain, Step, Tokens


@pytest.fixture
def model(make_model, monkeypatch):
    """One whose hidden states say which sequence and position they are of."""
    model = make_model("algo=mdlm")
    model.asked = []

    def hidden(xt, sigma, labels=None):
        model.asked.append((xt, sigma))
        columns = torch.arange(xt.shape[1]).expand(xt.shape)
        return torch.stack([xt, columns], dim=-1).double()

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model, "logits_for_loss", lambda hidden: hidden)
    return model


@pytest.fixture
def xt():
    """Tokens that say where they are, (6, 8)."""
    return torch.arange(48).view(6, 8)


@pytest.fixture
def alpha_t():
    return torch.linspace(0.1, 0.9, 6, dtype=torch.float64)[:, None]


def chain_of(model, xt, remembers=False, generator=None):
    return Chain(model, torch.ones_like(xt, dtype=torch.bool), generator, remembers)


def some(xt, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(xt.shape, generator=generator) < share


# ---------------------------------------------------------------- tokens


def test_only_sequences_with_a_wanted_position_are_evaluated(model, xt, alpha_t):
    """At their own noise level, in one call; each is counted once."""
    where = torch.zeros(6, 8, dtype=torch.bool)
    where[1, 3] = where[4, 0] = where[4, 7] = True
    chain = chain_of(model, xt)
    (tokens,) = chain.tokens(xt, alpha_t, where)
    ((asked, sigma),) = model.asked
    assert torch.equal(asked, xt[[1, 4]])
    assert torch.equal(sigma, -alpha_t[[1, 4]].log())
    assert chain.evaluations.tolist() == [0, 1, 0, 0, 1, 0]
    assert tokens.rows.tolist() == [1, 4, 4]
    assert tokens.columns.tolist() == [3, 0, 7]


def test_nothing_is_evaluated_for_nothing(model, xt, alpha_t):
    chain = chain_of(model, xt)
    nowhere = torch.zeros(6, 8, dtype=torch.bool)
    assert list(chain.tokens(xt, alpha_t, nowhere)) == []
    got = chain.replace(xt, alpha_t, nowhere, lambda tokens: tokens.xt - 1)
    assert torch.equal(got, xt)
    assert model.asked == []
    assert not chain.evaluations.any()


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_cover_what_is_wanted_exactly_once(model, xt, alpha_t, chunk):
    """Each with its logits, token and levels; the trunk runs once for all."""
    chain, where = chain_of(model, xt), some(xt)
    where[2] = False
    chain.chunk = chunk
    parts = list(chain.tokens(xt, alpha_t, where))
    assert len(model.asked) == 1
    assert all(len(part.rows) <= chunk for part in parts)
    assert len(parts) == -(-int(where.sum()) // chunk)
    assert all(part.without_class is None for part in parts)
    joined = (
        torch.cat(values) for values in zip(*(p[:-1] for p in parts), strict=True)
    )
    tokens = Tokens(*joined)
    positions = list(zip(tokens.rows.tolist(), tokens.columns.tolist(), strict=True))
    assert positions == [tuple(position) for position in where.nonzero().tolist()]
    assert torch.equal(tokens.xt, xt[where])
    assert torch.equal(tokens.logits[:, 0], xt[where].double())
    assert torch.equal(tokens.logits[:, 1], tokens.columns.double())
    assert torch.equal(tokens.alpha_t, alpha_t[tokens.rows, 0])
    assert torch.equal(tokens.sigma, -alpha_t[tokens.rows, 0].log())


def test_pick_takes_values_by_sequence_or_by_position(model, xt, alpha_t):
    where = some(xt)
    (tokens,) = chain_of(model, xt).tokens(xt, alpha_t, where)
    values = torch.randn(6, 8)
    assert torch.equal(tokens.pick(values), values[where])
    assert torch.equal(tokens.pick(values[:, :1]), values[:, 0][tokens.rows])


def test_the_chunk_is_half_of_a_losss(model, xt, monkeypatch):
    """Probabilities are float64, twice as wide as a loss's logits."""
    monkeypatch.setattr("models.head.CHUNK_BYTES", {"cpu": 4 * 7 * 10, "cuda": 1})
    assert chain_of(model, xt).chunk == 5


# ---------------------------------------------------------------- replace


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_replace_changes_what_is_wanted_only(model, xt, alpha_t, chunk):
    """What `new` says of a chunk's tokens, in their places; its input stays."""
    chain, where, before = chain_of(model, xt), some(xt), xt.clone()
    chain.chunk = chunk
    got = chain.replace(xt, alpha_t, where, lambda tokens: tokens.xt + 100)
    assert torch.equal(xt, before)
    assert torch.equal(got, torch.where(where, xt + 100, xt))


def test_chunks_of_a_step_see_the_same_tokens(model, xt, alpha_t):
    """A later chunk does not see what an earlier one has drawn."""
    chain = chain_of(model, xt)
    chain.chunk, seen = 1, []

    def new(tokens):
        seen.append(tokens.xt)
        return torch.full_like(tokens.xt, 500)

    chain.replace(xt, alpha_t, torch.ones_like(xt, dtype=torch.bool), new)
    assert torch.equal(torch.cat(seen), xt.flatten())


# ---------------------------------------------------------------- memory


def test_a_chain_remembers_what_has_not_changed(model, xt, alpha_t):
    """Only sequences that are new or changed are evaluated, and all get the hidden
    states of what they are now."""
    chain = chain_of(model, xt, remembers=True)
    where = torch.ones_like(xt, dtype=torch.bool)
    where[5] = False

    def logits():
        return torch.cat([part.logits for part in chain.tokens(xt, alpha_t, where)])

    first = logits()
    assert chain.evaluations.tolist() == [1, 1, 1, 1, 1, 0]
    assert torch.equal(logits(), first)
    assert chain.evaluations.tolist() == [1, 1, 1, 1, 1, 0]
    xt[1, 7] = xt[3, 0] = 99
    where[5, 2] = True
    got = logits()
    assert torch.equal(model.asked[-1][0], xt[[1, 3, 5]])
    assert chain.evaluations.tolist() == [1, 2, 1, 2, 1, 1]
    assert torch.equal(got[:, 0], xt[where].double())


def test_a_chain_remembers_several_steps_back(model, xt, alpha_t):
    """A sequence that was not wanted for a while is not evaluated again."""
    chain = chain_of(model, xt, remembers=True)
    for row in (0, 1, 2, 0, 1, 2):
        where = torch.zeros_like(xt, dtype=torch.bool)
        where[row] = True
        (tokens,) = chain.tokens(xt, alpha_t, where)
        assert torch.equal(tokens.logits[:, 0], xt[row].double())
    assert chain.evaluations.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_chain_without_memory_evaluates_anew(model, xt, alpha_t):
    chain = chain_of(model, xt)
    for _ in range(3):
        list(chain.tokens(xt, alpha_t, torch.ones_like(xt, dtype=torch.bool)))
    assert chain.evaluations.tolist() == [3] * 6


# ---------------------------------------------------------------- the rest


def test_uniforms_are_wide_and_of_the_generator(model, xt):
    """float64, from the chain's generator and not from the global one."""
    u = [
        chain_of(model, xt, generator=torch.Generator().manual_seed(3)).uniform((4, 5))
        for _ in range(2)
    ]
    assert torch.equal(*u)
    assert u[0].shape == (4, 5)
    assert u[0].dtype == torch.float64
    assert bool((u[0] >= 0).all())
    assert bool((u[0] < 1).all())
    assert bool((u[0] != u[0].float().double()).any())  # 53 bits, not 24


def test_a_step_is_spread_over_sequences(xt):
    """(B, 1) in float64; kappa stays a number."""
    step = Step(torch.tensor(0.25), torch.tensor(0.5), 0.3).to(xt)
    assert step.alpha_t.tolist() == [[0.25]] * 6
    assert step.alpha_s.tolist() == [[0.5]] * 6
    assert step.alpha_t.dtype == step.alpha_s.dtype == torch.float64
    assert step.kappa == 0.3


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_only_if_asked_for(model, xt, capsys, monkeypatch, shown):
    """And only where somebody sees a bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    chain = Chain(model, xt == 0, None, show_progress=shown)
    assert list(chain.progress([1, 2])) == [1, 2]
    assert bool(capsys.readouterr().err) is shown
