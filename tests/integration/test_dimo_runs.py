"""Distillation to one step end to end: what is trained and saved, runs that are stopped
or killed, several processes, samples, mistakes."""

import csv
import json
import signal
from pathlib import Path

import lightning
import pytest
import torch
from command_line import TINY, logged, run
from refusals import refused
from resumed import COMPARED, Life, batches, check_end, curves, differences, last
from tiny import compose

import main
from cli.checks import check
from distillation.teacher import Teacher
from utils import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
QUIET = (
    "eval.generate_samples=False",
    "trainer.num_sanity_val_steps=0",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
)
# Five updates an epoch.
SMALL = (
    "data.num_train=40",
    "data.num_valid=8",
    "model.n_blocks=1",
    "model.hidden_size=16",
    "model.dropout=0.1",
    "loader.global_batch_size=8",
    "loader.eval_global_batch_size=8",
    "lr_scheduler.num_warmup_steps=4",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=3",
    *QUIET,
)
OWN = ("algo=dimo", "optim.lr=1e-2", "algo.aux_lr=3e-2", "sampling.predictor=one_step")
EMBEDDING = "vocab_embed.embedding"


def train(folder: Path, monkeypatch, *overrides: str) -> dict:
    """Trains in this process, from where it was; its last checkpoint."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    every = {x.split("=")[0]: x for x in (*SMALL, *overrides)}
    config = compose(*every.values(), f"checkpointing.save_dir={folder}")
    lightning.seed_everything(config.seed, verbose=False)
    main.train(config)
    return last(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A checkpoint of a masked model that has learned something."""
    folder = tmp_path_factory.mktemp("teacher")
    own = ("algo=mdlm", "optim.lr=1e-2", "trainer.max_steps=12", "training.ema=0.5")
    with pytest.MonkeyPatch.context() as patch:
        train(folder, patch, *own)
    return f"{folder}/checkpoints/last.ckpt"


@pytest.fixture
def distil(tmp_path, monkeypatch, teacher):
    """distil(name of a folder, number of updates, *overrides): its last checkpoint."""

    def go(name: str, max_steps: int, *overrides: str) -> dict:
        own = (*OWN, f"training.finetune_path={teacher}")
        own += (f"trainer.max_steps={max_steps}", *overrides)
        return train(tmp_path / name, monkeypatch, *own)

    return go


# ---------------------------------------------------------------- one run


def test_what_is_trained_and_saved(distil, teacher, tmp_path):
    """Updates of the generator are what is counted; the teacher stays as it is."""
    content = distil("run", 7)
    assert content["global_step"] == 7
    folder = tmp_path / "run"
    names = {x.name for x in (folder / "checkpoints").iterdir()}
    assert names == {"0-3.ckpt", "1-6.ckpt", "last.ckpt", "round_0.ckpt"}
    state, start = content["state_dict"], last(folder, "round_0")["state_dict"]
    assert not any("teacher" in name for name in state)
    parent = torch.load(teacher, weights_only=True)
    names = [x for x in parent["state_dict"] if "inv_freq" not in x]
    for name, value in zip(names, parent["ema"]["shadow_params"], strict=True):
        for network in ("backbone", "aux"):  # both begin as the EMA weights
            assert torch.equal(start[name.replace("backbone", network)], value)
    moved = {k for k, x in state.items() if not torch.equal(x, start[k])}
    frozen = (EMBEDDING, "output_layer.linear.weight", "output_layer.linear.bias")
    for network in ("backbone", "aux"):
        assert not any(f"{network}.{name}" in moved for name in frozen)
        assert f"{network}.blocks.0.attn_qkv.weight" in moved
    assert content["teacher"]["round"] == 0
    assert len(content["optimizer_states"]) == 1
    assert content["ema"]["num_updates"] == 7
    with open(folder / "csv/version_0/metrics.csv") as file:
        columns = set(csv.DictReader(file).fieldnames)
    assert columns >= {
        *("train/distillation_loss", "trainer/auxiliary_loss", "trainer/loss"),
        *("val/distillation_loss", "val/auxiliary_loss", "val/aux_nll", "val/aux_ppl"),
        *("trainer/lr/generator", "trainer/lr/auxiliary"),
    }
    assert not columns & {"val/nll", "val/ppl", "train/nll"}
    losses = logged(folder, "train/distillation_loss")
    assert len(losses) == 7
    assert losses[0] < 1e-9 < losses[-1]  # three equal networks
    rates = logged(folder, "trainer/lr/generator")
    assert rates == pytest.approx([1e-2 * min(n / 4, 1) for n in range(7)])
    rates = logged(folder, "trainer/lr/auxiliary")
    assert rates == pytest.approx([3e-2 * min(n / 4, 1) for n in range(7)])


