"""Which checkpoint a run goes on from, and how its state fits a changed config."""

import copy
import csv
import os
from pathlib import Path

import lightning
import pytest
import torch
from refusals import refused
from tiny import compose

import main
from data import packing
from training.resume import (
    KEY,
    adapt,
    checkpoint_files,
    find_checkpoint,
    newest_valid,
    rows_per_batch,
)
from training.row_streams import NOISE_VERSION

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def write(path: Path, step: int, *, age: float = 0, wanted: str = "", **more) -> str:
    """A checkpoint that can be resumed, as far as `find_checkpoint` looks.

    Args:
        path: Of the file.
        step: Its number of updates.
        age: Seconds since it was written.
        wanted: `checkpointing.resume_ckpt_path` of the run that wrote it.
        more: Further entries, or other ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"checkpointing": {"resume_ckpt_path": wanted}}
    content = {
        "state_dict": {"w": torch.ones(3)},
        "optimizer_states": [{}],
        "loops": {"fit_loop": {}},
        "global_step": step,
        "hyper_parameters": {"config": config},
    }
    torch.save(content | more, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return str(path)


def tear(path: Path) -> None:
    when = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-9])
    os.utime(path, (when, when))


@pytest.fixture
def run(tmp_path) -> Path:
    """The checkpoints of a run at steps 6, 4 and 2."""
    folder = tmp_path / "run" / "checkpoints"
    own = f"{folder}/last.ckpt"
    write(folder / "last.ckpt", 6, age=1, wanted=own)
    write(folder / "0-4.ckpt", 4, age=2, wanted=own)
    write(folder / "0-2.ckpt", 2, age=3, wanted=own)
    return folder


def config_of(folder: Path, *overrides: str):
    return compose(f"checkpointing.save_dir={folder}", *overrides)


def lines(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line for line in found)
    return found


# ---------------------------------------------------------------- which file


def test_the_last_one(run, caplog):
    found = find_checkpoint(config_of(run.parent))
    assert (found.path, found.checkpoint.step) == (f"{run}/last.ckpt", 6)
    assert lines(caplog) == []


def test_the_newest_valid_one_in_its_place(run, caplog):
    """By time and not by name; each damaged one is named in a line."""
    tear(run / "last.ckpt")
    os.utime(run / "0-2.ckpt", (1e9, 1e9))
    tear(run / "0-2.ckpt")
    found = find_checkpoint(config_of(run.parent))
    assert found.path == f"{run}/0-4.ckpt"
    parts = ["last.ckpt", "0-2.ckpt", f"going on from {run}/0-4.ckpt (step 4) instead"]
    said = lines(caplog)
    assert len(said) == len(parts)
    assert all(part in line for part, line in zip(parts, said, strict=True))


def test_without_a_last_one(run, caplog):
    """A process was killed between two files."""
    (run / "last.ckpt").unlink()
    assert find_checkpoint(config_of(run.parent)).path == f"{run}/0-4.ckpt"


def test_none_that_is_valid(run):
    for path in run.iterdir():
        tear(path)
    parts = (f"{run}/last.ckpt", "Of 2 files beside it none can be", "save_dir")
    refused(lambda: find_checkpoint(config_of(run.parent)), *parts)


def test_a_new_run(tmp_path, caplog):
    assert find_checkpoint(config_of(tmp_path)) is None
    off = config_of(tmp_path, "checkpointing.resume_from_ckpt=False")
    assert find_checkpoint(off) is None
    assert lines(caplog) == []


@pytest.mark.parametrize("off", ["resume_from_ckpt=False", "resume_ckpt_path=null"])
def test_an_earlier_run_is_not_overwritten(run, off):
    config = config_of(run.parent, f"checkpointing.{off}")
    refused(lambda: find_checkpoint(config), str(run), "would be overwritten")


def test_files_that_are_not_of_a_run_s_course(run, caplog):
    """Half-written ones, teachers, other things."""
    for name in ("last.ckpt.123.partial", "round_0.ckpt", "notes.txt"):
        (run / name).write_text("x")
    assert [Path(x).name for x in checkpoint_files(str(run))] == [
        "last.ckpt",
        "0-4.ckpt",
        "0-2.ckpt",
    ]
    (run / "last.ckpt").unlink()
    (run / "0-4.ckpt").unlink()
    (run / "0-2.ckpt").unlink()
    assert find_checkpoint(config_of(run.parent)) is None
    assert lines(caplog) == []


def test_a_path_that_is_missing(tmp_path, caplog):
    config = config_of(tmp_path, f"{KEY}={tmp_path}/other/none.ckpt")
    assert find_checkpoint(config) is None
    (line,) = lines(caplog)
    assert f"{tmp_path}/other/none.ckpt" in line
    assert "step 0" in line


@pytest.mark.parametrize(("count", "is_said"), [("", 0), ("0", 0), ("2", 1), ("x", 0)])
def test_a_job_that_came_back_to_nothing(tmp_path, caplog, monkeypatch, count, is_said):
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    assert find_checkpoint(config_of(tmp_path)) is None
    said = lines(caplog)
    assert len(said) == is_said
    assert all("hydra.run.dir" in line and str(tmp_path) in line for line in said)


def test_a_path_in_another_folder(run, tmp_path):
    path = f"{run}/0-2.ckpt"
    found = find_checkpoint(config_of(tmp_path / "new", f"{KEY}={path}"))
    assert (found.path, found.checkpoint.step) == (path, 2)


def test_own_files_of_the_same_command_are_used(run, tmp_path):
    """The command that named another folder's file is given once more."""
    path, new = f"{run}/0-2.ckpt", tmp_path / "new"
    own = write(new / "checkpoints/last.ckpt", 9, wanted=path)
    assert find_checkpoint(config_of(new, f"{KEY}={path}")).path == own
    tear(Path(own))
    other = write(new / "checkpoints/0-7.ckpt", 7, wanted=path)
    assert find_checkpoint(config_of(new, f"{KEY}={path}")).path == other


