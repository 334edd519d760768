"""Processes of runs that are stopped and go on, and what a run shows of itself: its
last checkpoint, the curves of all its CSV logs together, and which rows it trained on
at which step.
"""

import csv
import itertools
import os
import signal
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import lightning
import pytest
import torch
from nursery import nursery
from ports import free_port
from tiny import compose

import main

# Nine updates an epoch; validations, logs and checkpoints at different steps.
BASE = (
    "data=synthetic",
    "data.num_train=72",
    "data.num_valid=64",
    "model=tiny",
    "model.length=16",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.hidden_size=32",
    "model.dropout=0.1",
    "loader.global_batch_size=8",
    "loader.eval_global_batch_size=16",
    "sampling.steps=2",
    "sampling.num_sample_batches=1",
    "lr_scheduler.num_warmup_steps=5",
    "trainer.accelerator=cpu",
    "trainer.max_steps=30",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=3",
    "+trainer.enable_progress_bar=False",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=5",
)
DUO_BASE = ("algo=duo_base", "algo._target_=stopper.DuoBase")
TWO = ("trainer.devices=2", "loader.batch_size=2", "loader.num_workers=2")


def with_base(*overrides: str) -> list[str]:
    """The run's settings with some in the place of its own, as on the command line;
    another data set or network has none of the sizes of the usual one."""
    given = {x.split("=")[0]: x for x in overrides}
    others = tuple(f"{key}." for key in ("data", "model") if key in given)
    base = {x.split("=")[0]: x for x in (*BASE, *DUO_BASE)}
    kept = {key: x for key, x in base.items() if not key.startswith(others or "-")}
    return list((kept | given).values())


# ---------------------------------------------------------------- processes


class Life:
    """One process of a run."""

    numbers = itertools.count()  # of the files that hold what it says

    def __init__(self, folder: Path, argv: list[str], env: dict[str, str]) -> None:
        number = next(self.numbers)
        self.folder = folder
        self.stderr_path = folder / f"{number}.err"
        self.log = folder / "log0"
        self._before = self.num_batches()
        self.pid = nursery().start(
            [*argv, f"hydra.run.dir={folder}"],
            folder,
            folder / f"{number}.out",
            self.stderr_path,
            **{"STOP_AT": "", "DATALOG": f"{folder}/log"} | env,
        )

    @classmethod
    def start(cls, folder: Path, *overrides: str, **env: str) -> "Life":
        """A life of the run with some overrides in the place of its own.

        Args:
            folder: Of the run.
            overrides: As for `with_base`.
            env: NAME=value of the environment.
        """
        folder.mkdir(exist_ok=True, parents=True)
        return cls(folder, with_base(*overrides), env)

    @classmethod
    def start_two(cls, folder: Path, *overrides: str, **env: str) -> list["Life"]:
        """Both ranks of a run, as torchrun would start them."""
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"WORLD_SIZE": "2", "NODE_RANK": "0"}
        return [
            cls.start(folder, *overrides, **env, **place, LOCAL_RANK=str(rank))
            for rank in range(2)
        ]

    def num_batches(self) -> int:
        return self.log.read_text().count("\n") if self.log.exists() else 0

    def reach(self, count: int) -> None:
        """Waits until this life has trained on so many batches."""
        deadline = time.monotonic() + 60  # s; a life takes three
        while self.num_batches() < self._before + count:
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.002)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return nursery().wait(self.pid)

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()


def end_of_two(lives: list[Life], status: int) -> None:
    """Both ranks of a run end with a status."""
    found = [life.wait() for life in lives]
    assert found == [status, status], [life.stderr[-2000:] for life in lives]


def check_end(life: Life, number: int) -> None:
    """How a process has ended that got a signal."""
    status = life.wait()
    stopped = [x for x in life.stderr.splitlines() if x.startswith("stopped by")]
    if number == signal.SIGKILL:
        assert status == -number, life.stderr
        return
    assert status == 128 + number, life.stderr
    name = signal.Signals(number).name
    assert len(stopped) == 1, life.stderr
    assert stopped[0].startswith(f"stopped by {name} after step ")
    assert "Traceback" not in life.stderr


# ---------------------------------------------------------------- what a run shows


# Where the files are and how often a run began is all that may differ.
COMPARED = (
    "state_dict",
    "ema",
    "optimizer_states",
    "lr_schedulers",
    "global_step",
    "epoch",
    "teacher",
)


def differences(one, two, name: str = "") -> list[str]:
    """Names of the entries that are not the same to the bit."""
    if isinstance(one, dict):
        keys = one.keys() | two.keys()
        pairs = [(k, one.get(k), two.get(k)) for k in sorted(keys, key=str)]
    elif isinstance(one, (list, tuple)) and len(one) == len(two):
        pairs = [(k, *both) for k, both in enumerate(zip(one, two, strict=True))]
    elif isinstance(one, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [name]
    else:
        return [] if one == two else [name]
    return [x for k, a, b in pairs for x in differences(a, b, f"{name}.{k}")]


def last(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


def best_score(checkpoint: dict) -> float | None:
    """The best one of the monitored quantity, as a checkpoint knows it."""
    states = checkpoint["callbacks"]
    (state,) = (x for key, x in states.items() if key.startswith("ModelCheckpoint"))
    score = state["best_model_score"]
    return None if score is None else float(score)


def curves(folder: Path) -> dict:
    """All values that any of the run's logs gives for a column and a step."""
    found = defaultdict(set)
    for path in folder.glob("csv/version_*/metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            for column, value in row.items():
                if value:
                    found[column, int(row["step"])].add(value)
    return dict(found)


def batches(folder: Path) -> dict:
    """What was seen at a step and batch, by any process of the run."""
    found = defaultdict(set)
    for path in folder.glob("log*"):
        for line in path.read_text().splitlines():
            step, batch, rows = line.split()
            found[path.name, int(step), int(batch)].add(rows)
    return dict(found)


def check_same(one: Path, two: Path, ended: int = 0) -> None:
    """Two runs, by their folders: weights, EMA, optimiser, best one, curves, data.

    Args:
        one, two: The folders.
        ended: Step after which only the second one has validated, because it ended.
    """
    for file in ("last", "best"):
        first, second = last(one, file), last(two, file)
        for name in COMPARED:
            assert differences(first.get(name), second.get(name), name) == [], file
        assert best_score(first) == best_score(second), file
    seen = curves(two)
    if ended:
        last_one = {key for key in seen if key[0].startswith("val/")}
        last_one &= {(column, ended - 1) for column, _ in seen}
        assert last_one
        seen = {key: x for key, x in seen.items() if key not in last_one}
    assert seen == curves(one)
    assert batches(one) == batches(two)
    assert all(len(values) == 1 for values in batches(one).values())


# ---------------------------------------------------------------- in this process


def train_here(
    save_dir: str | Path,
    *overrides: str,
    raises: type[BaseException] | None = None,
) -> None:
    """Trains in this process, as main.run does."""
    save = f"checkpointing.save_dir={save_dir}"
    config = compose(*with_base(*overrides), save, tiny=False)
    lightning.seed_everything(config.seed, verbose=False)
    with pytest.raises(raises) if raises else nullcontext():
        main.train(config)
