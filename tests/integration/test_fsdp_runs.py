"""Two processes that hold half of the weights each (`strategy=fsdp`) train as two that
hold all of them: the same files, half of the bytes, exact resumption.
"""

import json
import signal
from itertools import chain
from pathlib import Path

import pytest
import torch
from image_files import images_of, labels_of, write_both
from resumed import COMPARED, Life, differences, end_of_two, last, train_here

TWO = (
    "trainer.devices=2",
    "loader.batch_size=2",
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=100",
)
FSDP = (*TWO, "strategy=fsdp")
MDLM = ("algo=mdlm", "algo._target_=stopper.MDLM", "model.dropout=0")


def trained(folder: Path, *overrides: str) -> Path:
    """The folder of a run of two processes."""
    end_of_two(Life.start_two(folder, *overrides), 0)
    return folder


def flat(content, name: str = "") -> dict:
    """All that a checkpoint holds, by dotted names, in its order."""
    pairs = enumerate(content) if isinstance(content, (list, tuple)) else None
    pairs = content.items() if isinstance(content, dict) else pairs
    if pairs is None:
        return {name: content}
    return dict(chain.from_iterable(flat(x, f"{name}.{k}").items() for k, x in pairs))


def check_alike(one: Path, two: Path, atol: float = 1e-6, file: str = "last") -> None:
    """Checkpoints of two runs have the same entries, and values but for rounding."""
    names = [x for x in COMPARED if x != "teacher"]
    one, two = (
        {k: x for k, x in flat(last(folder, file)).items() if k.split(".")[1] in names}
        for folder in (one, two)
    )
    assert list(one) == list(two)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            says = f"{name}: {{}}".format
            torch.testing.assert_close(two[name], value, atol=atol, rtol=0, msg=says)
        else:
            assert two[name] == pytest.approx(value), name


def moved(one: Path, two: Path) -> float:
    """How far the networks of two runs lie from each other."""
    a, b = (last(folder)["state_dict"] for folder in (one, two))
    names = [name for name in a if name.startswith("backbone.")]
    return max(float((a[name] - b[name]).abs().max()) for name in names)


def test_two_halves_train_as_two_wholes_and_go_on(tmp_path):
    """With accumulation, clipping that bites, EMA, validation on it and samples.

    The file is that of two processes that hold all. What was stopped by a signal to one
    process goes on to the same bits.
    """
    own = (*MDLM, "algo._target_=stopper.Counted", "training.ema=0.9")
    own += ("trainer.gradient_clip_val=0.01",)
    ddp = trained(tmp_path / "ddp", *own, *TWO)
    fsdp = trained(tmp_path / "fsdp", *own, *FSDP)
    for file in ("last", "best"):
        check_alike(ddp, fsdp, file=file)
    whole, *halves = (
        json.loads((folder / f"bytes{rank}.json").read_text())
        for folder, rank in ((ddp, 0), (fsdp, 0), (fsdp, 1))
    )
    for name, size in whole.items():
        parts = [half[name] for half in halves]
        assert sum(parts) == size
        assert max(parts) < 0.52 * size  # rows of odd tables do not divide
    lives = Life.start_two(
        tmp_path / "stopped", *own, *FSDP, STOP_AT="3:train:15", STOP_RANK="1"
    )
    end_of_two(lives, 128 + signal.SIGTERM)
    assert last(tmp_path / "stopped")["global_step"] == 4
    trained(tmp_path / "stopped", *own, *FSDP)
    one, two = last(fsdp), last(tmp_path / "stopped")
    assert [d for k in COMPARED for d in differences(one.get(k), two.get(k), k)] == []


# ---------------------------------------------------------------- everything else

WAYS = {
    "ar": ("algo=ar", "algo._target_=stopper.AR"),
    "sedd": ("algo=sedd", "algo._target_=algo.SEDDAbsorb"),
    "d3pm": ("algo=d3pm", "algo._target_=algo.D3PMAbsorb"),
    "duo": ("algo=duo", "algo._target_=stopper.Duo"),
    "dimamba": (
        *(*MDLM, "algo.backbone=dimamba", "model=tiny-dimamba", "model.n_blocks=1"),
        *("model.hidden_size=16", "model.cond_dim=8", "model.length=16"),
    ),
    "value": (*MDLM, "+trainer.gradient_clip_algorithm=value"),
    "checkpointing": (*MDLM, "training.activation_checkpointing=True"),
    "compile": (*MDLM, "training.compile=True"),
    "bf16": (*MDLM, "trainer.precision=bf16-mixed"),
    "loss in one": (*MDLM, "training.loss_chunk=null"),
    "kept": (*MDLM, "strategy.reshard_after_forward=False"),
    "blocks": (*MDLM, "algo.block_size=4", "eval.generate_samples=False"),
    "one block": (*MDLM, "algo.block_size=16", "eval.generate_samples=False"),
    "padded": (*MDLM, "data.wrap=False"),
}
ROUNDED = {"bf16": 1e-3, "compile": 1e-5}  # the sum of a bfloat16 gradient is wider


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_ways_to_train(tmp_path, name):
    own = (*WAYS[name], "trainer.gradient_clip_val=0.01", "model.dropout=0")
    ways = [x for x in own if not x.startswith("strategy.")]
    ddp = trained(tmp_path / "ddp", *ways, *TWO)
    fsdp = trained(tmp_path / "fsdp", *FSDP, *own)
    check_alike(ddp, fsdp, ROUNDED.get(name, 1e-6))


