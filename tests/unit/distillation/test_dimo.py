"""Distillation to one step: what is trained on what; a toy that can be enumerated."""

import math

import pytest
import torch
from refusals import refused
from tables import (
    Table,
    law_of_samples,
    total_variation,
    toy,
    train_toy,
)
from tiny import compose

from checkpoints.checkpoint import Checkpoint
from distillation import DiMO
from distillation.dimo import trained
from distillation.generator import Drawn
from models.ema import ExponentialMovingAverage

KEY = "training.finetune_path"


def batch_of(model, B: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (B, model.num_tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same_networks(model) -> None:
    """All three are equal."""
    weights = model.backbone.state_dict()
    model.aux.load_state_dict(weights)
    model.teacher.take(weights, 0)


def gradients(model) -> dict[str, torch.Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- equal networks


@pytest.mark.parametrize("divergence", ["fkl", "rkl", "jeffreys"])
def test_equal_networks_are_a_fixed_point(make_model, divergence):
    """g is 0 at every token, and a step leaves the generator where it is; also with
    dropout, which the judgements do without."""
    model = make_model(
        "algo=dimo", f"algo.divergence={divergence}", "model.dropout=0.3"
    ).train()
    same_networks(model)
    before = {k: x.clone() for k, x in model.backbone.state_dict().items()}
    loss = model.loss(batch_of(model))
    assert not loss.nlls.any()
    loss.loss.backward()
    found = gradients(model)
    assert all(not x.any() for k, x in found.items() if k.startswith("backbone."))
    assert any(x.any() for k, x in found.items() if k.startswith("aux."))
    model.make_optimizer().step()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.aux.training


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2])
def test_gradient_of_the_generators_logits(make_model, monkeypatch, reduction, beta):
    """g / B at masked tokens and 0 elsewhere, for all logits of the plain way."""
    model = make_model(
        "algo=dimo", f"algo.loss_reduction={reduction}", f"algo.jeffreys_beta={beta}"
    ).train()
    x0 = batch_of(model)["input_ids"]
    drawn = model.run_generator(model.draws(x0, "generator", 0))
    hidden = drawn.hidden.detach().requires_grad_()
    masks = model.masks(drawn.u.shape, "generator", "linear", 0)
    losses = model.generator_loss(Drawn(hidden, drawn.u), 0)
    losses.total.backward()
    x = model.tokens(drawn)
    xt = x.masked_fill(masks.where, model.mask_index)
    laws = []
    for network in (model.aux, model.teacher.network):
        logits = network(xt, torch.zeros(len(xt)))[..., : model.mask_index]
        laws.append(logits.double().log_softmax(dim=-1))
    p_psi, p_phi = (x.exp() for x in laws)
    gap = laws[0] - laws[1]
    reverse = p_psi * (gap - (p_psi * gap).sum(dim=-1, keepdim=True))
    g = (1 - beta) * (p_psi - p_phi) + beta * reverse
    g = g * masks.where[..., None]
    assert float(g.sum(dim=-1).abs().max()) < 1e-12
    entries = len(xt) * (1 if reduction == "sum" else 8 * model.mask_index)
    weight = model.backbone.output_embedding.weight[: model.mask_index].double()
    expected = (g / entries) @ weight
    limits = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(hidden.grad.double(), expected.detach(), **limits)
    value = 0.5 * g.square().sum(dim=-1)
    torch.testing.assert_close(
        losses.nll.double(), value.detach(), rtol=1e-4, atol=1e-6
    )
    assert float(losses.total) == pytest.approx(float(value.sum()) / entries, rel=1e-4)


def test_temperatures(make_model):
    """A sharp teacher, and an auxiliary model that is taken at another temperature."""
    model = make_model("algo=dimo", "algo.teacher_temp=0.5", "algo.aux_temp=2.0")
    z, z_psi, z_phi = (torch.randn(3, 7) for _ in range(3))
    z.requires_grad_()
    model.token_surrogate(z, z_psi, z_phi).sum().backward()
    p_psi, p_phi = ((x[:, :6] / t).softmax(-1) for x, t in ((z_psi, 2), (z_phi, 0.5)))
    torch.testing.assert_close(z.grad[:, :6], p_psi - p_phi)
    assert not z.grad[:, 6].any()


# ---------------------------------------------------------------- samples in training


def test_nothing_is_carried_over(make_model):
    """Tokens of x_init are drawn anew, as the logits say."""
    model = make_model("algo=dimo", "algo.r_init=0.2").train()
    model.backbone.output_embedding.bias.data[3] = 1e4
    draws = model.draws(batch_of(model)["input_ids"], "generator", 0)
    x = model.tokens(model.run_generator(draws))
    assert (x == 3).all()
    assert (draws.x_init.ids != 3).any()
    samples = model.generate_samples(4, torch.Generator().manual_seed(0))
    assert (samples.tokens == 3).all()


def test_no_mask_is_drawn(make_model):
    """However much the network would like it."""
    model = make_model("algo=dimo").train()
    model.backbone.output_embedding.bias.data[model.mask_index] = 1e4
    x = model.tokens(model.run_generator(model.draws(torch.zeros(4, 8), "a", 0)))
    assert x.shape == (4, 8)
    assert (x != model.mask_index).all()
    assert ((x >= 0) & (x < model.vocab_size)).all()


def test_tokens_where_they_are_asked_for(make_model):
    model = make_model("algo=dimo").train()
    drawn = model.run_generator(model.draws(torch.zeros(4, 8), "a", 0))
    every = model.tokens(drawn)
    where = torch.tensor([3, 9, 10, 31])
    some = model.tokens(drawn, where)
    assert torch.equal(some.flatten()[where], every.flatten()[where])
    assert int((some != 0).sum()) <= len(where)


def test_the_temperature_of_draws(make_model):
    """Tokens of two models whose logits differ by the factor are the same."""
    x = []
    for temperature in (0.5, 1.0):
        model = make_model("algo=dimo", f"algo.gen_temp={temperature}").train()
        head = model.backbone.output_embedding
        for p in (head.weight, head.bias):
            p.data *= temperature
        x.append(
            model.tokens(model.run_generator(model.draws(torch.zeros(4, 8), "", 0)))
        )
    assert torch.equal(*x)


def test_a_row_does_not_depend_on_the_parts_of_a_batch(make_model, place, monkeypatch):
    """Two parts of an update, or two ranks, draw what one draws; tokens may differ by
    nothing but rounding."""
    whole = make_model("algo=dimo", "loader.batch_size=4").train()
    x0 = torch.zeros(4, 8, dtype=torch.long)
    place(whole, step=5)
    one = whole.draws(x0, "generator", 0)
    masks = whole.masks(x0.shape, "generator", "linear", 0)
    cut = {
        "accumulated": ("loader.batch_size=2",),
        "ranks": ("loader.batch_size=2", "trainer.devices=2"),
    }
    for name, overrides in cut.items():
        part = make_model("algo=dimo", *overrides).train()
        for i in range(2):
            batch_idx = i if name == "accumulated" else 0
            place(part, step=5, rank=i if name == "ranks" else 0)
            two = part.draws(x0[:2], "generator", batch_idx)
            rows = slice(2 * i, 2 * i + 2)
            assert torch.equal(two.u, one.u[rows])
            for ours, theirs in zip(two.x_init[:2], one.x_init[:2], strict=True):
                assert torch.equal(ours, theirs[rows])
            own = part.masks(x0[:2].shape, "generator", "linear", batch_idx)
            assert torch.equal(own.where, masks.where[rows])
            # Parts are averaged, so each counts twice as much.
            assert own.share == pytest.approx(2 * masks.share)
    total = int(masks.where.sum())
    assert masks.share == pytest.approx(1 / total)


def test_updates_and_purposes_draw_differently(make_model, place):
    model = make_model("algo=dimo").train()
    x0 = torch.zeros(4, 8, dtype=torch.long)
    found = []
    for step, purpose in ((0, "generator"), (1, "generator"), (0, "auxiliary")):
        place(model, step=step)
        found.append(model.draws(x0, purpose, 0))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(found[a].u, found[b].u)
        assert not torch.equal(found[a].x_init.ids, found[b].x_init.ids)


@pytest.mark.parametrize("reuse", [False, True])
def test_the_auxiliary_model_has_samples_of_its_own(make_model, monkeypatch, reuse):
    """Unless it is to learn from those of the generator's update."""
    model = make_model("algo=dimo", f"algo.reuse_student_batch={reuse}").train()
    passes = []
    run = model.run_generator
    monkeypatch.setattr(model, "run_generator", lambda x: passes.append(x) or run(x))
    model.loss(batch_of(model))
    assert len(passes) == (1 if reuse else 2)


def test_the_first_token_is_pinned(make_model):
    """bos in x_init, in what is drawn, and never masked."""
    model = make_model("algo=dimo", "algo.ignore_bos=True", "algo.ratio_min=1").train()
    draws = model.draws(torch.full((4, 8), 3), "generator", 0)
    assert (draws.x_init.ids[:, 0] == 0).all()
    assert (model.tokens(model.run_generator(draws))[:, 0] == 0).all()
    where = model.masks(torch.Size((4, 8)), "generator", "linear", 0).where
    assert not where[:, 0].any()
    assert where[:, 1:].all()
    assert (model.generate_samples(3).tokens[:, 0] == 0).all()


def test_text_enters_only_where_it_is_asked_for(make_model):
    """Without data, a batch of other text is the same update."""
    for kind in ("uniform", "data"):
        model = make_model("algo=dimo", f"algo.init_tokens={kind}").train()
        losses = [model.loss(batch_of(model, seed=seed)).loss for seed in (0, 1)]
        assert torch.equal(*losses) == (kind == "uniform")


# ---------------------------------------------------------------- what is trained


def test_two_losses_two_networks(make_model):
    """Each has the gradient of its own loss alone; the teacher has none."""
    model = make_model("algo=dimo", "algo.freeze_embeddings=False").train()
    x0 = batch_of(model)["input_ids"]
    model.generator_loss(model.run_generator(model.draws(x0, "generator", 0)), 0)
    loss = model.loss(batch_of(model))
    loss.loss.backward()
    together = gradients(model)
    model.zero_grad()
    drawn = model.run_generator(model.draws(x0, "generator", 0))
    model.generator_loss(drawn, 0).total.backward()
    assert all(name.startswith("backbone.") for name in gradients(model))
    with torch.no_grad():
        drawn = model.run_generator(model.draws(x0, "auxiliary", 0))
    model.auxiliary_loss(drawn, 0).backward()
    alone = gradients(model)
    assert together.keys() == alone.keys() == dict(model.named_parameters()).keys()
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in model.teacher.network.parameters())


