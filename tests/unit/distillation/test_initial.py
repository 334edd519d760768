"""What a one-step generator starts from."""

import pytest
import torch
from refusals import refused

from distillation.initial import InitialRatio, Perturbation, Perturbed


@pytest.fixture
def initial(make_model, stub_tokenizer):
    """initial(*overrides): of a model with a mask among its 20 tokens."""

    def make(*overrides, mask=7, vocab_size=20):
        tokenizer = stub_tokenizer(vocab_size, 0, mask_token_id=mask)
        return make_model("algo=dimo", *overrides, tokenizer=tokenizer).initial

    return make


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mask", [0, 7, 19])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "unigram", "data"])
def test_exactly_so_many_masks(initial, mask, ratio, kind):
    """All else is a token, wherever the mask's id is."""
    source = initial(f"algo.r_init={ratio}", f"algo.init_tokens={kind}", mask=mask)
    if kind == "unigram":
        source.table += torch.arange(20)
    if kind == "data":
        source.table += (mask + 1) % 20
    x = source.draw(50, generator())
    assert x.shape == (50, 8)
    count = max(1, round(8 * ratio))
    assert ((x == mask).sum(dim=-1) == count).all()
    assert ((x >= 0) & (x < 20)).all()


def test_every_real_token_is_as_likely(initial):
    x = initial("algo.r_init=0.5").draw(5000, generator())
    counts = torch.bincount(x[x != 7], minlength=20)
    assert counts[7] == 0
    expected = 20_000 / 19
    others = counts[torch.arange(20) != 7]
    assert ((others - expected).abs() < 5 * expected**0.5).all()


def test_tokens_as_the_teacher_has_them(initial):
    """The mask never, whatever the table says."""
    source = initial("algo.init_tokens=unigram", "algo.r_init=0.5")
    source.table[3], source.table[4], source.table[7] = 3, 1, 5
    x = source.draw(1000, generator())
    x = x[x != 7]
    assert set(x.tolist()) == {3, 4}
    assert float((x == 3).double().mean()) == pytest.approx(0.75, abs=0.05)


def test_the_unigram_law_is_that_of_the_teacher(make_model):
    """What it believes where it sees masks alone, averaged over positions."""
    model = make_model("algo=dimo", "algo.init_tokens=unigram")
    xt = torch.full((1, 8), model.mask_index)
    expected = model(xt, torch.zeros(1, 1)).exp()[0].mean(dim=0)
    law = model._unigram(model.backbone)
    torch.testing.assert_close(law, expected.detach())
    assert law[model.mask_index] == 0


def test_text_is_remembered_the_newest_first(initial):
    """As a ring: what a run of any number of parts has seen last."""
    source = initial("algo.init_tokens=data", "algo.r_init=0")
    rows = torch.arange(300)[:, None].expand(300, 8) % 6
    for first in range(0, 300, 50):
        source.remember(rows[first : first + 50], range(first, first + 50))
    assert torch.equal(source.table[:44], rows[256:])
    assert torch.equal(source.table[44:], rows[44:256])
    x = source.draw(100, generator())
    for row in x:  # one token is a mask
        assert len(set(row[row != 7].tolist())) == 1


def test_the_first_token_is_pinned(initial):
    """To bos, and masks are among the others."""
    for ratio, count in ((0.0, 1), (0.5, 4), (1.0, 7)):
        source = initial("algo.ignore_bos=True", f"algo.r_init={ratio}")
        x = source.draw(40, generator())
        assert (x[:, 0] == 0).all()
        assert ((x == 7).sum(dim=-1) == count).all()


def test_a_seed_gives_the_same_tokens(initial):
    source = initial()
    assert torch.equal(source.draw(4, generator(1)), source.draw(4, generator(1)))
    assert not torch.equal(source.draw(4, generator(1)), source.draw(4, generator(2)))


# ---------------------------------------------------------------- ratios


