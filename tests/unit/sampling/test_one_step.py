"""Samples in one pass, and the steps that refine them."""

import pytest
import torch
from refusals import refused
from tables import Table, exact_denoiser, law_of_samples, total_variation, toy
from tiny import ALGORITHMS, compose

from sampling.one_step import OneStep
from sampling.prompts import Given
from sampling.registry import SAMPLERS, check_sampler, sampler_class

PAIR = torch.tensor([[0.4, 0.1], [0.1, 0.4]])
N = 4000
ERROR = 5 * (0.25 / N) ** 0.5  # of a share of N samples


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law(tokens: torch.Tensor) -> torch.Tensor:
    """Shares of pairs, (2, 2)."""
    counts = torch.bincount(2 * tokens[:, 0] + tokens[:, 1], minlength=4)
    return counts.view(2, 2) / len(tokens)


@pytest.mark.parametrize("overrides", [(), ("sampling.use_float64=False",)])
def test_one_pass_makes_a_sample(make_model, stub_tokenizer, overrides):
    """By the law of the generator, in one evaluation, without a mask."""
    own = ("sampling.predictor=one_step", "algo.r_init=0.5", *overrides)
    model = toy(make_model, stub_tokenizer, PAIR, *own).eval()
    torch.nn.init.normal_(model.backbone.rows, generator=generator(3))
    x, evaluations, _ = model.generate_samples(N, generator(), num_steps=1000)
    assert x.shape == (N, 2)
    assert (x < 2).all()
    assert (evaluations == 1).all()
    assert (law(x) - law_of_samples(model)).abs().max() < ERROR


def test_a_seed_gives_the_same_samples(make_model):
    """Which are those of `ancestral`, the name of a model's own way to draw."""
    models = [
        make_model("algo=dimo", f"sampling.predictor={name}")
        for name in ("one_step", "ancestral")
    ]
    x = [model.generate_samples(5, generator(1)).tokens for model in models]
    assert torch.equal(*x)
    assert not torch.equal(x[0], models[0].generate_samples(5, generator(2)).tokens)


@pytest.mark.parametrize("steps", [0, 3])
def test_what_is_given_stays(make_model, steps):
    """And is all there is of it in the input, too."""
    model = make_model("algo=dimo", f"sampling.refine_steps={steps}")
    tokens = torch.arange(8).expand(6, 8) % 6
    known = torch.rand(6, 8, generator=generator()) < 0.5
    known[0], known[1] = True, False
    x = model.generate_samples(6, generator(), given=Given(tokens, known)).tokens
    assert torch.equal(x[known], tokens[known])
    assert (x != model.mask_index).all()


def test_a_cooler_draw(make_model):
    """Nucleus: the most likely token of each position alone."""
    model = make_model("algo=dimo", "sampling.p_nucleus=0.01", "algo.r_init=1")
    model.perturbation = model.perturbation._replace(number=0.0)
    x = model.generate_samples(3, generator()).tokens
    assert torch.equal(x, x[:1].expand_as(x))
    hidden = model.generator_hidden(torch.full((1, 8), model.mask_index))
    assert torch.equal(x[:1], model.logits_for_loss(hidden)[..., :6].argmax(dim=-1))


# ---------------------------------------------------------------- refinement


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("use_float64", [True, False])
def test_refining_all_is_sampling_anew(make_model, stub_tokenizer, steps, use_float64):
    """From masks alone, an exact denoiser in many steps has the joint law."""
    own = (f"sampling.refine_steps={steps}", "sampling.refine_ratio=1.0")
    own += (f"sampling.use_float64={use_float64}", "loader.global_batch_size=4")
    model = toy(make_model, stub_tokenizer, PAIR, *own).eval()
    x, evaluations, _ = model.generate_samples(N, generator())
    share = float((x[:, 0] == x[:, 1]).double().mean())
    together = 1 / steps  # both are revealed in one step: independent
    expected = together * 0.5 + (1 - together) * 0.8
    assert abs(share - expected) < ERROR
    assert (evaluations <= 1 + steps).all()
    assert (x < 2).all()


@pytest.mark.parametrize(("ratio", "count"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_so_many_tokens_are_made_anew(make_model, monkeypatch, ratio, count):
    """Exactly round(r n) of those that are free."""
    own = ("sampling.refine_steps=2", f"sampling.refine_ratio={ratio}")
    model = make_model("algo=dimo", *own)
    seen = []
    reverse = OneStep.reverse

    def watched(self, chain, xt, *args):
        seen.append((xt == model.mask_index).sum(dim=-1))
        return reverse(self, chain, xt, *args)

    monkeypatch.setattr(OneStep, "reverse", watched)
    model.generate_samples(6, generator())
    assert (seen[0] == count).all()
    given = Given(torch.zeros(6, 8).long(), torch.arange(8).expand(6, 8) < 4)
    model.generate_samples(6, generator(), given=given)
    assert (seen[2] == max(1, round(ratio * 4))).all()


def test_another_network_refines(make_model, stub_tokenizer, monkeypatch):
    """That of sampling.refine_path, read once; the generator is what it was."""
    own = ("sampling.refine_steps=16", "sampling.refine_ratio=1.0")
    own += ("sampling.refine_path=teacher.ckpt",)
    model = toy(make_model, stub_tokenizer, PAIR, *own).eval()
    torch.nn.init.zeros_(model.backbone.rows)  # which alone would give 1/4 each
    exact, reads = exact_denoiser(PAIR), []

    class Refiner:
        network = exact

        def __init__(self, *args, **options):
            pass

        def take_checkpoint(self, checkpoint, number, where):
            assert "sampling.refine_path='teacher.ckpt'" in where

    def read(path, key, trusted):
        reads.append((path, key))
        return type("File", (), {"ema": None, "setting": lambda *args: None})()

    monkeypatch.setattr("distillation.dimo.read_checkpoint", read)
    monkeypatch.setattr("distillation.dimo.Teacher", Refiner)
    monkeypatch.setattr(model, "refuse_other_kind", lambda *args: None)
    for seed in (0, 1):
        x = model.generate_samples(N, generator(seed)).tokens
        assert total_variation(law(x), PAIR) < 0.05
    assert reads == [("teacher.ckpt", "sampling.refine_path")]
    assert isinstance(model.network, Table)
    assert model.network is model.backbone


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_fits_generators_alone(name):
    """And they have no other sampler."""
    algorithm = ALGORITHMS[name]
    if algorithm.is_one_step:
        for predictor in SAMPLERS.keys() - {"one_step", "ancestral"}:
            refused(
                lambda predictor=predictor: sampler_class(predictor, algorithm),
                f"sampling.predictor={predictor!r}",
                "one_step",
            )
        assert sampler_class("ancestral", algorithm) is OneStep
    else:
        refused(
            lambda: sampler_class("one_step", algorithm),
            "sampling.predictor='one_step'",
            algorithm.__name__,
        )


@pytest.mark.parametrize("name", ["mdlm", "ar", "duo_base"])
def test_others_have_nothing_to_refine(name):
    config = compose(f"algo={name}", "sampling.refine_steps=2")
    refused(
        lambda: check_sampler(config, ALGORITHMS[name]),
        "sampling.refine_steps=2",
        "the only value is 0",
    )