def test_rates_of_the_networks(make_model):
    """One schedule of one optimiser, each with its own rate."""
    model = make_model(
        "algo=dimo",
        "optim.lr=2e-4",
        "algo.aux_lr=5e-4",
        "lr_scheduler.num_warmup_steps=4",
    )
    configured = model.configure_optimizers()
    groups = configured["optimizer"].param_groups
    schedule = configured["lr_scheduler"]["scheduler"]
    networks = (model.backbone, model.aux)
    for step in range(6):
        factor = min(step / 4, 1)
        for group, rate in zip(groups, (2e-4, 5e-4), strict=True):
            assert group["lr"] == pytest.approx(rate * factor)
        configured["optimizer"].step()
        schedule.step()
    for group, network in zip(groups, networks, strict=True):
        ours = [p for p in network.parameters() if p.requires_grad]
        assert {id(p) for p in group["params"]} == {id(p) for p in ours}


def test_embeddings_and_head_are_frozen(make_model):
    """In both networks; they are in checkpoints and in the EMA all the same."""
    model = make_model("algo=dimo")
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    names = ("vocab_embed.embedding", "output_layer.linear.weight")
    names += ("output_layer.linear.bias",)
    assert frozen == {f"{x}.{name}" for x in ("backbone", "aux") for name in names}
    ema = model.make_ema()
    assert len(ema.shadow_params) == len(list(model.backbone.parameters()))
    ema.update(model.averaged_parameters())
    free = make_model("algo=dimo", "algo.freeze_embeddings=False")
    assert all(p.requires_grad for p in free.parameters())
    assert free.state_dict().keys() == model.state_dict().keys()