def test_own_files_of_another_run_are_not_overwritten(run, tmp_path):
    new = tmp_path / "new"
    own = write(new / "checkpoints/last.ckpt", 9, wanted=f"{new}/checkpoints/last.ckpt")
    config = config_of(new, f"{KEY}={run}/0-2.ckpt")
    refused(lambda: find_checkpoint(config), KEY, own, "another run")


def test_an_older_file_of_the_run_itself(run):
    """What the user names is what is resumed."""
    path = f"{run}/0-2.ckpt"
    assert find_checkpoint(config_of(run.parent, f"{KEY}={path}")).path == path


def test_the_same_folder_by_another_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    path = "checkpoints/../checkpoints/last.ckpt"
    found = find_checkpoint(config_of(run.parent, f"{KEY}={path}"))
    assert found.checkpoint.step == 6


@pytest.mark.parametrize("name", ["optimizer_states", "loops", "global_step"])
def test_weights_alone_are_refused(tmp_path, name):
    path = write(tmp_path / "other/round_0.ckpt", 3, **{name: None})
    config = config_of(tmp_path / "new", f"{KEY}={path}")
    refused(lambda: find_checkpoint(config), path, name, "training.finetune_path")


def test_a_reason_has_one_line(tmp_path):
    path = tmp_path / "a\nb.ckpt"
    path.write_bytes(b"x")
    refused(lambda: newest_valid([str(path)]), KEY)


# ---------------------------------------------------------------- a changed config

OVERRIDES = (
    "algo=duo_base",
    "data.num_train=96",
    "data.num_valid=4",
    "model.n_blocks=1",
    "model.hidden_size=8",
    "lr_scheduler=cosine_decay_warmup",
    "lr_scheduler.warmup_t=2",
    "lr_scheduler.t_initial=20",
    "trainer.max_steps=5",
    "trainer.val_check_interval=50",
    "trainer.num_sanity_val_steps=0",
    "eval.generate_samples=False",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
)


def merged(*overrides: str) -> list[str]:
    return list({x.split("=")[0]: x for x in (*OVERRIDES, *overrides)}.values())


