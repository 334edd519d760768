"""Laws of samples that are written block by block: a cache changes nothing, one block
is the plain sampler, and blocks have the product of their enumerated laws.
"""

import enumeration
import pytest
import torch
from enumeration import JOINTS, Belief, configure, enumerate_samples, p_value
from tiny import SAMPLING, StubTokenizer, tiny_model

from sampling.blocks import BlockByBlock, Context
from sampling.prompts import Given

B, L, SIZE, STEPS = 5, 8, 2, 4
ALGORITHMS = ("d3pm", "duo_base", "mdlm", "sedd")
PAIRS = [pair for pair in SAMPLING if pair[1] in ALGORITHMS]
pairs = pytest.mark.parametrize(
    ("predictor", "name"), PAIRS, ids=["-".join(pair) for pair in PAIRS]
)
# What a model with blocks can do beside its predictor.
WAYS = {
    "longer": ("sampling.num_blocks=6", "algo.time_conditioning=True"),
    "dense-ending": (
        *("sampling.num_blocks=6", "sampling.stop_at_eos=True"),
        "sampling.use_float64=False",
    ),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def writing(predictor, name, *overrides, size=SIZE):
    """A model of which tokens are not too sure."""
    base = f"algo={name}", f"sampling.predictor={predictor}", f"sampling.steps={STEPS}"
    base += ("sampling.temperature=3", f"algo.block_size={size}")
    return tiny_model(*base, *overrides)


def surest(*overrides):
    """A model that writes what it is surest of: nothing is left to chance."""
    return writing("confidence", "mdlm", "sampling.temperature=0", *overrides)


def given_rows(lengths, length):
    """Random tokens at the beginning of each row."""
    tokens = torch.randint(2, 6, (len(lengths), length), generator=seeded(7))
    return Given(tokens, torch.arange(length) < torch.tensor(lengths)[:, None])


# ---------------------------------------------------------------- the cache


@pairs
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_changes_no_token(predictor, name, way):
    """Against a network that is shown noisy and clean blocks in one pass, as in
    training, at every evaluation; it is never asked for what a cache has seen."""
    models = [
        writing(predictor, name, *WAYS[way], f"sampling.block_cache={is_cached}")
        for is_cached in (True, False)
    ]
    got, expected = (model.generate_samples(B, seeded()) for model in models)
    assert torch.equal(got.tokens, expected.tokens)
    assert (got.lengths is None) == (way == "longer")
    if got.lengths is not None:
        assert torch.equal(got.lengths, expected.lengths)
    passes = got.evaluations - expected.evaluations  # over clean blocks
    assert bool((passes >= 0).all())
    assert int(passes.max()) <= models[0].sampler.length(L) // SIZE - 1


@pytest.mark.parametrize(
    ("predictor", "name", "overrides"),
    [
        ("ancestral", "duo_base", ("sampling.corrector=gibbs",)),
        ("psi", "duo_base", ("sampling.psi.middle_mode=pure-pc",)),
        ("psi", "mdlm", ("sampling.psi.middle_mode=constant-remdm-0.1",)),
        ("ancestral", "duo_base", ("sampling.noise_removal=greedy",)),
        ("ancestral", "mdlm", ("sampling.temperature=0.7", "sampling.p_nucleus=0.8")),
        ("ancestral", "mdlm", ("algo.ignore_bos=True",)),
    ],
)
def test_a_cache_changes_no_token_in_other_settings(predictor, name, overrides):
    samples = [
        writing(
            predictor, name, *overrides, f"sampling.block_cache={is_cached}"
        ).generate_samples(B, seeded())
        for is_cached in (True, False)
    ]
    assert torch.equal(samples[0].tokens, samples[1].tokens)
    if "algo.ignore_bos=True" in overrides:
        assert samples[0].tokens[:, 0].eq(0).all()


@pytest.mark.parametrize("weight", [0, 1, 2])
@pytest.mark.parametrize(
    "removal", [(), ("sampling.noise_removal=greedy", "algo.compat=reference")]
)
def test_a_cache_changes_no_token_of_a_class(weight, removal):
    """Clean blocks are seen under each condition; the published greedy end, which is
    told no class, sees them without one."""
    labels = torch.arange(B) % 3
    base = ("data.num_classes=3", f"sampling.guid_weight={weight}", *removal)
    models = [
        writing("ancestral", "duo_base", *base, f"sampling.block_cache={is_cached}")
        for is_cached in (True, False)
    ]
    got, expected = (m.generate_samples(B, seeded(), labels=labels) for m in models)
    assert torch.equal(got.tokens, expected.tokens)
    passes = got.evaluations - expected.evaluations
    assert passes.tolist() == [(L // SIZE - 1) * max(1, weight)] * B
    others = models[0].generate_samples(B, seeded(), labels=(labels + 1) % 3)
    assert torch.equal(got.tokens, others.tokens) == (weight == 0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_block_is_seen_as_in_training(name):
    """At every block of a row, and of some rows: hidden states with a cache are those
    of the pass in which the loss is computed."""
    model = writing("ancestral", name, "algo.time_conditioning=True")
    x0, xt = (torch.randint(6, (B, L), generator=seeded(i)) for i in range(2))
    sigma = torch.linspace(0.1, 2, B)[:, None]
    with torch.no_grad():
        whole = model.hidden_of(xt, x0, sigma, SIZE)
        context = Context(model, SIZE, (None,), is_cached=True)
        for start in range(SIZE, L, SIZE):
            assert context.see(x0[:, :start]) == 1
            for rows in (torch.arange(B), torch.tensor([1, 4])):
                block = slice(start, start + SIZE)
                got = context.hidden(xt[rows, block], sigma[rows], None, rows)
                expected = whole[rows, block]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- one block


@pairs
def test_one_block_is_the_plain_sampler(predictor, name):
    """L' = L: token for token, and as many evaluations."""
    base = f"algo={name}", f"sampling.predictor={predictor}", f"sampling.steps={STEPS}"
    plain, one = tiny_model(*base), tiny_model(*base, f"algo.block_size={L}")
    assert isinstance(one.sampler, BlockByBlock)
    got, expected = (m.generate_samples(B, seeded()) for m in (one, plain))
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.evaluations, expected.evaluations)


def test_a_list_of_sizes_means_its_first():
    model = writing("ancestral", "mdlm", size="[4,2]")
    assert model.sampler.block_size == model.block_size == 4


# ---------------------------------------------------------------- enumeration

K = 3
SIGNIFICANCE = 1e-3 / 60  # of all chi-square tests of this file together
N = 20_000


class Blocks:
    """In place of a network: of each block of two tokens a belief that depends on all
    tokens before it, which a cache hands over."""

    def __init__(self, is_timed, shift):
        def belief(seed):
            return Belief(is_timed, shift, seed)

        self.first = belief(0)
        self.later = {(a, b): belief(1 + a * K + b) for a in range(K) for b in range(K)}
        self.table = torch.stack([x.table for x in self.later.values()])
        self.slope = torch.stack([x.slope for x in self.later.values()])

    def hidden(self, xt, sigma, labels=None, cache=None):
        if cache is None:
            return self.first(xt, sigma)
        ids = xt[..., None, None]
        before = cache.extend(0, ids, ids)[0][:, :2, 0, 0]
        which = before[:, 0] * K + before[:, 1]
        logits = self.table.unflatten(0, (K, K))[*before.T, *xt.T]
        return logits + torch.exp(-sigma)[..., None] * self.slope[which]


@pytest.fixture
def of_three(monkeypatch):
    """The enumeration is of K = 3."""
    monkeypatch.setattr(enumeration, "K", K)
    states = torch.cartesian_prod(torch.arange(K), torch.arange(K))
    monkeypatch.setattr(enumeration, "STATES", states)


def enumerated_blocks(model, network, num_steps):
    """The law of four tokens, (K, K, K, K): a block's times that of the next one."""
    blocks, model.sampler = model.sampler, model.sampler.sampler
    law = JOINTS.get(model.config.sampling.predictor, enumerate_samples)
    first = law(model, network.first, num_steps)
    later = [law(model, belief, num_steps) for belief in network.later.values()]
    model.sampler = blocks
    return first[..., None, None] * torch.stack(later).view(K, K, K, K)


@pytest.mark.parametrize(
    ("predictor", "name", "num_steps"),
    [(*pair, 3) for pair in PAIRS]
    + [("ancestral", name, 24) for name in ("duo_base", "mdlm")],
)
def test_blocks_have_the_product_of_the_enumerated_laws(
    of_three, monkeypatch, predictor, name, num_steps
):
    """K = 3, L = 4, L' = 2: in few steps and in many."""
    is_mask = name != "duo_base"
    model = tiny_model(
        *(f"algo={name}", f"sampling.predictor={predictor}", "algo.block_size=2"),
        *("model.length=4", "algo.time_conditioning=True"),
        tokenizer=StubTokenizer(K - is_mask, 0),
    )
    assert model.vocab_size == K
    configure(
        model, **({"psi__middle_mode": "constant-0.5"} if predictor == "psi" else {})
    )
    network = Blocks(is_timed=True, shift=-1.2 if name == "sedd" else 0.0)
    monkeypatch.setattr(model, "hidden", network.hidden)
    monkeypatch.setattr(model, "logits_for_loss", lambda hidden: hidden)
    x = model.generate_samples(N, seeded(1), num_steps).tokens
    counts = (x @ torch.tensor([K**3, K**2, K, 1])).bincount(minlength=K**4)
    expected = enumerated_blocks(model, network, num_steps)
    assert abs(float(expected.sum()) - 1) < 1e-9
    assert p_value(counts, expected) > SIGNIFICANCE
    # Not that of blocks that do not see each other.
    alone = expected.sum(dim=(2, 3))[..., None, None] * expected.sum(dim=(0, 1))
    assert p_value(counts, alone) < SIGNIFICANCE


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluations_of_first_hitting(size):
    """One a token, and one for each block that another one is written behind."""
    samples = writing("first_hitting", "mdlm", size=size).generate_samples(B, seeded())
    assert samples.evaluations.tolist() == [L + L // size - 1] * B


def test_steps_are_those_of_a_block(monkeypatch):
    model, calls = writing("ancestral", "duo_base"), []
    step = model.sampler.sampler.step
    monkeypatch.setattr(
        model.sampler.sampler, "step", lambda *x: calls.append(1) or step(*x)
    )
    model.generate_samples(B, seeded(), num_steps=6)
    assert len(calls) == 6 * L // SIZE


def test_the_network_sees_a_block_with_a_cache(monkeypatch):
    """Never more tokens at once than a block, but for a window that has moved."""
    model, widths = writing("ancestral", "mdlm", "sampling.num_blocks=6"), []
    hidden = model.hidden

    def seen(xt, *rest):
        widths.append(xt.shape[1])
        return hidden(xt, *rest)

    monkeypatch.setattr(model, "hidden", seen)
    model.generate_samples(B, seeded())
    assert sorted(set(widths)) == [SIZE, L - SIZE]
    assert widths.count(L - SIZE) == 2


# ---------------------------------------------------------------- any length


def test_a_block_sees_the_tokens_of_a_window():
    """Each block of a long text is the last one of a row that begins with the L - L'
    tokens before it."""
    x = surest("sampling.num_blocks=9").generate_samples(B, seeded()).tokens
    assert x.shape == (B, 9 * SIZE)
    row = surest()
    for end in range(L, 9 * SIZE + 1, SIZE):
        window = x[:, end - L : end]
        given = Given(window, torch.arange(L).expand(B, L) < L - SIZE)
        assert torch.equal(row.generate_samples(B, given=given).tokens, window)
    assert len(x.unique(dim=0)) == 1  # of which nothing was drawn


def test_a_text_of_one_block_is_short():
    x = writing("ancestral", "mdlm", "sampling.num_blocks=1").generate_samples(B)
    assert x.tokens.shape == (B, SIZE)


# ---------------------------------------------------------------- given tokens


def test_prompts_of_several_lengths_are_continued_as_if_alone():
    """None, a part of a block, whole blocks with and without a part, and all."""
    lengths, length = [0, 1, 2, 5, 8, 13, 14], 14
    given = given_rows(lengths, length)
    model = surest("sampling.num_blocks=7")
    got = model.generate_samples(len(lengths), given=given)
    assert torch.equal(got.tokens[given.known], given.tokens[given.known])
    for row in range(len(lengths)):
        alone = Given(*(x[row : row + 1] for x in given))
        expected = model.generate_samples(1, given=alone)
        assert torch.equal(got.tokens[row], expected.tokens[0])


@pytest.mark.parametrize(("known", "evaluations"), [(4, 6), (5, 5), (8, 0)])
def test_known_blocks_are_seen_at_once(known, evaluations):
    """Neither drawn nor one after the other: one pass for all of a prompt, and after
    that one a token and one a block."""
    model = writing("first_hitting", "mdlm")
    samples = model.generate_samples(B, seeded(), given=given_rows([known] * B, L))
    assert samples.evaluations.tolist() == [evaluations] * B


def test_gaps_are_filled_and_blocks_between_them_seen():
    known = torch.tensor([True] * 3 + [False] + [True] * 3 + [False])
    tokens = torch.randint(2, 6, (B, L), generator=seeded(3))
    model = writing("ancestral", "mdlm")
    given = Given(tokens, known.expand(B, L))
    samples = model.generate_samples(B, seeded(), given=given)
    assert torch.equal(samples.tokens[:, known], tokens[:, known])
    assert bool((samples.tokens < model.mask_index).all())
    assert samples.evaluations.tolist() == [4] * B  # two gaps, and what is before each


# ---------------------------------------------------------------- the end of a text


@pytest.mark.parametrize("name", ["mdlm", "duo_base"])
def test_a_text_ends_at_its_first_eos(name):
    """Alone in its batch it is, up to there, what it is without an end."""
    free, ending = (
        writing("ancestral", name, "sampling.num_blocks=8", *more)
        for more in ((), ("sampling.stop_at_eos=True",))
    )
    found = set()
    for seed in range(5):
        x, evaluations, _ = free.generate_samples(1, seeded(seed))
        got = ending.generate_samples(1, seeded(seed))
        is_end = [i > 0 and token == 1 for i, token in enumerate(x[0].tolist())]
        end = is_end.index(True) if True in is_end else 16
        assert got.lengths.tolist() == [end]
        assert torch.equal(got.tokens[0, :end], x[0, :end])
        assert got.tokens[0, end:].tolist() == [1] * (16 - end)
        assert got.up_to_end(got.tokens)[0].tolist() == x[0, :end].tolist()
        assert bool(got.evaluations <= evaluations)
        found.add(end)
    assert len(found) > 2


def test_texts_that_have_ended_leave_the_batch(monkeypatch):
    """The network is not asked for them, and those that stay are as if alone."""
    model = surest("sampling.num_blocks=7", "sampling.stop_at_eos=True")
    given = given_rows([1, 3, 4, 6, 9, 11], 14)
    sizes, hidden = [], model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda xt, *rest: sizes.append(len(xt)) or hidden(xt, *rest)
    )
    got = model.generate_samples(6, given=given)
    monkeypatch.undo()
    assert len(got.lengths.unique()) > 1
    assert sizes[-1] < 6
    assert sum(sizes) == int(got.evaluations.sum())
    for row in range(6):
        alone = Given(*(x[row : row + 1] for x in given))
        expected = model.generate_samples(1, given=alone)
        assert torch.equal(got.tokens[row], expected.tokens[0])
        assert int(got.lengths[row]) == int(expected.lengths[0])


def test_an_eos_that_is_given_ends_nothing():
    """Nor does one before what is given: a sample holds it."""
    model = writing("ancestral", "mdlm", "sampling.stop_at_eos=True")
    tokens = torch.full((B, L), 1)
    known = torch.arange(L).expand(B, L) < 5
    got = model.generate_samples(B, seeded(), given=Given(tokens, known))
    assert bool((got.lengths >= 5).all())
    known = torch.arange(L).expand(B, L) == L - 2
    got = model.generate_samples(B, seeded(), given=Given(tokens, known))
    assert bool((got.lengths >= L - 1).all())
    assert got.tokens[:, L - 2].eq(1).all()