def test_the_teacher_is_bit_identical_all_along(distil, monkeypatch):
    seen = []
    state = Teacher.state
    monkeypatch.setattr(
        Teacher, "state", lambda self: seen.append(weights(self)) or state(self)
    )

    def weights(teacher):
        return {k: x.clone() for k, x in teacher.network.state_dict().items()}

    distil("run", 6)
    assert len(seen) > 1
    assert all(differences(seen[0], x) == [] for x in seen)


# ---------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (1, "uniform"),
        (4, "data"),
        pytest.param(1, "data", marks=pytest.mark.slow),
        pytest.param(4, "uniform", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_bit_by_bit(distil, tmp_path, parts, kind):
    """In the middle of an epoch, and once more after its end."""
    more = (f"loader.batch_size={8 // parts}", f"algo.init_tokens={kind}")
    whole = distil("whole", 9, *more)
    for steps in (3, 6, 9):
        stopped = distil("stopped", steps, *more)
    for name in COMPARED:
        assert differences(whole.get(name), stopped.get(name), name) == []
    one, two = (
        {k: x for k, x in curves(tmp_path / name).items() if k[0].startswith("train")}
        for name in ("whole", "stopped")
    )
    assert one == two
    assert ("train/distillation_loss", 8) in one


def test_parts_of_a_batch_are_one_batch(distil):
    """Four parts of an update make its gradients, to rounding; without dropout."""
    own = ("model.dropout=0", "optim.lr=1e-3", "algo.aux_lr=1e-3")
    one, two = (
        distil(f"parts-{n}", 4, f"loader.batch_size={8 // n}", *own) for n in (1, 4)
    )
    for name, value in one["state_dict"].items():
        other = two["state_dict"][name]
        torch.testing.assert_close(other, value, atol=1e-5, rtol=0)


def test_without_its_teacher_a_run_does_not_go_on(distil, tmp_path, teacher):
    """Nor with another one in its place."""
    distil("run", 3)
    file = tmp_path / "run/checkpoints/round_0.ckpt"
    before = file.read_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match=r"teacher of round 0, .*round_0\.ckpt"):
        distil("run", 6)
    file.write_bytes((tmp_path / "run/checkpoints/last.ckpt").read_bytes())
    with pytest.raises(ConfigError, match="is not the teacher of the run"):
        distil("run", 6)
    file.write_bytes(before)
    assert distil("run", 6)["global_step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_killed_and_stopped_processes_go_on(tmp_path, parts):
    """While it trains, validates and writes; with signals and without."""
    Life.start(tmp_path / "t", "algo=mdlm", "algo._target_=stopper.MDLM").wait()
    own = ("algo=dimo", "algo._target_=stopper.DiMO", f"loader.batch_size={8 // parts}")
    own += (f"training.finetune_path={tmp_path}/t/checkpoints/last.ckpt",)
    own += ("optim.lr=1e-3", "sampling.predictor=one_step")
    whole = Life.start(tmp_path / "whole", *own)
    assert whole.wait() == 0, whole.stderr
    for stop in ("3:train:9", "7:train:15", "10:valid:15", "15:write:9", "20:valid:9"):
        life = Life.start(tmp_path / "run", *own, STOP_AT=stop)
        check_end(life, int(stop.split(":")[2]))
    life = Life.start(tmp_path / "run", *own)
    assert life.wait() == 0, life.stderr
    one, two = (last(tmp_path / name) for name in ("whole", "run"))
    for name in COMPARED:
        assert differences(one.get(name), two.get(name), name) == []
    assert curves(tmp_path / "whole") == curves(tmp_path / "run")
    assert batches(tmp_path / "whole") == batches(tmp_path / "run")
    assert signal.SIGKILL == 9


# ---------------------------------------------------------------- processes, samples


@pytest.fixture
def trained(tmp_path) -> Path:
    """A folder with a teacher of the real command line."""
    own = ("algo=mdlm", "optim.lr=1e-2", "trainer.max_steps=60", *QUIET[:2])
    run(*TINY, *own, "hydra.run.dir=teacher", cwd=tmp_path)
    return tmp_path


FROM = "training.finetune_path=teacher/checkpoints/last.ckpt"


@pytest.mark.slow
def test_two_processes_are_one(trained):
    """Weights and EMA to 1e-5, and the losses: what is drawn for a row depends on its
    place in the batch of an update alone."""
    own = (*TINY, *QUIET[:2], "algo=dimo", FROM, "optim.lr=3e-4", "algo.aux_lr=3e-4")
    runs = {
        "one": (),
        "two": ("trainer.devices=2",),
        "parts": ("trainer.devices=2", "loader.batch_size=2"),
    }
    for folder, more in runs.items():
        run(*own, *more, f"hydra.run.dir={folder}", cwd=trained)
    one = last(trained / "one")
    curve = logged(trained / "one", "train/distillation_loss")
    assert len(curve) == one["global_step"] == 20
    for folder in ("two", "parts"):
        found = last(trained / folder)
        for name in ("state_dict", "ema"):
            torch.testing.assert_close(found[name], one[name], atol=1e-5, rtol=0)
        ours = logged(trained / folder, "train/distillation_loss")
        assert ours == pytest.approx(curve, rel=1e-3, abs=1e-5)
    start = last(trained / "one", "round_0")["state_dict"]
    moved = max(float((x - start[k]).abs().max()) for k, x in one["state_dict"].items())
    assert moved > 1e-3


def test_samples_and_likelihood_of_the_command_line(trained):
    """In one step, refined by the teacher; the bound of the auxiliary model."""
    run(*TINY, *QUIET[:2], "algo=dimo", FROM, "hydra.run.dir=run", cwd=trained)
    own = (*TINY, "algo=dimo", "eval.checkpoint_path=run/checkpoints/last.ckpt")
    own += ("eval.gen_ppl_eval_model_name_or_path=null", "sampling.predictor=one_step")
    refined = ("sampling.refine_steps=4", "sampling.refine_path=run/checkpoints/x.ckpt")
    (trained / "run/checkpoints/x.ckpt").hardlink_to(
        trained / "teacher/checkpoints/last.ckpt"
    )
    for name, more in (("plain", ()), ("refined", refined)):
        run(*own, *more, "mode=sample_eval", f"hydra.run.dir={name}", cwd=trained)
        found = json.loads((trained / name / "samples.json").read_text())
        assert found["checkpoint"]["distilled"]
        assert (
            found["evaluations"] == 1 if name == "plain" else found["evaluations"] > 1
        )
        assert found["entropy"] > 0
    done = run(*own, "mode=ppl_eval", "hydra.run.dir=ppl", cwd=trained)
    assert "val/aux_nll" in done.stdout
    assert "raw weights" in done.stdout
    assert "not comparable" in done.stdout + done.stderr
    export = ("mode=export", "export.path=folder", "hydra.run.dir=export")
    done = run(*own, *export, cwd=trained, status=2)
    assert "generator of one step" in done.stderr


MISTAKES = {
    "no teacher": ((), "training.finetune_path is empty"),
    "rounds": (("algo.aux_rounds=2",), "one step each"),
    "a sampler": ((FROM, "sampling.predictor=analytic"), "one_step"),
    "another size": ((FROM, "model.n_blocks=3"), "does not fit"),
    "another vocabulary": ((FROM, "data.vocab_size=100"), "cannot be the teacher"),
    "a generator": (("training.finetune_path=own.ckpt",), "generator of one step"),
    "score entropy": (("training.finetune_path=sedd.ckpt",), "algo=sedd"),
    "no file": (("training.finetune_path=none.ckpt",), "there is no"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, monkeypatch, teacher, name):
    """One line each."""
    content = torch.load(teacher, weights_only=True)
    (tmp_path / "teacher.ckpt").write_bytes(Path(teacher).read_bytes())
    aux = {k.replace("backbone", "aux"): x for k, x in content["state_dict"].items()}
    own = content | {"state_dict": content["state_dict"] | aux}
    torch.save(own, tmp_path / "own.ckpt")
    content["hyper_parameters"]["config"]["algo"]["name"] = "sedd"
    torch.save(content, tmp_path / "sedd.ckpt")
    overrides, said = MISTAKES[name]
    files = {FROM: f"training.finetune_path={teacher}"}
    overrides = [files.get(x, x).replace("=own", f"={tmp_path}/own") for x in overrides]
    overrides = [x.replace("=sedd.", f"={tmp_path}/sedd.") for x in overrides]
    monkeypatch.chdir(tmp_path)
    every = {x.split("=")[0]: x for x in (*SMALL, *OWN, *overrides)}
    config = compose(*every.values(), f"checkpointing.save_dir={tmp_path}/x")
    refused(lambda: (check(config), main.train(config)), said)