def go_on(folder: Path, overrides: list[str]) -> None:
    """Trains in a folder, from where it was, if it was."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = compose(*overrides, f"checkpointing.save_dir={folder}")
        lightning.seed_everything(config.seed, verbose=False)
        main.train(config)


def trained(folder: Path, *overrides: str) -> dict:
    go_on(folder, merged(*overrides))
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def five_updates(tmp_path_factory) -> dict:
    return trained(tmp_path_factory.mktemp("five"))


@pytest.fixture
def saved(five_updates) -> dict:
    return copy.deepcopy(five_updates)


def adapted(saved: dict, make_model, *overrides: str) -> dict:
    """For a run that is longer, unless the overrides say how long it is."""
    config = compose(*merged("trainer.max_steps=20", *overrides))
    groups = make_model(*merged(*overrides)).make_optimizer().param_groups
    adapt(saved, config, groups)
    return saved


def test_nothing_changes_where_nothing_has(saved, five_updates, make_model, caplog):
    state = adapted(saved, make_model)
    (optimizer,), (before,) = (
        state["optimizer_states"],
        five_updates["optimizer_states"],
    )
    assert optimizer["param_groups"] == before["param_groups"]
    loops = state["loops"]["fit_loop"]
    position = loops["state_dict"].pop("combined_loader")
    earlier = copy.deepcopy(five_updates["loops"]["fit_loop"])
    assert position == earlier["state_dict"].pop("combined_loader")
    assert position == [{"epoch": 0, "rows": 5 * 4}]
    assert loops == earlier
    assert lines(caplog) == []


def test_a_finished_run_goes_on_with_the_validation_at_its_end(saved, make_model):
    state = adapted(saved, make_model, "trainer.max_steps=5")
    loop = state["loops"]["fit_loop"]
    assert loop["epoch_loop.val_loop.batch_progress"]["current"]["started"] == 1
    assert loop["epoch_loop.batch_progress"]["current"]["completed"] == 5


def test_the_learning_rate_of_the_config_holds(saved, make_model, caplog):
    before = saved["optimizer_states"][0]["param_groups"][0]["lr"]
    state = adapted(saved, make_model, "optim.lr=6e-4")
    group = state["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 6e-4
    assert group["lr"] == pytest.approx(2 * before)  # twice the default's 3e-4
    assert state["lr_schedulers"][0]["base_lrs"] == [6e-4]
    assert "optim.lr=0.0006 holds" in lines(caplog)[0]


def test_settings_of_adamw_hold(saved, make_model):
    more = ("optim.beta1=0.8", "optim.beta2=0.95", "optim.eps=1e-6")
    state = adapted(saved, make_model, *more, "optim.weight_decay=0.1")
    group = state["optimizer_states"][0]["param_groups"][0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    assert group["weight_decay"] == 0.1


def rates(folder: Path) -> list[float]:
    """Learning rates of all updates, over all lives."""
    found = {}
    for path in folder.glob("csv/version_*/metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            if row.get("trainer/lr"):
                found[int(row["step"])] = float(row["trainer/lr"])
    return [found[step] for step in sorted(found)]


@pytest.mark.parametrize(
    "change",
    [
        "lr_scheduler.t_initial=9",
        "lr_scheduler.lr_min=1e-4",
        "optim.lr=1e-3",
    ],
)
def test_the_schedule_of_the_config_holds(tmp_path, change):
    """From the next update but one on: as if it had been so from the start."""
    every = "trainer.log_every_n_steps=1"
    trained(tmp_path / "changed", every)
    trained(tmp_path / "changed", every, change, "trainer.max_steps=10")
    trained(tmp_path / "always", every, change, "trainer.max_steps=10")
    changed, always = rates(tmp_path / "changed"), rates(tmp_path / "always")
    assert len(changed) == len(always) == 10
    assert changed[6:] == pytest.approx(always[6:])
    assert changed[:5] != pytest.approx(always[:5])


def test_another_schedule_than_the_file_s_holds(tmp_path):
    go_on(tmp_path, [*OVERRIDES])
    rest = [x for x in OVERRIDES if "_t=" not in x and "t_initial" not in x]
    rest[rest.index("lr_scheduler=cosine_decay_warmup")] = (
        "lr_scheduler=constant_warmup"
    )
    rest[rest.index("trainer.max_steps=5")] = "trainer.max_steps=10"
    go_on(tmp_path, [*rest, "lr_scheduler.num_warmup_steps=2"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_other_micro_batches_see_the_same_rows(tmp_path, monkeypatch, batch_size):
    """And as many updates, also where the change is in the middle of an epoch."""
    fetch, rows = packing.TokenRows.__getitems__, []

    def noted(self, indices):
        if len(self) == 96:  # the training rows
            rows.extend(indices)
        return fetch(self, indices)

    monkeypatch.setattr(packing.TokenRows, "__getitems__", noted)
    trained(tmp_path / "same", "trainer.max_steps=30")
    expected = rows[:120]
    rows.clear()
    trained(tmp_path / "changed", "trainer.max_steps=10")
    layout = (f"loader.batch_size={batch_size}", "trainer.max_steps=30")
    state = trained(tmp_path / "changed", *layout)
    assert state["global_step"] == 30
    assert rows == expected


def test_positions_are_in_batches_of_the_run(saved, make_model, caplog):
    """Five batches of four rows are ten of two; the last was saved unfinished."""
    adapted(saved, make_model, "loader.batch_size=2")
    loop = saved["loops"]["fit_loop"]
    counts = loop["epoch_loop.batch_progress"]["current"]
    assert (counts["ready"], counts["processed"], counts["completed"]) == (10, 10, 9)
    assert loop["state_dict"]["combined_loader"] == [{"epoch": 0, "rows": 20}]
    assert lines(caplog) == ["batches of 2 rows hold, 4 of the checkpoint do not"]


def test_noise_of_an_older_version_is_told(tmp_path, five_updates, caplog):
    """The run goes on with that of today, and its next checkpoint says so."""
    older = copy.deepcopy(five_updates)
    assert older["training"].pop("noise") == NOISE_VERSION
    (tmp_path / "checkpoints").mkdir()
    torch.save(older, tmp_path / "checkpoints/last.ckpt")
    after = trained(tmp_path, "trainer.max_steps=6")
    assert after["global_step"] == 6
    assert after["training"]["noise"] == NOISE_VERSION
    said = [line for line in lines(caplog) if "noise of version" in line]
    (line,) = said
    assert f"1 and goes on with that of version {NOISE_VERSION}" in line


def test_rows_per_batch():
    loader, trainer = {"batch_size": 3}, {"devices": 2, "num_nodes": 4}
    assert rows_per_batch(loader, trainer) == 24
