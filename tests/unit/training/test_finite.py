"""What is not finite stops training before it is written, or is left out; and no number
is made of it afterwards."""

import logging
import math
import os
import re

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import (
    _AcceleratorConnector,
)
from refusals import refused
from tiny import compose, tiny_model

import algo
import main
from checkpoints.about import describe
from checkpoints.reading import read_checkpoint
from distillation import Distillation
from evaluation.scoring import Scorer
from models.finite import not_finite, summary
from training.finite import LEFT_OUT, Update, Updates, leave_out
from utils import NotFinite

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NAN, INF = math.nan, math.inf

# ---------------------------------------------------------------- what is finite


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_single_value_is_found(value, dtype):
    tensors = {"a": torch.ones(3, dtype=dtype), "b": torch.ones(2, 2, dtype=dtype)}
    tensors |= {"count": torch.tensor(3), "none": torch.zeros(0)}
    assert (not_finite(tensors), summary(tensors)) == ([], None)
    tensors["b"][1, 0] = value
    assert not_finite(tensors) == ["b"]
    assert summary(tensors) == (
        "1 of 4 hold NaN or infinite values, the first of them b"
    )


def test_large_weights_are_finite():
    assert not not_finite({"a": torch.full((9,), 3e38)})
    assert not_finite({}) == []


@pytest.mark.parametrize("bad", [0.0, 1.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.optim.AdamW(x, fused=True),
        lambda x: torch.optim.AdamW(x),
        lambda x: torch.optim.SGD(x, lr=1.0, momentum=0.9),
    ],
)
def test_an_optimiser_leaves_an_update_out(make, bad):
    """Weights, moments and its own count are as they were, whatever the optimiser."""
    weights = torch.nn.Parameter(torch.ones(4))
    optimizer = make([weights])
    weights.grad = torch.ones(4)
    leave_out(optimizer, torch.tensor(False))
    optimizer.step()
    before = weights.detach().clone(), str(optimizer.state_dict()["state"])
    weights.grad = torch.full((4,), NAN if bad else 1.0)
    leave_out(optimizer, torch.tensor(bool(bad)))
    optimizer.step()
    same = torch.equal(weights, before[0])
    assert same == bool(bad)
    assert weights.isfinite().all()
    assert (str(optimizer.state_dict()["state"]) == before[1]) == bool(bad)


def test_a_good_update_is_bit_for_bit_that_of_a_plain_optimiser():
    runs = []
    for is_watched in (False, True):
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 100))
        optimizer = torch.optim.AdamW([weights], lr=0.1, fused=True)
        for step in range(5):
            weights.grad = torch.sin(weights.detach() * step)
            if is_watched:
                leave_out(optimizer, torch.tensor(False))
            optimizer.step()
        runs.append(weights.detach())
    assert torch.equal(*runs)


def test_the_host_is_told_of_each_update_once():
    updates = Updates()
    updates.note(1, torch.tensor([1.0, 2.0]))
    updates.note(2, torch.tensor([NAN, 2.0]))
    assert [x.step for x in updates.arrived()] == [1, 2]
    assert list(updates.arrived(everything=True)) == []
    assert Update(1, 1.0, 2.0).complaint() is None
    assert Update(1, NAN, INF).complaint() == "the loss is nan"
    assert "gradients is inf" in (Update(1, 1.0, INF).complaint() or "")


# ---------------------------------------------------------------- training


class Breaks:
    """Its loss, or its gradients alone, are not finite at some steps."""

    steps: tuple[int, ...] = ()
    value = NAN
    only_gradients = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step + 1 not in Breaks.steps:
            return loss
        if Breaks.only_gradients:
            return loss + Bad.apply(loss)
        self.note_loss(loss * Breaks.value)
        return loss * Breaks.value


class Bad(torch.autograd.Function):
    """0, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, Breaks.value)


class Broken(Breaks, algo.MDLM):
    pass


class BrokenStudent(Breaks, Distillation):
    pass


RUN = (
    "algo=mdlm",
    "data.num_train=24",
    "data.num_valid=9",
    "model.n_blocks=1",
    "model.hidden_size=8",
    "trainer.max_steps=6",
    "trainer.val_check_interval=100",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
    "eval.generate_samples=False",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*overrides): a tiny run in tmp_path that breaks as `Breaks` says."""
    monkeypatch.chdir(tmp_path)

    def train(*more: str, mode: str = "train", target: type = Broken) -> dict:
        overrides = {x.split("=")[0]: x for x in (*RUN, *more)}.values()
        config = compose(*overrides, f"checkpointing.save_dir={tmp_path}")
        config.mode = mode
        config.algo._target_ = f"{target.__module__}.{target.__name__}"
        lightning.seed_everything(config.seed, verbose=False)
        return main.MODES[mode](config)

    yield train
    Breaks.steps, Breaks.value, Breaks.only_gradients = (), NAN, False


