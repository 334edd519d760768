"""Scripts of scripts/ given to a real sbatch: a job that comes back goes on in its
folder, from a folder that is not the repository; make test-slurm."""

import json
import sys
import time

import pytest
import torch
from command_line import run
from nursery import ENV, ROOT
from slurm import HERE, TINY, reason_to_skip, running

REASON = reason_to_skip()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slurm")) as found:
        found.env |= ENV | {"WANDB_MODE": "disabled", "PYTHON": sys.executable}
        yield found


def test_a_training_script_comes_back_and_ends(slurm, tmp_path):
    """Two tasks, from another folder with settings of the site; the job is taken back,
    and asked to end before its time limit."""
    settings = tmp_path / "site.sh"
    settings.write_text(f"DUO_OUTPUTS={tmp_path}/big\n")
    slurm.env |= {"DUO_ENV": str(settings), "DUO_REPO": str(ROOT)}
    log = tmp_path / "log"
    job = slurm.call(
        "sbatch",
        "--parsable",
        *HERE,
        "--ntasks-per-node=2",
        f"--output={log}",
        str(ROOT / "scripts" / "train_owt_mdlm.sh"),
        *TINY,
        "trainer.max_steps=600",
        "trainer.val_check_interval=300",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=50",
        "callbacks.checkpoint_every_n_steps.verbose=True",
        cwd=tmp_path,
    )
    for interruption in (
        ("scontrol", "requeue", job),
        ("scancel", "--signal=USR1", job),
    ):
        seen, end = wrote(log), time.monotonic() + 150
        while wrote(log) < seen + 2:
            assert time.monotonic() < end, log.read_text()[-3000:]
            assert slurm.state(job) in ("PENDING", "RUNNING", "COMPLETING")
            time.sleep(0.2)
        slurm.call(*interruption)
        slurm.start_now(job)
    state = slurm.wait(job, "COMPLETED", "FAILED", timeout=240)
    text = log.read_text()
    assert state == "COMPLETED", text[-3000:]
    assert text.count("stopped by SIGTERM") == 1
    assert text.count("stopped by SIGUSR1") == 1
    assert slurm.show(job)["Restarts"] == "2"
    assert "on cpu, 2 devices" in text  # both tasks are of one training
    folder = tmp_path / "big" / "train_owt_mdlm" / "checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 600


def wrote(log) -> int:
    return log.read_text().count(": wrote") if log.exists() else 0


def test_zero_shot_is_a_step_for_each_set(slurm, tmp_path):
    """And then a table, from a job of the repository's own folder."""
    few = (*TINY, "algo=mdlm", "trainer.max_steps=2")
    run(*few, "hydra.run.dir=trained", cwd=tmp_path)
    top, log = tmp_path / "results", tmp_path / "log"
    slurm.env.pop("DUO_REPO", None)
    slurm.env |= {
        "DUO_ENV": "/dev/null",
        "RUN_DIR": str(top),
        "datasets": "ptb lambada",
        "checkpoint_path": str(tmp_path / "trained" / "checkpoints" / "last.ckpt"),
    }
    options = (*HERE, f"--output={log}", "scripts/zero_shot_mdlm.sh", *TINY)
    job = slurm.call("sbatch", "--parsable", *options, cwd=ROOT)
    state = slurm.wait(job, "COMPLETED", "FAILED", timeout=240)
    assert state == "COMPLETED", log.read_text()[-3000:]
    for data in ("ptb", "lambada"):
        assert json.loads((top / data / "likelihood.json").read_text())
    assert (top / "report" / "report.md").exists()
