"""Checkpoints are written whole or not at all, few are kept, signals end a run."""

import errno
import os
import signal
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import fsspec
import lightning
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from tiny import compose

import main
from checkpoints.checkpoint import Checkpoint
from training import callbacks
from training.callbacks import (
    CheckpointEveryNSteps,
    CheckpointFiles,
    RunEnd,
    requeue,
    write_or_stop,
)
from training.resume import Resumed
from training.trainer import stopping_together
from utils import STOP_SIGNALS, RunStopped, SignalReceived, copy_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def content(step: int) -> dict:
    return {"state_dict": {"w": torch.full((9999,), step)}, "global_step": step}


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


# ---------------------------------------------------------------- whole or not at all


class FullDisk:
    """A file that takes so many bytes."""

    def __init__(self, file, space: int) -> None:
        self.file, self.space = file, space

    def write(self, data) -> int:
        self.space -= len(data)
        if self.space < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.fixture
def fill(monkeypatch):
    """Has checkpoints of this machine's disk take so many bytes: fill(space)."""
    whole = LocalFileSystem.open

    def fill(space: int) -> None:
        def limited(self, path, mode="rb", **options):
            file = whole(self, path, mode, **options)
            is_new = "w" in mode and ".ckpt" in str(path)
            return FullDisk(file, space) if is_new else file

        monkeypatch.setattr(LocalFileSystem, "open", limited)

    return fill


@pytest.mark.parametrize("space", [0, 100, 30_000])
def test_a_full_disk(tmp_path, fill, space):
    """One line; what was there is there; nothing is half-written."""
    files, path = CheckpointFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint(content(1), path)
    fill(space)
    with pytest.raises(RunStopped) as error:
        files.save_checkpoint(content(2), path)
    text = str(error.value)
    assert error.value.status == 1
    assert "\n" not in text
    assert f"{path} cannot be written" in text
    assert "No space left on device" in text
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert step_of(path) == 1