def breaks(*steps: int, value: float = NAN, only_gradients: bool = False) -> None:
    Breaks.steps, Breaks.value, Breaks.only_gradients = steps, value, only_gradients


def files_of(folder) -> dict[str, int]:
    """Checkpoints with the step of each; the weights of all are finite."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        checkpoint = read_checkpoint(str(path), "x")
        assert checkpoint.not_finite() is None, path
        found[path.name] = checkpoint.step
    return found


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("only_gradients", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.gradient_clip_val=0",),
        ("trainer.gradient_clip_val=1", "+trainer.gradient_clip_algorithm=value"),
        ("loader.batch_size=2",),
        ("training.ema=0",),
    ],
)
def test_training_stops(train, tmp_path, value, only_gradients, overrides):
    """With step, value and the last good checkpoint, at a step where one is due."""
    breaks(4, value=value, only_gradients=only_gradients)
    with pytest.raises(NotFinite) as error:
        train(*overrides)
    text = str(error.value)
    assert error.value.status == 1
    what = "the norm of the gradients is" if only_gradients else "the loss is"
    assert re.match(rf"step 4: {what} (nan|-?inf)", text)
    assert "\n" not in text
    assert f"{tmp_path}/checkpoints/last.ckpt" in text
    assert files_of(tmp_path) == {"0-2.ckpt": 2, "last.ckpt": 2}
    csv = (tmp_path / "csv/version_0/metrics.csv").read_text()
    assert "nan" not in csv
    assert "inf" not in csv


def test_a_run_without_a_checkpoint_says_so(train):
    breaks(1)
    with pytest.raises(NotFinite, match=r"step 1: the loss is nan.*there is none"):
        train()


def test_a_run_that_stopped_goes_on(train, tmp_path):
    breaks(4)
    with pytest.raises(NotFinite):
        train()
    breaks()
    assert math.isfinite(train()["nll"])
    assert files_of(tmp_path)["last.ckpt"] == 6


@pytest.mark.parametrize("only_gradients", [False, True])
@pytest.mark.parametrize("batch_size", [4, 2])
def test_an_update_is_left_out(train, tmp_path, caplog, only_gradients, batch_size):
    """With a warning; what is logged of the others is finite. No checkpoint is written
    of an update that was left out, since the weights may be of no use."""
    breaks(3, 4, only_gradients=only_gradients)
    with caplog.at_level(logging.WARNING):
        results = train("training.nonfinite=skip", f"loader.batch_size={batch_size}")
    assert results["step"] == 6
    assert math.isfinite(results["nll"])
    said = [x.getMessage() for x in caplog.records if "left out" in x.getMessage()]
    assert [x.split(":")[0] for x in said] == ["step 3", "step 4"]
    assert f"(2 in a row of at most {LEFT_OUT})" in said[1]
    assert files_of(tmp_path) == {
        "0-2.ckpt": 2,
        "0-6.ckpt": 6,
        "best.ckpt": 6,
        "last.ckpt": 6,
    }


def test_an_update_that_is_left_out_changes_no_weight(train, tmp_path):
    breaks(5, 6)
    train("training.nonfinite=skip")
    end = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    (moments,) = end["optimizer_states"]
    assert {float(x["step"]) for x in moments["state"].values()} == {4}


def test_training_stops_after_too_many(train, tmp_path):
    breaks(*range(3, 100))
    with pytest.raises(NotFinite, match=f"step {3 + LEFT_OUT}: .*in {LEFT_OUT} before"):
        train("training.nonfinite=skip", "trainer.max_steps=50")
    assert files_of(tmp_path) == {"0-2.ckpt": 2, "last.ckpt": 2}


def test_weights_that_overflow_are_not_written(train, tmp_path):
    """The update itself is of finite gradients."""
    train("trainer.max_steps=2")
    before = files_of(tmp_path)
    with pytest.raises(NotFinite, match=r"not finite|the loss is nan"):
        train(
            "optim.lr=1e38",
            "trainer.max_steps=9",
            "lr_scheduler.num_warmup_steps=1",
            "callbacks.checkpoint_every_n_steps.every_n_train_steps=1",
            "optim.weight_decay=1e5",
        )
    assert files_of(tmp_path) == before


def test_weights_are_looked_at_before_they_are_written(train, tmp_path, monkeypatch):
    step = algo.MDLM.optimizer_step

    def spoil(self, *args, **options):
        step(self, *args, **options)
        if self.global_step == 3:
            next(self.parameters()).data[0] = INF

    monkeypatch.setattr(algo.MDLM, "optimizer_step", spoil)
    with pytest.raises(NotFinite, match=r"weights are not finite|the loss is"):
        train()
    assert files_of(tmp_path) == {"0-2.ckpt": 2, "last.ckpt": 2}


@pytest.fixture
def float16(monkeypatch):
    """Training in float16, which Lightning leaves to GPUs; its scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    monkeypatch.setattr(
        _AcceleratorConnector,
        "_check_and_init_precision",
        lambda self: MixedPrecision("16-mixed", "cpu", scaler),
    )
    monkeypatch.setattr(
        algo.MDLM,
        "make_optimizer",
        lambda self: torch.optim.AdamW(self.parameters(), lr=self.config.optim.lr),
    )
    return scaler