def test_a_ratio_is_one_number_for_a_batch(initial):
    source = initial("algo.r_init_mode=random_0.2_0.8")
    counts = [(source.draw(9, generator(i)) == 7).sum(dim=-1) for i in range(60)]
    assert all(len(set(x.tolist())) == 1 for x in counts)
    assert {int(x[0]) for x in counts} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "fixed",
        "fix",
        "fix_",
        "fix_1.1",
        "fix_-0.1",
        "random_0.5",
        "random_0.9_0.1",
        "random_0.1_2",
        "random_a_b",
        "fix_0.1_0.2",
        "fix_nan",
        "random_0.1_0.9 ",
    ],
)
def test_other_ratios_are_refused(spec):
    refused(lambda: InitialRatio.of(spec), "algo.r_init_mode", repr(spec), "random_A_B")


def test_ratios_that_are_read():
    for spec, low, high in (
        ("fix_0.6", 0.6, 0.6),
        ("fix_1.", 1, 1),
        ("fix_.5", 0.5, 0.5),
        ("random_0_1", 0, 1),
    ):
        assert InitialRatio.of(spec) == (low, high)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "fix",
        "fix_1.5",
        "fix_-1",
        "warmup_exp_0",
        "warmup_sin_10",
        "linear_10",
        "warmup_linear",
        "warmup_cos_x",
        "_3",
        "fix_0.1_",
    ],
)
def test_other_perturbations_are_refused(spec):
    parts = ("algo.noise_emb_perturb", repr(spec), "warmup_exp_N")
    refused(lambda: Perturbation.of(spec), *parts)


@pytest.mark.parametrize("name", ["exp", "cos", "linear"])
def test_noise_grows_from_0_to_1(name):
    level = Perturbation.of(f"warmup_{name}_20").level
    levels = [level(step) for step in range(400)]
    assert levels[0] == 0
    assert levels == sorted(levels)
    assert levels[-1] == pytest.approx(1, abs=1e-6)


def test_without_noise_embeddings_are_unchanged():
    embedding = torch.randn(9, 16, generator=generator())
    ids = torch.randint(9, (3, 5), generator=generator())
    noise = torch.randn(3, 5, 16, generator=generator())
    assert torch.equal(Perturbed(ids, noise, 0.0).embed(embedding), embedding[ids])


@pytest.mark.parametrize("level", [0.1, 0.3, 0.9, 1.0])
def test_the_variance_stays_1(level):
    """s^2 + (1 - s^2) of embeddings of variance 1."""
    embedding = torch.randn(500, 64, generator=generator())
    ids = torch.randint(500, (40, 50), generator=generator(1))
    noise = torch.randn(40, 50, 64, generator=generator(2))
    x = Perturbed(ids, noise, level).embed(embedding)
    assert float(x.var()) == pytest.approx(1, abs=0.02)


def test_it_comes_right_behind_the_embedding(make_model):
    """A network does with it what it does with embeddings that are so."""
    model = make_model("algo=dimo", "algo.noise_emb_perturb=fix_0.5")
    ids = torch.randint(6, (4, 8), generator=generator())
    x = model.perturbed(ids, generator(3))
    got = model.generator_hidden(x)

    class Rows:
        def embed(self, embedding):
            noise = torch.randn(4, 8, embedding.shape[1], generator=generator(3))
            return 0.5 * noise + 0.75**0.5 * embedding[ids]

    expected = model.backbone.trunk(Rows(), torch.zeros(4))
    torch.testing.assert_close(got, expected)


def test_warm_up_goes_by_updates_of_the_generator(make_model, place):
    """In training by the run's; of weights that were read by theirs."""
    model = make_model("algo=dimo", "algo.noise_emb_perturb=warmup_linear_100")
    ids = torch.zeros(2, 8, dtype=torch.long)
    assert model.perturbed(ids, generator()) is ids
    place(model, step=30)
    assert model.perturbed(ids, generator()).level == pytest.approx(0.3)
    model.steps_read = 70
    assert model.perturbed(ids, generator()).level == pytest.approx(0.7)
