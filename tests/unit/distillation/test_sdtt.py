"""SDTT around its loss: mistakes, rounds, what a round begins with, where it starts."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from chunking import random_batch
from refusals import refused

from checkpoints.checkpoint import Checkpoint
from cli.settle import algorithm_class
from cli.values import check_values
from distillation.sdtt import SDTTAsPublished
from distillation.teacher import weights_digest

ROUNDS = ("algo=sdtt", "training.sampling_eps=1e-5")

# ---------------------------------------------------------------- mistakes


MISTAKES = {
    "algo.distill_mode=tvd": "kl-bwd, kl-fwd, mse, tvd-log, tvd-prob",
    "algo.distill_mode=kl_bwd": "kl-bwd",
    "algo.sampling_mode=ddpm": "analytic, ancestral",
    "algo.teacher_time_grid=exakt": "endpoint, exact, legacy",
    "algo.T=1000": "no discrete-time form",
    "algo.orig_num_sampling_steps=4": "algo.min_num_sampling_steps=8",
    "training.ema=0 algo.use_ema_on_growth=True": "needs training.ema above 0",
    "algo.loss_type=kl-fwd": "is algo.distill_mode",
    "algo.loss_type=dcd": "elbo",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_one_line(compose, overrides):
    """The key, the value and what there is."""
    config = compose("algo=sdtt", *overrides.split())
    key, value = overrides.split()[-1].split("=")
    parts = (key, value, MISTAKES[overrides])
    refused(lambda: algorithm_class(config).validate_config(config), *parts)


@pytest.mark.parametrize(
    "override",
    [
        "algo.num_distill_steps=0",
        "algo.num_distill_steps=2.5",
        "algo.orig_num_sampling_steps=0",
        "algo.min_num_sampling_steps=0",
        "algo.grow_dt_every=0",
        "algo.reset_optimizer_on_growth=2",
        "algo.use_ema_on_growth=yes",
        "algo.start_from_ema=null",
    ],
)
def test_a_value_of_another_kind_is_one_line(compose, override):
    config = compose("algo=sdtt", override)
    refused(lambda: check_values(config), override.split("=")[0])


# ---------------------------------------------------------------- rounds


def test_8_the_table_of_rounds(make_model):
    """Of the defaults: step sizes, steps, and the end after 80 000 steps."""
    rounds = make_model(*ROUNDS).rounds
    for number in range(8):
        step = 10_000 * number
        assert rounds.number(step) == rounds.number(step + 9_999) == number
        assert rounds.start(number) == step
        D = (1 - 1e-5) / 1024 * 2**number
        assert rounds.step_size(number) == pytest.approx(D, rel=1e-14)
        assert rounds.num_steps(number) == 1024 // 2**number
        assert not rounds.is_over(step)
        assert not rounds.is_over(step + 9_999)
    assert rounds.is_over(80_000)
    assert rounds.is_over(10**9)


@pytest.mark.parametrize(
    ("steps", "factor", "least", "last"),
    [(1024, 2, 8, 7), (1024, 2, 1, 10), (1000, 3, 10, 4), (64, 4, 16, 1), (8, 2, 8, 0)],
)
def test_8_the_last_round(make_model, steps, factor, least, last):
    """The last one whose teacher takes enough steps, and no more than all time."""
    rounds = make_model(
        *ROUNDS,
        f"algo.orig_num_sampling_steps={steps}",
        f"algo.num_distill_steps={factor}",
        f"algo.min_num_sampling_steps={least}",
        "algo.grow_dt_every=10",
    ).rounds
    assert [r for r in range(20) if not rounds.is_over(10 * r)] == list(range(last + 1))
    assert rounds.step_size(last) <= 1


def test_rounds_of_one_step_never_end(make_model):
    """The student takes the teacher's own step: nothing grows."""
    rounds = make_model(*ROUNDS, "algo.num_distill_steps=1").rounds
    assert rounds.step_size(1000) == rounds.step_size(0)
    assert not rounds.is_over(10**7)


@pytest.fixture
def in_training(make_model):
    """in_training(*overrides): a model at step 0 that a stand-in trains."""

    def build(*overrides: str):
        model = make_model("algo=sdtt", "algo.grow_dt_every=3", *overrides).train()
        model.teacher.round, saved = None, []
        model.trainer = SimpleNamespace(
            global_step=0,
            global_rank=0,
            world_size=1,
            model=None,
            saved=saved,
            save_checkpoint=lambda path, weights_only: saved.append(path),
        )
        model.on_train_start()
        return model

    return build