def test_only_the_generator_is_clipped(make_model, monkeypatch):
    """And the norm that says whether an update is finite is that of both."""
    model = make_model("algo=dimo").train()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    monkeypatch.setattr(type(model), "trainer", FakeTrainer())
    groups = [trained(network) for network in (model.backbone, model.aux)]
    sizes = [sum(p.numel() for p in group) for group in groups]
    norm = model._clip(1.0, None)
    assert float(norm) == pytest.approx(math.sqrt(sum(sizes)), rel=1e-5)
    squares = [
        sum(
            float(p.grad.square().sum())
            for p in network.parameters()
            if p.requires_grad
        )
        for network in (model.backbone, model.aux)
    ]
    assert squares[0] == pytest.approx(1, rel=1e-4)
    assert squares[1] == pytest.approx(sizes[1], rel=1e-6)


class FakeTrainer:
    model = None


def test_the_ramp_of_the_ema(make_model):
    """(1 + n) / (10 + n) with the updates before."""
    model = make_model("algo=dimo", "training.ema=0.5")
    ema = model.make_ema()
    assert isinstance(ema, ExponentialMovingAverage)
    shadow = torch.zeros(())
    parameter = next(p for p in model.backbone.parameters() if p.requires_grad)
    index = [id(p) for p in model.backbone.parameters()].index(id(parameter))
    ema.shadow_params[index].zero_()
    parameter.data.fill_(1)
    for n in range(12):
        rate = min(0.5, (1 + n) / (10 + n))
        shadow = rate * shadow + (1 - rate)
        ema.update(model.averaged_parameters())
        assert float(ema.shadow_params[index].flatten()[0]) == pytest.approx(
            float(shadow)
        )