def test_a_disk_that_is_full_at_the_end_of_the_file(tmp_path, monkeypatch):
    """As file systems say that have promised the space."""

    def fails(number):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint(content(1), path)
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(RunStopped, match="quota"):
        CheckpointFiles().save_checkpoint(content(2), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert step_of(path) == 1


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a loss of power leaves a name without content."""
    events = []
    fsync, move = os.fsync, LocalFileSystem.mv

    def synced(number):
        events.append("sync")
        fsync(number)

    def moved(self, *args, **options):
        events.append("name")
        move(self, *args, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(LocalFileSystem, "mv", moved)
    CheckpointFiles().save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert events == ["sync", "name"]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStopped, match=r"file/last\.ckpt cannot be written"):
        CheckpointFiles().save_checkpoint(content(1), tmp_path / "file" / "last.ckpt")


def test_faults_of_the_code_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"), write_or_stop("a.ckpt"):
        raise RuntimeError("a fault")
    with pytest.raises(KeyError), write_or_stop("a.ckpt"):
        raise KeyError("x")


def test_an_interrupted_write(tmp_path, monkeypatch):
    """By Ctrl-C, which is no error of the disk."""

    def save(checkpoint, file):
        file.write(b"PK")
        raise SignalReceived(signal.SIGINT)

    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint(content(1), path)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SignalReceived):
        CheckpointFiles().save_checkpoint(content(2), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_copies_are_whole_or_not_at_all(tmp_path, fill):
    CheckpointFiles().save_checkpoint(content(1), tmp_path / "last.ckpt")
    CheckpointFiles().save_checkpoint(content(2), tmp_path / "0-2.ckpt")
    fill(100)
    with pytest.raises(OSError, match="No space"):
        copy_file(str(tmp_path / "0-2.ckpt"), str(tmp_path / "last.ckpt"))
    assert sorted(os.listdir(tmp_path)) == ["0-2.ckpt", "last.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == 1


def test_what_has_been_read_is_not_read_again(tmp_path):
    """And not kept, once Lightning has it."""
    path = tmp_path / "a.ckpt"
    CheckpointFiles().save_checkpoint(content(1), path)
    given = content(7)
    read = Checkpoint.of_lightning(given)
    files = CheckpointFiles(Resumed(str(path), read))
    assert files.load_checkpoint(path) is given
    assert files.load_checkpoint(path)["global_step"] == 1
    files = CheckpointFiles(Resumed("other.ckpt", read))
    assert files.load_checkpoint(path)["global_step"] == 1


def test_removing(tmp_path):
    for path in (f"{tmp_path}/a.ckpt", "memory://saving/a.ckpt"):
        files = CheckpointFiles()
        files.save_checkpoint(content(1), path)
        files.remove_checkpoint(path)
        files.remove_checkpoint(path)
        filesystem, inner = fsspec.core.url_to_fs(path)
        assert not filesystem.exists(inner)


# ---------------------------------------------------------------- how many are kept


class Steps:
    """A trainer that only counts and writes."""

    is_global_zero = True
    loggers = ()
    current_epoch = 0
    should_stop = False
    state = SimpleNamespace(fn="fit")
    strategy = SimpleNamespace(  # of one process
        remove_checkpoint=CheckpointFiles().remove_checkpoint,
        barrier=lambda name: None,
        broadcast=lambda value: value,
    )

    def __init__(self, start: int = 0) -> None:
        self.global_step = start

    def save_checkpoint(self, path: str, weights_only: bool) -> None:
        CheckpointFiles().save_checkpoint(content(self.global_step), path)

    def train(self, callback: CheckpointEveryNSteps, until: int) -> None:
        callback.on_train_start(self)
        while self.global_step < until:
            callback.on_train_batch_end(self, self)  # an update of two micro-batches
            self.global_step += 1
            callback.on_train_batch_end(self, self)

    def is_in_doubt(self) -> bool:  # as a model
        return False


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(2, [8, 10]), (1, [10]), (3, [6, 8, 10]), (-1, [2, 4, 6, 8, 10]), (0, [])],
)
def test_the_newest_are_kept(tmp_path, keep, expected):
    Steps().train(CheckpointEveryNSteps(str(tmp_path), 2, keep), 11)
    names = {f"0-{step}.ckpt" for step in expected}
    assert set(os.listdir(tmp_path)) == names | {"last.ckpt"}
    assert step_of(tmp_path / "last.ckpt") == 10
    assert all(step_of(tmp_path / f"0-{step}.ckpt") == step for step in expected)


def test_defaults(tmp_path, compose):
    config = compose("callbacks=checkpoint_every_n_steps")
    callback = CheckpointEveryNSteps(str(tmp_path), 1)
    assert config.callbacks.checkpoint_every_n_steps.save_top_k == 2
    Steps().train(callback, 5)
    assert sorted(os.listdir(tmp_path)) == ["0-4.ckpt", "0-5.ckpt", "last.ckpt"]


def test_no_last_and_none_at_all(tmp_path):
    Steps().train(CheckpointEveryNSteps(f"{tmp_path}/a", 2, save_last=False), 4)
    assert sorted(os.listdir(tmp_path / "a")) == ["0-2.ckpt", "0-4.ckpt"]
    Steps().train(CheckpointEveryNSteps(f"{tmp_path}/b", 0), 4)
    assert not (tmp_path / "b").exists()


def test_names_that_say_what_they_are(tmp_path):
    named = CheckpointEveryNSteps(str(tmp_path), 2, auto_insert_metric_name=True)
    Steps().train(named, 2)
    assert sorted(os.listdir(tmp_path)) == ["epoch=0-step=2.ckpt", "last.ckpt"]


def test_a_resumed_run_keeps_the_bound(tmp_path):
    """Also where it writes some files for the second time."""
    first = CheckpointEveryNSteps(str(tmp_path), 2)
    Steps().train(first, 6)
    state = first.state_dict()
    Steps(6).train(first, 10)
    second = CheckpointEveryNSteps(str(tmp_path), 2)
    second.load_state_dict(state)
    Steps(6).train(second, 8)
    assert second.state_dict() == {"written": ["0-6.ckpt", "0-8.ckpt"]}
    Steps(8).train(second, 12)
    names = {"0-10.ckpt", "0-12.ckpt", "last.ckpt"}
    assert set(os.listdir(tmp_path)) == names


def test_a_lowered_bound_holds(tmp_path):
    first = CheckpointEveryNSteps(str(tmp_path), 2, -1)
    Steps().train(first, 8)
    second = CheckpointEveryNSteps(str(tmp_path), 2, 1)
    second.load_state_dict(first.state_dict())
    Steps(8).train(second, 10)
    assert sorted(os.listdir(tmp_path)) == ["0-10.ckpt", "last.ckpt"]


def test_files_of_others_stay(tmp_path):
    others = {"0-1.ckpt", "best.ckpt", "round_0.ckpt", "notes.txt", "mine.partial"}
    for name in others:
        (tmp_path / name).write_text("mine")
    Steps().train(CheckpointEveryNSteps(str(tmp_path), 2, 1), 6)
    assert set(os.listdir(tmp_path)) == others | {"0-6.ckpt", "last.ckpt"}
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_half_files_of_a_killed_process_are_removed(tmp_path):
    for name in ("last.ckpt.7.partial", "0-2.ckpt.123.partial"):
        (tmp_path / name).write_text("PK")
    Steps().train(CheckpointEveryNSteps(str(tmp_path), 2), 1)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- signals


@pytest.fixture
def signalled(tmp_path):
    """A trainer that gets a signal after its second update."""
    end = RunEnd(f"{tmp_path}/last.ckpt")
    trainer = Steps()
    trainer.world_size, trainer.max_steps = 1, 10
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    end.on_train_start(trainer)

    def go(number: int) -> None:
        trainer.global_step = 2
        os.kill(os.getpid(), number)
        end.on_train_batch_end(trainer, None)

    yield go
    end.teardown(trainer, None, "fit")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_ends(signalled, tmp_path, name, monkeypatch):
    asked = []
    monkeypatch.setattr(callbacks, "requeue", lambda: asked.append(1))
    number = signal.Signals[name]
    with pytest.raises(RunStopped, match=f"stopped by {name} after step 2;") as error:
        signalled(number)
    assert error.value.status == 128 + number
    assert f"checkpointing.resume_ckpt_path={tmp_path}/last.ckpt" in str(error.value)
    assert step_of(tmp_path / "last.ckpt") == 2
    assert len(asked) == (name == "SIGUSR1")


def test_a_second_ctrl_c_ends_at_once(signalled):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SignalReceived):
        os.kill(os.getpid(), signal.SIGINT)


def test_no_signal_no_file(signalled, tmp_path):
    end, trainer = RunEnd(f"{tmp_path}/last.ckpt"), Steps(3)
    trainer.max_steps = 10
    end.on_train_batch_end(trainer, None)
    assert os.listdir(tmp_path) == []


def test_the_last_update_is_saved_once(tmp_path, monkeypatch):
    end, trainer, saved = RunEnd(f"{tmp_path}/last.ckpt"), Steps(), []
    trainer.world_size, trainer.max_steps = 1, 2
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda *args, **_: saved.append(trainer.global_step)
    )
    end.on_train_start(trainer)
    for trainer.global_step in (1, 2, 2):  # the last one again: accumulation
        end.on_train_batch_end(trainer, None)
    end.on_train_end(trainer)
    end.teardown(trainer, None, "fit")
    assert saved == [2]


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A Slurm command that notes its arguments and returns a status."""

    def install(status: int) -> Path:
        for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
            monkeypatch.delenv(name, raising=False)
        program, notes = tmp_path / "scontrol", tmp_path / "notes"
        program.write_text(f"#!/bin/sh\necho $* >> {notes}\necho no >&2\nexit {status}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return notes

    return install


def test_requeue(scontrol, monkeypatch, caplog):
    notes = scontrol(0)
    requeue()  # outside of Slurm
    assert not notes.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert notes.read_text().splitlines() == ["requeue 12", "requeue 11_3"]
    assert caplog.records == []


def test_requeue_that_is_refused(scontrol, monkeypatch, caplog):
    scontrol(1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    requeue()
    assert [x.getMessage() for x in caplog.records] == ["scontrol requeue 12: no"]


# ---------------------------------------------------------------- two ranks


@pytest.mark.parametrize("own", [None, "my disk is full"])
def test_all_ranks_stop_where_the_first_one_has_to(own):
    """The first one joins the others where they wait, and only then tells them."""
    seen = []

    def broadcast(problem):
        seen.append(problem)
        return "the disk is full"  # of the first one

    ranks = SimpleNamespace(strategy=SimpleNamespace(broadcast=broadcast))

    def save():
        with stopping_together(ranks, lambda: seen.append("met")):
            if own:
                raise RunStopped(own)

    with pytest.raises(RunStopped, match=r"^the disk is full$") as error:
        save()
    assert error.value.status == 1
    assert seen == (["met", own] if own else [None])


# ---------------------------------------------------------------- a whole run

OVERRIDES = (
    "algo=duo_base",
    "data.num_train=24",
    "data.num_valid=4",
    "model.n_blocks=1",
    "model.hidden_size=8",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.num_sanity_val_steps=0",
    "eval.generate_samples=False",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
)


def train(folder: Path, *more: str) -> None:
    overrides = {x.split("=")[0]: x for x in (*OVERRIDES, *more)}.values()
    config = compose(*overrides, f"checkpointing.save_dir={folder}")
    lightning.seed_everything(config.seed, verbose=False)
    main.train(config)


@pytest.mark.parametrize("victim", ["0-4.ckpt", "best.ckpt", "last.ckpt"])
def test_a_disk_that_fills_up_in_a_run(tmp_path, monkeypatch, victim):
    """Whichever callback writes the file."""
    monkeypatch.chdir(tmp_path)
    whole = LocalFileSystem.open

    def limited(self, path, mode="rb", **options):
        file = whole(self, path, mode, **options)
        is_victim = "w" in mode and f"/{victim}" in str(path)
        return FullDisk(file, 1000) if is_victim else file

    train(tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=2")
    folder = tmp_path / "checkpoints"
    before = step_of(folder / "last.ckpt")
    monkeypatch.setattr(LocalFileSystem, "open", limited)
    with pytest.raises(RunStopped, match=f"{victim} cannot be written: .*No space"):
        train(tmp_path)
    assert step_of(folder / "last.ckpt") == before == 2
    assert not list(folder.glob("*.partial"))
    monkeypatch.setattr(LocalFileSystem, "open", whole)
    train(tmp_path)
    assert step_of(folder / "last.ckpt") == 6


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_disk_that_is_full(small_disk):
    """It has room for one file of 80 kB, and not for its successor beside it."""
    path = small_disk / "last.ckpt"
    CheckpointFiles().save_checkpoint(content(1), path)
    with pytest.raises(RunStopped, match="No space left on device"):
        CheckpointFiles().save_checkpoint(content(2), path)
    assert os.listdir(small_disk) == ["last.ckpt"]
    assert step_of(path) == 1