def test_float16_gradients_that_overflow_are_for_the_scaler(
    float16, train, tmp_path, caplog
):
    """They stop nothing, but a loss that is not finite does."""
    breaks(2, 3, only_gradients=True)
    with caplog.at_level(logging.WARNING):
        train()
    assert float16.get_scale() == 2.0**4
    assert "left out" not in caplog.text
    assert files_of(tmp_path)["last.ckpt"] == 6


def test_float16_losses_stop_training(float16, train, tmp_path):
    breaks(4)
    with pytest.raises(NotFinite, match="step 4: the loss is nan"):
        train()
    assert files_of(tmp_path) == {"0-2.ckpt": 2, "last.ckpt": 2}


def test_a_validation_stops_training(train, tmp_path, monkeypatch):
    """Before best.ckpt is written."""

    def validation_step(self, batch, batch_idx):
        self.valid_likelihood.update(torch.full((4,), NAN), torch.full((4,), 8))

    monkeypatch.setattr(algo.MDLM, "validation_step", validation_step)
    with pytest.raises(NotFinite, match="step 3: val/nll is nan"):
        train("trainer.val_check_interval=3")
    assert files_of(tmp_path) == {"0-2.ckpt": 2, "last.ckpt": 2}
    assert "nll" not in train("training.nonfinite=skip")


def test_samples_stop_training(train, tmp_path, monkeypatch):
    monkeypatch.setattr(
        algo.MDLM, "logits_for_loss", lambda self, x: x.new_full((len(x), 8), NAN)
    )
    with pytest.raises(NotFinite, match="step 6: logits of samples are not finite"):
        train("eval.generate_samples=True")
    assert "best.ckpt" not in files_of(tmp_path)
    assert train("eval.generate_samples=True", "training.nonfinite=skip")["step"] == 6


# ---------------------------------------------------------------- what is made of them


@pytest.fixture
def spoiled(train, tmp_path):
    """spoiled(kind): a checkpoint whose weights (raw, EMA) are not finite."""
    train("trainer.max_steps=2")
    path = tmp_path / "checkpoints/last.ckpt"

    def spoil(*kinds: str) -> str:
        content = torch.load(path, weights_only=True)
        if "raw" in kinds:
            content["state_dict"]["backbone.blocks.0.mlp.0.weight"][0, 0] = NAN
        if "EMA" in kinds:
            content["ema"]["shadow_params"][1][0] = INF
        spoiled = tmp_path / "spoiled.ckpt"
        torch.save(content, spoiled)
        return str(spoiled)

    return spoil


