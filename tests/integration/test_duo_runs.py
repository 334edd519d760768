"""DUO and its distillation end to end: the published commands at tiny size, two-stage
training, rounds of a teacher, resuming."""

import csv
import os
from pathlib import Path

import pytest
import torch
from command_line import logged, run
from tiny import compose

import main
from cli.commandline import arguments
from distillation import Distillation
from utils import ConfigError

# Overrides of the published scripts, but for the paths.
LM1B = (
    "loader.batch_size=64 loader.eval_batch_size=64 wandb.name=duo-lm1b model=small "
    "algo=duo model.length=128 algo.curriculum.mode=simple "
    "algo.curriculum.gumbel_tau_log10_start=-3.0 "
    "algo.curriculum.gumbel_tau_log10_end=-3.0 algo.curriculum.gamma_min=-3.5 "
    "algo.curriculum.gamma_max=-1.75 algo.curriculum.start=0 "
    "algo.curriculum.end=500000"
)
EVAL = "mode=ppl_eval model=small algo=duo_base +wandb.offline=true"
PUBLISHED = {
    "train_lm1b_duo": f"{LM1B} data=lm1b",
    "train_lm1b_duo_sentencepacking": f"{LM1B} data=lm1b-wrap",
    "train_owt_duo": (
        "loader.batch_size=32 loader.eval_batch_size=32 data=openwebtext-split "
        "wandb.name=duo-owt model=small algo=duo model.length=1024 "
        "algo.curriculum.mode=simple algo.curriculum.gumbel_tau_log10_start=-3.0 "
        "algo.curriculum.gumbel_tau_log10_end=-3.0 algo.curriculum.gamma_min=-3.55 "
        "algo.curriculum.gamma_max=-1.85 algo.curriculum.start=0 "
        "algo.curriculum.end=500000"
    ),
    "train_owt_duo_finetune": (
        "loader.batch_size=64 loader.eval_batch_size=64 data=openwebtext-split "
        "wandb.name=duo-owt-finetune model=small algo=duo_base model.length=1024 "
        "training.finetune_path=parent.ckpt sampling.num_sample_batches=0 "
        "trainer.max_steps=500000"
    ),
    "distil_owt": (
        "mode=train loader.batch_size=2 loader.eval_batch_size=2 "
        "data=openwebtext-split model=small algo=distillation "
        "training.finetune_path=parent.ckpt sampling.num_sample_batches=10 "
        "sampling.steps=32 eval.compute_generative_perplexity=True algo.T=512 "
        "lr_scheduler.num_warmup_steps=500 trainer.val_check_interval=1000 "
        "trainer.max_steps=50000 loader.global_batch_size=128 training.ema=0.999 "
        "algo.update_teacher_every=10000 optim.lr=6e-5 trainer.limit_val_batches=8 "
        "algo.teacher_ema=False algo.linear_growth_dt=false +wandb.offline=true"
    ),
    "eval_lm1b_duo": (
        f"{EVAL} loader.batch_size=64 loader.eval_batch_size=64 data=lm1b-wrap "
        "model.length=128 eval.checkpoint_path=parent.ckpt "
        "sampling.num_sample_batches=0"
    ),
    "eval_owt_duo": (
        f"{EVAL} loader.batch_size=8 loader.eval_batch_size=8 data=openwebtext-split "
        "eval.checkpoint_path=parent.ckpt sampling.num_sample_batches=0"
    ),
    "zero_shot_duo": (
        f"{EVAL} loader.batch_size=16 loader.eval_batch_size=16 data=ptb "
        "loader.eval_global_batch_size=128 data.insert_valid_eos=False "
        "model.length=1024 eval.checkpoint_path=parent.ckpt "
        "sampling.num_sample_batches=0"
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
SMALL = (
    "data=synthetic",
    "data.num_train=64",
    "data.num_valid=16",
    "model.length=32",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.hidden_size=16",
    "model.cond_dim=8",
    "model.dropout=0",
    "loader.batch_size=4",
    "loader.global_batch_size=8",
    "loader.eval_batch_size=4",
    "optim.lr=1e-2",
    "lr_scheduler.num_warmup_steps=1",
    "sampling.steps=2",
    "sampling.num_sample_batches=1",
    "eval.compute_generative_perplexity=False",
    "trainer.accelerator=cpu",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.num_sanity_val_steps=0",
    "wandb.name=null",
)


def key_of(override: str) -> str:
    return override.split("=")[0].lstrip("+")


def merged(*overrides: str) -> list[str]:
    """Later ones replace earlier ones; Hydra takes each key once."""
    return list({key_of(override): override for override in overrides}.values())


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs a config in this process, in a folder: start(*overrides, folder=...)."""

    def go(*overrides: str, folder: str | Path = ".") -> dict[str, float]:
        place = tmp_path / folder
        place.mkdir(exist_ok=True, parents=True)
        monkeypatch.chdir(place)
        save = f"checkpointing.save_dir={place}"
        config = compose(*merged(*overrides, save), tiny=False)
        return main.MODES[config.mode](config)

    return go


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A checkpoint of three steps of algo=duo."""
    folder = tmp_path_factory.mktemp("parent")
    before = Path.cwd()
    os.chdir(folder)
    try:
        save = f"checkpointing.save_dir={folder}"
        overrides = merged("algo=duo", "model=small", *SMALL, save)
        main.train(compose(*overrides, tiny=False))
    finally:
        os.chdir(before)
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_runs(name, start, parent):
    words = PUBLISHED[name].split()
    compose(*words, tiny=False)  # as it is
    words = [word.replace("=parent.ckpt", f"={parent}") for word in words]
    results = start(*words, *SMALL)
    assert results["nll"] > 0


@pytest.mark.parametrize(
    "mode", ["efficient_cached", "series", "poly3", "poly9", "sigmoid-edge-corrected"]
)
def test_every_mode_trains_through_the_end_of_the_curriculum(mode, start, tmp_path):
    start(
        "algo=duo",
        "model=tiny",
        *SMALL,
        f"algo.curriculum.mode={mode}",
        "algo.curriculum.start=0",
        "algo.curriculum.end=2",
    )
    assert logged(tmp_path, "trainer/log10_tau") == [-1, -1.5, -10]


def test_older_flat_keys_are_read(start, tmp_path):
    flat = ("algo.curriculum_start=1", "algo.curriculum_end=2")
    taus = ("algo.gumbel_tau_log10_start=-2", "algo.gumbel_tau_log10_end=-3")
    start(*arguments(["algo=duo", "model=tiny", *SMALL, *flat, *taus]))
    assert logged(tmp_path, "trainer/log10_tau") == [-2, -2, -10]


DISTIL = (
    "algo=distillation",
    "model=tiny",
    *SMALL,
    "data.num_train=80",  # ten steps of an epoch
    "algo.update_teacher_every=4",
    "algo.T=16",
    "trainer.val_check_interval=10",
)


@pytest.mark.parametrize("teacher_ema", [False, True])
def test_a_resumed_distillation_has_its_teacher(start, parent, tmp_path, teacher_ema):
    """Stopped within round 2, it goes on with the teacher of a run that was not."""
    more = (f"training.finetune_path={parent}", f"algo.teacher_ema={teacher_ema}")
    start(*DISTIL, *more, "trainer.max_steps=11", folder="whole")
    start(*DISTIL, *more, "trainer.max_steps=10", folder="stopped")
    os.utime(tmp_path / "stopped/checkpoints/round_2.ckpt", (0, 0))
    start(*DISTIL, *more, "trainer.max_steps=11", folder="stopped")
    one, two = (tmp_path / name / "checkpoints" for name in ("whole", "stopped"))
    states = [read(folder / "last.ckpt") for folder in (one, two)]
    assert states[0]["teacher"] == states[1]["teacher"]
    assert states[0]["teacher"]["round"] == 2
    assert (two / "round_2.ckpt").stat().st_mtime == 0  # read, not made anew
    assert not any("teacher" in name for name in states[0]["state_dict"])


def test_each_round_is_a_checkpoint(start, parent, tmp_path):
    """The parent, then the student at the start of each round."""
    start(*DISTIL, f"training.finetune_path={parent}", "trainer.max_steps=9")
    name = "backbone.vocab_embed.embedding"
    rounds = [read(tmp_path / f"checkpoints/round_{n}.ckpt") for n in range(3)]
    assert [state["global_step"] for state in rounds] == [0, 4, 8]
    first, second, third = (state["state_dict"][name] for state in rounds)
    assert torch.equal(first, read(parent)["state_dict"][name])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    path = tmp_path / "checkpoints" / "round_1.ckpt"
    both = ("mode=ppl_eval", f"eval.checkpoint_path={path}")
    assert start("algo=duo_base", "model=tiny", *SMALL, *both)["nll"] > 0


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_without_its_teacher_a_run_does_not_go_on(start, parent, tmp_path):
    more = f"training.finetune_path={parent}"
    start(*DISTIL, more, "trainer.max_steps=10")
    file = tmp_path / "checkpoints" / "round_2.ckpt"
    other = file.read_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match=r"teacher of round 2, .*round_2\.ckpt"):
        start(*DISTIL, more, "trainer.max_steps=14")
    (tmp_path / "checkpoints" / "round_1.ckpt").rename(file)
    with pytest.raises(ConfigError, match="is not the teacher of the run"):
        start(*DISTIL, more, "trainer.max_steps=14")
    file.write_bytes(other)
    start(*DISTIL, more, "trainer.max_steps=14")


def test_gradient_accumulation_takes_one_teacher_a_round(start, parent, monkeypatch):
    taken = []
    renew_teacher = Distillation.renew_teacher

    def watched(self, number):
        taken.append((self.global_step, number))
        return renew_teacher(self, number)

    monkeypatch.setattr(Distillation, "renew_teacher", watched)
    start(
        *DISTIL,
        f"training.finetune_path={parent}",
        "loader.batch_size=2",
        "trainer.max_steps=9",
        "trainer.val_check_interval=2",
    )
    assert taken == [(0, 0), (4, 1), (8, 2)]


def test_logs_of_a_distillation(start, parent, tmp_path):
    """The loss has its own name; nll is that of the bound, in validation alone."""
    start(*DISTIL, f"training.finetune_path={parent}", "trainer.max_steps=10")
    with open(tmp_path / "csv/version_0/metrics.csv") as file:
        columns = csv.DictReader(file).fieldnames
    assert "val/nll" in columns
    assert not any(name.startswith(("train/nll", "train/ppl")) for name in columns)
    losses = logged(tmp_path, "train/distillation_loss")
    losses += logged(tmp_path, "val/distillation_loss")
    assert len(losses) > 10
    assert all(0 < loss < 1 for loss in losses)
    gaps = logged(tmp_path, "trainer/time_gap")
    assert gaps == pytest.approx([1 / 16] * 4 + [2 / 16] * 4 + [4 / 16] * 2)


@pytest.mark.slow
def test_two_processes_distil(tmp_path, parent):
    """DDP, through the real command line: both ranks have the same teacher."""
    overrides = merged(
        *DISTIL,
        f"training.finetune_path={parent}",
        "trainer.devices=2",
        "trainer.max_steps=6",
        "eval.generate_samples=False",
        "hydra.run.dir=two",
    )
    run(*(x for x in overrides if x != "wandb.name=null"), cwd=tmp_path)
    state = torch.load(tmp_path / "two/checkpoints/last.ckpt", weights_only=True)
    assert state["teacher"]["round"] == 1


def test_a_distillation_of_nothing_is_refused(tmp_path):
    done = run("algo=distillation", "data=synthetic", cwd=tmp_path, status=2)
    assert done.stderr.count("\n") == 1
    assert "training.finetune_path" in done.stderr