STUDENTS = {
    "distillation": ("algo.T=16", "algo.update_teacher_every=3"),
    "sdtt": ("algo.grow_dt_every=3", "algo.orig_num_sampling_steps=16"),
    "dimo": ("algo.aux_lr=1e-2",),
    "dimo twice": ("algo.reuse_student_batch=False", "algo.freeze_embeddings=True"),
}
CLASSES = {"distillation": "Distilled", "sdtt": "SDTT", "dimo": "DiMO"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_students_and_their_teachers(tmp_path, name):
    """All of their networks are split; a run that was stopped in a round goes on."""
    algo = name.split()[0]
    parent = DUO_BASE if algo == "distillation" else MDLM
    train_here(tmp_path / "parent", *parent, "trainer.max_steps=12", "optim.lr=1e-2")
    start = tmp_path / "parent/checkpoints/last.ckpt"
    own = (f"algo={algo}", f"algo._target_=stopper.{CLASSES[algo]}", *STUDENTS[name])
    own += (f"training.finetune_path={start}", "optim.lr=1e-2", "model.dropout=0")
    own += ("optim.eps=1e-4",)  # gradients of rounding alone move nothing
    own += ("trainer.max_steps=10", "trainer.val_check_interval=5")
    ddp = trained(tmp_path / "ddp", *TWO, *own)
    fsdp = trained(tmp_path / "fsdp", *FSDP, *own)
    assert moved(tmp_path / "parent", fsdp) > 1e-4
    check_alike(ddp, fsdp, 5e-6)
    place = {"STOP_AT": "5:train:15", "STOP_RANK": "1"}
    lives = Life.start_two(tmp_path / "stopped", *FSDP, *own, **place)
    end_of_two(lives, 128 + signal.SIGTERM)
    trained(tmp_path / "stopped", *FSDP, *own)
    one, two = last(fsdp), last(tmp_path / "stopped")
    assert [d for k in COMPARED for d in differences(one.get(k), two.get(k), k)] == []


DUO_BASE = ("algo=duo_base", "algo._target_=stopper.DuoBase", "model.dropout=0")


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path, monkeypatch):
    """From two halves to one whole, by the data that both see, and back."""
    same = ("algo=ar", "algo._target_=stopper.AR", "model.dropout=0")
    one = ("trainer.max_steps=8", "trainer.val_check_interval=4")
    train_here(tmp_path / "one", *same, *one)
    trained(tmp_path / "run", *same, *FSDP, "trainer.max_steps=3")
    train_here(tmp_path / "run", *same, *one, "trainer.max_steps=6")
    trained(tmp_path / "run", *same, *FSDP)
    whole, several = last(tmp_path / "one"), last(tmp_path / "run")
    assert several["global_step"] == 8
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(several["state_dict"][name], value)


@pytest.mark.slow
def test_a_unet(tmp_path):
    sets = [(images_of(n, seed=n), labels_of(n)) for n in (72, 32)]
    source = write_both("npz", tmp_path / "set", *sets)
    own = ("algo=duo_base", "algo._target_=stopper.DuoBase", "algo.backbone=unet")
    own += ("model=unet", "model.ch=4", "model.num_scales=2", "model.ch_mult=[1,2]")
    own += ("model.num_res_blocks=1", "model.dropout=0", "data=images", "data.size=16")
    own += ("data.num_classes=3", "training.class_dropout_p=0.5")
    own += (f"data.source={source}", f"data.cache_dir={tmp_path}/cache")
    ddp = trained(tmp_path / "ddp", *own, *TWO)
    fsdp = trained(tmp_path / "fsdp", *own, *FSDP)
    check_alike(ddp, fsdp, 1e-5)