# ---------------------------------------------------------------- a toy

MODES = torch.tensor([[0.5, 0.0], [0.0, 0.5]])  # 00 and 11


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_auxiliary_model_learns_the_conditionals(
    make_model, stub_tokenizer, place, monkeypatch, smoothing
):
    """Of samples of a known law, V = 4 and L = 2; smoothed, 0.9 p + 0.1 / V."""
    joint = torch.rand(4, 4, generator=torch.Generator().manual_seed(2)).square()
    joint /= joint.sum()
    overrides = (f"algo.aux_label_smoothing={smoothing}", "algo.aux_lr=0.03")
    model = toy(make_model, stub_tokenizer, torch.ones(4, 4) / 16, *overrides)
    draw = torch.Generator().manual_seed(0)

    def sample(drawn, where=None):
        flat = joint.flatten().multinomial(64, replacement=True, generator=draw)
        return torch.stack([flat // 4, flat % 4], dim=1)

    monkeypatch.setattr(model, "tokens", sample)
    monkeypatch.setattr(
        model,
        "generator_loss",
        lambda drawn, i: model.head_loss(drawn.hidden, lambda z: 0 * z.sum(-1), None),
    )
    train_toy(model, place, 600)
    for first in range(4):
        xt = torch.tensor([[first, 4], [4, first], [4, 4]])
        law = model.aux(xt)[..., :4].softmax(dim=-1)
        for got, exact in (
            (law[0, 1], joint[first]),
            (law[1, 0], joint[:, first]),
            (law[2, 0], joint.sum(dim=1)),
            (law[2, 1], joint.sum(dim=0)),
        ):
            expected = (1 - smoothing) * exact / exact.sum() + smoothing / 4
            assert total_variation(got.detach(), expected) < 0.06


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_one_step_reaches_correlated_tokens(make_model, stub_tokenizer, place, beta):
    """Two tokens that are equal: a generator that starts from one random token makes
    them so, and both values stay. The best product of two laws is 0.5 away."""
    overrides = ("algo.r_init=0.5", f"algo.jeffreys_beta={beta}")
    model = toy(make_model, stub_tokenizer, MODES, *overrides)
    assert total_variation(law_of_samples(model), MODES) > 0.2
    train_toy(model, place, 300)
    law = law_of_samples(model)
    assert total_variation(law, MODES) < 0.05
    assert min(law[0, 0], law[1, 1]) > 0.4


def test_from_masks_alone_it_cannot(make_model, stub_tokenizer, place):
    """There is one x_init then: a product of laws, or one of the modes."""
    model = toy(make_model, stub_tokenizer, MODES, "algo.r_init=1.0")
    train_toy(model, place, 300)
    assert total_variation(law_of_samples(model), MODES) > 0.45


def test_the_toy_teacher_is_exact():
    from tables import exact_denoiser

    joint = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    table = exact_denoiser(joint)
    assert isinstance(table, Table)
    p = table(torch.tensor([[2, 1], [2, 2], [0, 2]]))[..., :2].softmax(dim=-1)
    torch.testing.assert_close(p[0, 0], torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(p[1, 0], torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(p[2, 1], torch.tensor([1 / 3, 2 / 3]))


# ---------------------------------------------------------------- weights


def teacher_file(model, ema: float | None = None, **setting) -> Checkpoint:
    """Of a masked diffusion model like the generator, and its EMA times a factor."""
    weights = {f"backbone.{k}": x for k, x in model.backbone.state_dict().items()}
    config = {"algo": {"name": "mdlm", "time_conditioning": False} | setting}
    shadow = None
    if ema is not None:
        shadow = [ema * p.detach() for p in model.backbone.parameters()]
        shadow = {"decay": 0.9, "num_updates": 5, "shadow_params": shadow}
    return Checkpoint(weights=weights, ema=shadow, config=config, step=7)


@pytest.mark.parametrize(
    ("use", "ema", "factor"), [(1, 2.0, 2), (0, 2.0, 1), (1, None, 1)]
)
def test_both_networks_begin_as_the_teacher(make_model, use, ema, factor):
    """As its EMA weights, where there are some and nobody says otherwise."""
    other = make_model("algo=dimo")
    model = make_model("algo=dimo", f"algo.start_from_ema={bool(use)}")
    for p in model.parameters():
        p.data.add_(1)
    model.load_weights(teacher_file(other, ema), KEY)
    for network in (model.backbone, model.aux):
        for p, q in zip(network.parameters(), other.backbone.parameters(), strict=True):
            assert torch.equal(p, factor * q)
    assert model.ema is None
    assert model.steps_done == 0


def test_other_teachers_are_refused(make_model):
    """In one line that says what it is."""
    model = make_model("algo=dimo")
    own = Checkpoint(weights=model.state_dict(), config={"algo": {"name": "dimo"}})
    refused(lambda: model.load_weights(own, KEY), KEY, "generator of one step")
    for name in ("ar", "sedd", "d3pm", "duo"):
        file = teacher_file(model, name=name)
        refused(lambda file=file: model.load_weights(file, KEY), KEY, f"algo={name}")
    timed = teacher_file(model, time_conditioning=True)
    refused(lambda: model.load_weights(timed, KEY), KEY, "time_conditioning=True")
    small = make_model("algo=dimo", "model.n_blocks=1")
    refused(lambda: small.load_weights(teacher_file(model), KEY), KEY, "does not fit")
    wide = make_model("algo=dimo", "model.hidden_size=16")
    refused(lambda: wide.load_weights(teacher_file(model), KEY), KEY, "does not fit")
    file = teacher_file(model)
    file.weights["backbone.output_layer.linear.bias"][0] = torch.nan
    refused(lambda: model.load_weights(file, KEY), KEY, "diverged")


def test_its_own_checkpoint_comes_back(make_model):
    model, other = make_model("algo=dimo"), make_model("algo=dimo")
    for p in model.parameters():
        p.data.mul_(1.5)
    file = Checkpoint(
        weights=model.state_dict(), config={"algo": {"name": "dimo"}}, step=9
    )
    other.load_weights(file, "eval.checkpoint_path")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other.steps_done == 9


def test_samples_start_from_what_they_were_trained_with(make_model):
    """A table of text or of a law is in the checkpoint."""
    model = make_model("algo=dimo", "algo.init_tokens=unigram")
    config = {"algo": {"name": "dimo", "init_tokens": "unigram"}}
    file = Checkpoint(weights=model.state_dict(), config=config)
    key = "eval.checkpoint_path"
    other = make_model("algo=dimo")
    refused(lambda: other.load_weights(file, key), key, "give algo.init_tokens=unigram")
    same = make_model("algo=dimo", "algo.init_tokens=unigram")
    model.initial.table += 3
    same.load_weights(file, key)
    assert torch.equal(same.initial.table, model.initial.table)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("algo.true_cfg=2", ("algo.true_cfg=2", "no condition", "only value is 1")),
        ("algo.aux_rounds=2", ("algo.aux_rounds=2", "one step each", "algo.aux_lr")),
        ("algo.time_conditioning=True", ("algo.time_conditioning", "only value")),
        ("algo.T=10", ("algo.T=10",)),
        ("algo.divergence=kl", ("algo.divergence='kl'", "jeffreys")),
        ("algo.init_tokens=noise", ("algo.init_tokens='noise'", "unigram")),
        ("algo.mask_ratio_mode=sine", ("algo.mask_ratio_mode='sine'", "arccos")),
        ("algo.aux_mask_ratio_mode=sine", ("algo.aux_mask_ratio_mode", "arccos")),
        ("algo.loss_reduction=max", ("algo.loss_reduction='max'", "mean")),
        ("algo.ratio_max=0.01", ("algo.ratio_min=0.02", "algo.ratio_max=0.01")),
        ("algo.r_init_mode=random", ("algo.r_init_mode='random'", "random_A_B")),
        ("algo.noise_emb_perturb=0.1", ("algo.noise_emb_perturb", "fix_S")),
        ("sampling.predictor=psi", ("sampling.predictor='psi'", "one_step")),
        ("sampling.noise_removal=greedy", ("sampling.noise_removal='greedy'",)),
        ("sampling.refine_path=a.ckpt", ("sampling.refine_path", "refine_steps=0")),
    ],
)
def test_what_has_no_meaning_is_refused(override, parts):
    refused(lambda: DiMO.validate_config(compose("algo=dimo", override)), *parts)


def test_a_beta_without_effect_is_refused():
    config = compose("algo=dimo", "algo.divergence=rkl", "algo.jeffreys_beta=0.5")
    refused(lambda: DiMO.validate_config(config), "algo.jeffreys_beta=0.5", "rkl")
