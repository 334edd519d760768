"""Runs with `algo.block_size`: what they go on from, and how many processes they have;
test_resumed_runs.py stops one.
"""

from pathlib import Path

import pytest
import torch
from resumed import Life, curves, end_of_two, last, train_here, with_base
from tiny import ALGORITHMS, compose

from checkpoints.about import describe
from checkpoints.reading import read_checkpoint
from evaluation.likelihood import ppl_eval

NAMES = sorted(name for name, algorithm in ALGORITHMS.items() if algorithm.has_blocks)
SHORT = (
    "data.vocab_size=16",
    "data.num_train=400",
    "data.num_valid=256",
    "loader.eval_global_batch_size=64",
    "model.dropout=0",
    "loader.batch_size=8",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "training.ema=0",
    "eval.generate_samples=False",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=100",
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def own(name: str, *overrides: str) -> list[str]:
    """What makes a run short, with some in the place of its own."""
    target = f"algo._target_=algo.{ALGORITHMS[name].__name__}"
    every = {x.split("=")[0]: x for x in (f"algo={name}", target, *SHORT, *overrides)}
    return list(every.values())


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains in this process: train(name of a folder, *overrides)."""

    def go(name: str, *overrides: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        monkeypatch.chdir(place)
        train_here(place, *overrides)
        return place

    return go


def validated(folder: Path, step: int) -> float:
    """val/nll behind an update, counted from 0; nats per token."""
    (value,) = curves(folder)["val/nll", step]
    return float(value)


def evaluated(path: Path, *overrides: str) -> float:
    config = compose(*with_base(*overrides), f"eval.checkpoint_path={path}", tiny=False)
    return ppl_eval(config)["nll"]


def stated(folder: Path) -> str | None:
    """What mode=inspect shows of the last checkpoint's blocks."""
    path = f"{folder}/checkpoints/last.ckpt"
    return describe(read_checkpoint(path, "eval.checkpoint_path")).get("blocks")


@pytest.mark.parametrize("name", ["duo_base", "mdlm"])
def test_whole_rows_are_gone_on_from_in_blocks(train, tmp_path, name):
    """With a learning rate of 0 the bound is that of the weights in blocks, and not
    that in whole rows; with another one it falls. The file says its blocks."""
    plain = train("plain", *own(name))
    path = plain / "checkpoints/last.ckpt"
    more = ("algo.block_size=4", f"training.finetune_path={path}")
    same = train("same", *own(name, *more, "optim.lr=0"))
    longer = ("trainer.max_steps=40", "trainer.val_check_interval=40", "optim.lr=1e-2")
    tuned = train("tuned", *own(name, *more, *longer))
    one, two = last(plain)["state_dict"], last(same)["state_dict"]
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[key]) for key, x in one.items())
    in_blocks = evaluated(path, *own(name), "algo.block_size=4")
    assert validated(same, 3) == pytest.approx(in_blocks, rel=1e-6)
    assert abs(validated(plain, 3) - in_blocks) > 1e-3
    assert validated(tuned, 39) < in_blocks - 0.1
    assert stated(plain) is None
    assert stated(tuned) == "of 4 tokens"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(train, tmp_path, name):
    """With sizes that are drawn for each row, and accumulation in both: weights and
    validation to rounding."""
    more = ("algo.block_size=[4,2,8]", "algo.time_conditioning=True", "optim.lr=3e-3")
    one = train("one", *own(name, *more, "loader.batch_size=4"))
    two = tmp_path / "two"
    both = "trainer.devices=2", "loader.batch_size=2"
    end_of_two(Life.start_two(two, *own(name, *more, *both)), 0)
    found, expected = (last(folder)["state_dict"] for folder in (two, one))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    assert validated(two, 3) == pytest.approx(validated(one, 3), rel=1e-5)
