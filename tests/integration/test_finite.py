"""Numbers that are not finite in real runs, of two processes among them."""

from pathlib import Path

import pytest
from command_line import TINY, run

from checkpoints.reading import read_checkpoint

PLUGIN = '''
"""MDLM of which one rank's loss is not finite at some steps."""

import os

import algo


class Broken(algo.MDLM):
    def loss(self, batch, batch_idx=0):
        losses = super().loss(batch, batch_idx)
        steps = os.environ["BROKEN"].split()
        is_here = self.training and self.global_rank == self.trainer.world_size - 1
        is_here &= self.config.seed == 1
        if is_here and str(self.global_step + 1) in steps:
            losses = losses._replace(loss=losses.loss * float("nan"))
        return losses
'''
RUN = (
    *TINY,
    "algo=mdlm",
    "algo._target_=broken.Broken",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=4",
    "eval.generate_samples=False",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "loader.batch_size=4",
    "logger=csv",
)


@pytest.fixture
def broken(tmp_path):
    """broken(steps, *overrides): a run whose loss breaks there, with seed 1 alone."""
    (tmp_path / "broken.py").write_text(PLUGIN)

    def broken(steps: str, *overrides: str, status: int = 0):
        return run(
            *RUN,
            *overrides,
            f"hydra.run.dir={tmp_path}/run",
            cwd=tmp_path,
            pythonpath=tmp_path,
            env={"BROKEN": steps},
            status=status,
        )

    return broken


def steps_of(folder: Path) -> dict[str, int | None]:
    paths = sorted((folder / "run/checkpoints").glob("*.ckpt"))
    found = {path.name: read_checkpoint(str(path), "x") for path in paths}
    assert not any(checkpoint.not_finite() for checkpoint in found.values())
    return {name: checkpoint.step for name, checkpoint in found.items()}


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_diverges_ends_with_one_line(broken, tmp_path, devices):
    """Status 1; the checkpoints of before, and the same command goes on from there."""
    done = broken("8", f"trainer.devices={devices}", status=1)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "step 8: the loss is nan" in line
    assert "best.ckpt" in line or "last.ckpt" in line
    assert "Traceback" not in done.stderr
    assert steps_of(tmp_path) == {"0-4.ckpt": 4, "best.ckpt": 4, "last.ckpt": 4}
    broken("", f"trainer.devices={devices}")
    assert steps_of(tmp_path)["last.ckpt"] == 12


@pytest.mark.slow
def test_two_processes_leave_out_the_same_updates(broken, tmp_path):
    done = broken("3 8", "trainer.devices=2", "training.nonfinite=skip")
    assert (
        "step 3: the loss is nan; the update is left out" in done.stdout + done.stderr
    )
    assert steps_of(tmp_path)["last.ckpt"] == 12
    assert "0-8.ckpt" not in steps_of(tmp_path)


@pytest.mark.slow
def test_a_sweep_goes_on_behind_a_run_that_diverges(broken, tmp_path):
    jobs = ("-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep")
    done = broken("5", *jobs, status=2)
    assert "Traceback" not in done.stderr
    head, first, second = (tmp_path / "sweep/summary.csv").read_text().splitlines()
    assert "refused" in head
    assert "Training has stopped" in first
    assert "Training has stopped" not in second