def update(model, by: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += by
    model.ema.update(model.parameters())
    model.trainer.global_step += 1


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_8_the_teacher_changes_at_boundaries_once(in_training, micro_batches):
    model, digests, sizes = in_training(), [], []
    for _ in range(8):
        for batch_idx in range(micro_batches):
            model.on_train_batch_start(None, batch_idx)
            digests.append(weights_digest(model.teacher.network))
            sizes.append(model.step_size)
        if model.global_step % 3 == 0:
            assert digests[-1] == weights_digest(model.backbone)
        update(model)
    names = [path.rsplit("/", 1)[1] for path in model.trainer.saved]
    assert names == ["round_0.ckpt", "round_1.ckpt", "round_2.ckpt"]
    for found in (digests, sizes):
        by_step = [found[i] for i in range(0, len(found), micro_batches)]
        assert found == [x for x in by_step for _ in range(micro_batches)]
        changes = [i for i in range(1, 8) if by_step[i] != by_step[i - 1]]
        assert changes == [3, 6]
    assert sizes[-1] == pytest.approx(4 * sizes[0])


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("grows_from_ema", [False, True])
def test_10_ema_on_growth(in_training, grows_from_ema, micro_batches):
    """The average becomes teacher and student, and begins anew; else nothing but the
    teacher changes."""
    model = in_training(f"algo.use_ema_on_growth={grows_from_ema}")
    for _ in range(3):
        model.on_train_batch_start(None, 0)
        update(model)
    raw = [p.detach().clone() for p in model.parameters()]
    average = [p.clone() for p in model.ema.shadow_params]
    assert not torch.equal(raw[0], average[0])
    for batch_idx in range(micro_batches):
        model.on_train_batch_start(None, batch_idx)
    expected = average if grows_from_ema else raw
    found = zip(
        expected,
        model.parameters(),
        model.teacher.network.parameters(),
        average,
        model.ema.shadow_params,
        strict=True,
    )
    for weights, student, teacher, before, shadow in found:
        assert torch.equal(student, weights)
        assert torch.equal(teacher, weights)
        assert torch.equal(shadow, before)
    assert model.ema.num_updates == (0 if grows_from_ema else 3)
    assert all(p.requires_grad for p in model.parameters())


def test_the_step_size_is_that_of_the_teacher(in_training):
    """Also in a validation at a boundary, before the next round has begun."""
    model = in_training()
    for _ in range(3):
        model.on_train_batch_start(None, 0)
        update(model)
    assert model.rounds.number(model.global_step) == 1
    assert model.step_size == model.rounds.step_size(0)
    model.on_train_batch_start(None, 0)
    assert model.step_size == model.rounds.step_size(1)


@pytest.mark.parametrize("last", [1, 0])
def test_it_is_done_after_its_last_round(in_training, last):
    least = 1024 // 2**last
    model = in_training(f"algo.min_num_sampling_steps={least}")
    for step in range(3 * (last + 1)):
        model.trainer.global_step = step
        assert not model.is_done()
    model.trainer.global_step += 1
    assert model.is_done()


SCHEDULES = ("constant_warmup", "cosine_decay_warmup", "step_scheduler")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_new_optimizer(in_training, name, monkeypatch):
    """After the reset the rates are those from the first step on, and there is no
    moment; without it they go on."""
    overrides = [f"lr_scheduler={name}", "trainer.max_steps=40"]
    if name == "constant_warmup":
        overrides += ["lr_scheduler.num_warmup_steps=5"]
    for resets in (True, False):
        reset = f"algo.reset_optimizer_on_growth={resets}"
        model = in_training(*overrides, reset)
        optimizer = model.make_optimizer()
        schedule = model.make_schedule(optimizer)
        monkeypatch.setattr(
            type(model), "optimizers", lambda self, use_pl_optimizer, o=optimizer: o
        )
        monkeypatch.setattr(type(model), "lr_schedulers", lambda self, s=schedule: s)
        rates = []
        for _ in range(6):
            model.on_train_batch_start(None, 0)
            if model.global_step == 3:
                assert bool(optimizer.state) is not resets
            rates.append(optimizer.param_groups[0]["lr"])
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            schedule.step(*[model.global_step + 1] * hasattr(schedule, "step_update"))
            update(model, 0)
        assert (rates[3:] == rates[:3]) is (resets or len(set(rates)) == 1)


# ---------------------------------------------------------------- where it starts


def trained(model, with_ema: bool = True) -> Checkpoint:
    """A checkpoint whose raw weights are 2 and whose average is 3 everywhere."""
    raw = {f"backbone.{k}": x.clone() for k, x in model.backbone.state_dict().items()}
    for name, p in model.backbone.named_parameters():
        raw[f"backbone.{name}"] = torch.full_like(p, 2)
    shadow = [torch.full_like(p, 3) for p in model.parameters()]
    ema = {"decay": 0.9, "num_updates": 7, "shadow_params": shadow}
    return Checkpoint(weights=raw, ema=ema if with_ema else None)


@pytest.mark.parametrize(
    ("with_ema", "from_ema", "value"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 2)],
)
@pytest.mark.parametrize("decay", [0.999, 0])
def test_student_and_teacher_start_from_one_network(
    in_training, with_ema, from_ema, value, decay
):
    """EMA weights if the file has them and they are asked for; the new average starts
    there, with no update so far."""
    model = in_training(f"algo.start_from_ema={from_ema}", f"training.ema={decay}")
    model.config.training.finetune_path = "a.ckpt"
    model.load_weights(trained(model, with_ema), "training.finetune_path")
    model.on_train_start()
    model.on_train_batch_start(None, 0)
    networks = [model.backbone, model.teacher.network]
    for p in (p for network in networks for p in network.parameters()):
        assert bool((p == value).all())
    if decay:
        assert model.ema.num_updates == 0
        assert all(bool((p == value).all()) for p in model.ema.shadow_params)
    else:
        assert model.ema is None


