"""Distillations by the real command line: two processes and one, an end of their own,
teachers from a Hugging Face folder, and what is refused."""

import csv

import pytest
import torch
from command_line import TINY, logged, run

METHODS = {
    "sdtt": (
        "mdlm",
        (
            "algo=sdtt",
            "algo.grow_dt_every=6",
            "algo.orig_num_sampling_steps=16",
            "algo.min_num_sampling_steps=2",
        ),
    ),
    "dcd": (
        "duo_base",
        ("algo=distillation", "algo.update_teacher_every=6", "algo.T=16"),
    ),
}
CLOSE = {"atol": 1e-5, "rtol": 0}
FEW = ("eval.generate_samples=False", "trainer.num_sanity_val_steps=0")


def parent(folder, algo: str, *overrides: str) -> str:
    """A checkpoint, of five updates if there are no overrides."""
    short = ("trainer.max_steps=5", "trainer.val_check_interval=5")
    own = (*TINY, *FEW, f"algo={algo}", *(overrides or short))
    run(*own, "hydra.run.dir=parent", cwd=folder)
    return f"{folder}/parent/checkpoints/last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(tmp_path, name):
    """Weights, EMA and teacher to 1e-5, and the losses; also with accumulation, where
    each part of a batch has another number of masked tokens."""
    teacher_of, overrides = METHODS[name]
    # A teacher that has learned something: else gradients would be rounding errors, of
    # which AdamW makes steps as large as of any others.
    path = parent(tmp_path, teacher_of, "optim.lr=1e-2", "trainer.max_steps=60")
    own = (*TINY, *FEW, *overrides, f"training.finetune_path={path}")
    runs = {
        "one": (),
        "two": ("trainer.devices=2",),
        "parts": ("trainer.devices=2", "loader.batch_size=2"),
    }
    for folder, more in runs.items():
        run(*own, *more, f"hydra.run.dir={folder}", cwd=tmp_path)
    one = torch.load(tmp_path / "one/checkpoints/last.ckpt", weights_only=True)
    started = torch.load(path, weights_only=True)["state_dict"]
    curve = logged(tmp_path / "one", "train/distillation_loss")
    assert len(curve) == one["global_step"] >= 18
    for folder in ("two", "parts"):
        found = torch.load(tmp_path / folder / "checkpoints/last.ckpt")
        for key, value in one["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][key], value, **CLOSE)
        shadows = (x["ema"]["shadow_params"] for x in (one, found))
        for a, b in zip(*shadows, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
        assert found["teacher"]["round"] == one["teacher"]["round"] > 1
        own_curve = logged(tmp_path / folder, "train/distillation_loss")
        assert own_curve == pytest.approx(curve, rel=1e-4, abs=1e-6)
    moved = max(
        float((x - started[key]).abs().max()) for key, x in one["state_dict"].items()
    )
    assert moved > 1e-3


def test_sdtt_ends_by_itself(tmp_path):
    """After its last round, with a validation and status 0; started again it has
    nothing left to do. NELBO and distillation loss have names of their own."""
    path = parent(tmp_path, "mdlm")
    own = (*TINY, "algo=sdtt", "algo.grow_dt_every=3", f"training.finetune_path={path}")
    own += ("algo.orig_num_sampling_steps=16", "algo.min_num_sampling_steps=4")
    own += ("loader.batch_size=4", "hydra.run.dir=run")
    run(*own, cwd=tmp_path)
    folder = tmp_path / "run"
    before = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert before["global_step"] == 9  # 16, 8 and 4 steps
    assert before["teacher"]["round"] == 2
    names = {x.name for x in (folder / "checkpoints").iterdir()}
    assert names >= {"round_0.ckpt", "round_1.ckpt", "round_2.ckpt", "last.ckpt"}
    assert len(logged(folder, "train/distillation_loss")) == 9
    sizes = logged(folder, "trainer/teacher_step_size")
    first = (1 - 1e-3) / 16
    assert sizes == pytest.approx([first] * 3 + [2 * first] * 3 + [4 * first] * 3)
    with open(folder / "csv/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val/nll"]]
    assert [int(row["step"]) for row in rows] == [8]
    assert float(rows[0]["val/distillation_loss"]) < float(rows[0]["val/nll"])
    done = run(*own, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    after = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert after["global_step"] == 9
    for key, value in before["state_dict"].items():
        assert torch.equal(after["state_dict"][key], value)


def test_a_teacher_from_a_hugging_face_folder(tmp_path):
    """As mode=export writes one; its weights are those of the first round."""
    path = parent(tmp_path, "mdlm")
    export = ("mode=export", "algo=mdlm", f"eval.checkpoint_path={path}")
    run(*TINY, *export, "export.path=folder", "hydra.run.dir=e", cwd=tmp_path)
    own = (*TINY, *FEW, "algo=sdtt", "training.finetune_path=folder")
    own += ("trainer.max_steps=2", "trainer.val_check_interval=2")
    run(*own, "hydra.run.dir=run", cwd=tmp_path)
    teacher = torch.load(tmp_path / "run/checkpoints/round_0.ckpt", weights_only=True)
    shadow = torch.load(path, weights_only=True)["ema"]["shadow_params"]
    found = [teacher["state_dict"][k] for k in teacher["state_dict"] if "inv" not in k]
    assert len(found) == len(shadow)
    for a, b in zip(found, shadow, strict=True):
        assert torch.equal(a, b)


MISTAKES = {
    "no teacher": ((), "training.finetune_path is empty"),
    "another vocabulary": (("data.vocab_size=100",), "cannot be the teacher"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name):
    """One line, status 2."""
    overrides, said = MISTAKES[name]
    own = (*TINY, "algo=sdtt", *overrides, "hydra.run.dir=run")
    if name != "no teacher":
        own += (f"training.finetune_path={parent(tmp_path, 'mdlm')}",)
    done = run(*own, cwd=tmp_path, status=2)
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error:"))
    assert said in line
    assert "Traceback" not in done.stderr
