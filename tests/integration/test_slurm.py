"""Training under a real Slurm that takes the job back twice; make test-slurm."""

import shlex
import time
from pathlib import Path

import pytest
import torch
from command_line import TINY, command, run
from slurm import reason_to_skip, running

REASON = reason_to_skip()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

OVERRIDES = (
    *TINY,
    "algo=duo_base",
    "model.dropout=0.1",
    "eval.generate_samples=False",
    "trainer.max_steps=600",
    "trainer.val_check_interval=100",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=50",
    "+trainer.enable_progress_bar=False",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights at the end, by number of processes."""
    found = {}

    def weights(devices: int):
        if devices not in found:
            folder = tmp_path_factory.mktemp("whole")
            number = f"trainer.devices={devices}"
            run(*OVERRIDES, number, "hydra.run.dir=run", cwd=folder)
            found[devices] = load(folder / "run")
        return found[devices]

    return weights


def load(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def steps_in(log: Path) -> int:
    """How many checkpoints the lives so far have said that they wrote."""
    return log.read_text().count(": wrote") if log.exists() else 0


@pytest.mark.parametrize("devices", [1, 2])
def test_a_requeued_job_ends_as_one_that_was_not(
    slurm, uninterrupted, tmp_path, devices
):
    """Back into the queue by scontrol requeue (SIGTERM) and by SIGUSR1, while it
    trains."""
    log = tmp_path / "log"
    own = (*OVERRIDES, f"trainer.devices={devices}", f"hydra.run.dir={tmp_path}/run")
    job = slurm.submit(
        "--requeue",
        "--signal=USR1@120",
        "--open-mode=append",
        f"--output={log}",
        "--nodes=1",
        f"--ntasks-per-node={devices}",
        f"--wrap=srun {shlex.join(command(*own))}",
    )
    interruptions = (
        ("scontrol", "requeue", job),
        ("scontrol", "requeue", job),
        ("scancel", "--signal=USR1", job),
    )
    for interruption in interruptions:
        seen = steps_in(log)
        end = time.monotonic() + 120
        while steps_in(log) < seen + 2:  # it trains
            assert time.monotonic() < end, log.read_text()[-3000:]
            assert slurm.state(job) in ("PENDING", "RUNNING", "COMPLETING")
            time.sleep(0.2)
        slurm.call(*interruption)
        slurm.start_now(job)
    state = slurm.wait(job, "COMPLETED", "FAILED", timeout=240)
    text = log.read_text()
    assert state == "COMPLETED", text[-3000:]
    assert text.count("stopped by SIGTERM") == 2
    assert text.count("stopped by SIGUSR1") == 1
    assert slurm.show(job)["Restarts"] == "3"
    ours, whole = load(tmp_path / "run"), uninterrupted(devices)
    assert ours["global_step"] == whole["global_step"] == 600
    for name, value in whole["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    shadows = (x["ema"]["shadow_params"] for x in (ours, whole))
    for value, expected in zip(*shadows, strict=True):
        assert torch.equal(value, expected)