def test_what_is_evaluated_keeps_its_average(make_model):
    model = make_model("algo=sdtt", "mode=sample_eval")
    model.load_weights(trained(model), "eval.checkpoint_path")
    assert model.ema.num_updates == 7
    assert all(bool((p == 2).all()) for p in model.parameters())


@pytest.mark.parametrize("decay", [0.999, 0])
def test_an_average_that_has_diverged_is_refused(in_training, decay):
    model = in_training(f"training.ema={decay}")
    model.config.training.finetune_path = "a.ckpt"
    checkpoint = trained(model)
    checkpoint.ema["shadow_params"][0].view(-1)[0] = torch.nan
    load = lambda: model.load_weights(checkpoint, "training.finetune_path")  # noqa: E731
    refused(load, "training.finetune_path='a.ckpt'", "EMA weights")


@pytest.mark.parametrize("algo", ["duo", "ar", "sedd", "d3pm", "distillation"])
def test_a_teacher_that_is_no_mdlm_is_refused(make_model, algo):
    model = make_model("algo=sdtt", "training.finetune_path=a.ckpt")
    own = dataclasses.replace(trained(model), config={"algo": {"name": algo}})
    load = lambda: model.load_weights(own, "training.finetune_path")  # noqa: E731
    refused(load, "cannot be the teacher of algo=sdtt", f"algo={algo}")


@pytest.mark.parametrize("algo", ["mdlm", "sdtt", "mine"])
def test_a_masked_teacher_is_taken(make_model, algo):
    model = make_model("algo=sdtt", "training.finetune_path=a.ckpt")
    own = dataclasses.replace(trained(model), config={"algo": {"name": algo}})
    model.load_weights(own, "training.finetune_path")


def test_a_teacher_of_another_size_is_refused(make_model):
    model = make_model("algo=sdtt", "training.finetune_path=a.ckpt")
    other = make_model("algo=mdlm", "model.n_blocks=3")
    load = lambda: model.load_weights(trained(other), "training.finetune_path")  # noqa: E731
    refused(load, "training.finetune_path='a.ckpt'", "does not fit")


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["bf16", "float32", "float64"])
def test_the_teacher_has_the_precision_of_the_student(make_model, precision):
    """So that equal networks have no divergence in any precision, also in bfloat16."""
    model = make_model(
        "algo=sdtt", "algo.num_distill_steps=1", f"training.loss_precision={precision}"
    ).train()
    model.teacher.take(model.backbone.state_dict(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.distillation_loss(random_batch(model), 0)
    assert float(losses.nlls.abs().max()) < 1e-6
    assert bool((losses.num_tokens > 0).any())


def test_the_published_column_of_the_mask(make_model, generator):
    """Is in the published mean of squares, which is then over one token more."""
    own, published = (
        make_model("algo=sdtt", "algo.distill_mode=mse", f"algo.compat={compat}")
        for compat in ("paper", "reference")
    )
    assert type(published) is SDTTAsPublished
    shape = (5, own.vocab_size)
    student, teacher = torch.randn(2, *shape, generator=generator).double()
    ours, theirs = (
        x.divergence_of_logits(student, teacher) * n
        for x, n in ((own, shape[1] - 1), (published, shape[1]))
    )
    assert bool((theirs >= ours).all())
    teacher = student.clone()
    teacher[:, own.mask_index] += 2  # log-probabilities of tokens are equal
    assert float(own.divergence_of_logits(student, teacher).max()) == 0
    column = published.divergence_of_logits(student, teacher)
    torch.testing.assert_close(column, torch.full_like(column, 4 / shape[1]))