@pytest.mark.parametrize("mode", ["ppl_eval", "sample_eval", "export"])
@pytest.mark.parametrize(
    ("kinds", "disables", "is_refused"),
    [
        (("raw", "EMA"), False, True),
        (("EMA",), False, True),
        (("raw",), False, False),
        (("EMA",), True, False),
        (("raw",), True, True),
    ],
)
def test_weights_that_are_used_have_to_be_finite(
    train, tmp_path, spoiled, mode, kinds, disables, is_refused
):
    given = [
        f"eval.checkpoint_path={spoiled(*kinds)}",
        f"eval.disable_ema={disables}",
        f"eval.generated_samples_path={tmp_path}/samples.json",
        f"export.path={tmp_path}/exported",
    ]
    if is_refused:
        refused(lambda: train(*given, mode=mode), "spoiled.ckpt", "diverged", "weights")
        assert not (tmp_path / "exported").exists()
    else:
        train(*given, mode=mode)


def test_training_does_not_begin_with_such_weights(train, spoiled):
    for kinds in ("raw", "EMA"):
        path = spoiled(kinds)
        os.rename("checkpoints", f"before {kinds}")
        refused(
            lambda path=path: train(f"training.finetune_path={path}"),
            f"training.finetune_path='{path}'",
            f"{kinds} weights",
        )
        os.rename(f"before {kinds}", "checkpoints")


def test_a_run_goes_on_from_an_older_file_that_is_finite(train, tmp_path, spoiled):
    """As after a run of an older version that has diverged."""
    os.replace(spoiled("raw", "EMA"), tmp_path / "checkpoints/last.ckpt")
    assert train("trainer.max_steps=4")["step"] == 4


def test_inspect_says_so(spoiled):
    lines = describe(read_checkpoint(spoiled("raw", "EMA"), "x"))
    assert "raw weights: 1 of" in lines["not finite"]
    assert "EMA weights: 1 of" in lines["not finite"]
    assert "not finite" not in describe(read_checkpoint(spoiled(), "x"))


# ---------------------------------------------------------------- what overflows later


@pytest.fixture(params=["ar", "mdlm", "sedd", "d3pm", "duo_base"])
def overflowing(request):
    """A model with finite weights whose logits are not."""
    model = tiny_model(f"algo={request.param}")
    model.backbone.output_embedding.weight.data.fill_(3e38)
    return model


@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("p_nucleus", [1.0, 0.5])
def test_no_samples_of_logits_that_are_not_finite(overflowing, use_float64, p_nucleus):
    sampler = overflowing.sampler
    sampler.use_float64, sampler.p_nucleus = use_float64, p_nucleus
    with pytest.raises(NotFinite, match="logits of the network are not finite"):
        overflowing.generate_samples(2, num_steps=4)


def test_no_scores_either(overflowing, monkeypatch):
    monkeypatch.setattr(
        type(overflowing),
        "nll_given",
        lambda self, x0, known, strata: torch.full(x0.shape, NAN),
    )
    scorer = Scorer(overflowing)
    monkeypatch.setattr(scorer, "encode", lambda text: [2, 3])
    with pytest.raises(NotFinite, match="likelihood of a text is not finite"):
        scorer.score_whole(["a"])


def test_no_numbers_of_a_validation(train, tmp_path, monkeypatch):
    train("trainer.max_steps=2")

    def validation_step(self, batch, batch_idx):
        self.valid_likelihood.update(torch.full((4,), INF), torch.full((4,), 8))

    monkeypatch.setattr(algo.MDLM, "validation_step", validation_step)
    with pytest.raises(NotFinite, match="val/nll is inf"):
        train(f"eval.checkpoint_path={tmp_path}/checkpoints/last.ckpt", mode="ppl_eval")
    assert not (tmp_path / "likelihood.json").exists()


def test_a_distillation_stops(train, tmp_path):
    """The files of its rounds, too, are of finite weights."""
    train("trainer.max_steps=2", "algo=duo_base", target=algo.DUO_BASE)
    teacher = tmp_path / "teacher.ckpt"
    os.rename(tmp_path / "checkpoints/last.ckpt", teacher)
    for path in (tmp_path / "checkpoints").glob("*"):
        path.unlink()
    breaks(4)
    with pytest.raises(NotFinite, match="step 4: the loss is nan"):
        train(
            "algo=distillation",
            "algo.update_teacher_every=2",
            "algo.T=8",
            f"training.finetune_path={teacher}",
            target=BrokenStudent,
        )
    assert files_of(tmp_path) == {
        "0-2.ckpt": 2,
        "last.ckpt": 2,
        "round_0.ckpt": 0,
        "round_1.ckpt": 2,
    }
