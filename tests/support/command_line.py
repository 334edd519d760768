"""Runs the real command line as a subprocess, at a size that takes seconds."""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nursery import ENV, nursery

ROOT = Path(__file__).resolve().parents[2]
ALGORITHMS = ("ar", "mdlm", "sedd", "d3pm", "duo_base")

TINY = (
    "data=synthetic",
    "data.num_train=400",
    "data.num_valid=64",
    "model=tiny",
    "model.length=32",
    "model.n_blocks=2",
    "model.n_heads=2",
    "model.hidden_size=32",
    "model.dropout=0",
    "loader.global_batch_size=16",
    "loader.eval_global_batch_size=64",
    "sampling.steps=8",
    "sampling.num_sample_batches=1",
    "lr_scheduler.num_warmup_steps=5",
    "trainer.accelerator=cpu",
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "trainer.log_every_n_steps=1",
)


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *overrides]


def run(
    *overrides: str,
    cwd: Path,
    status: int = 0,
    pythonpath: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 240,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Runs main.py in `cwd` with no network and one thread; checks its status.

    Args:
        fresh: Whether in a new interpreter, not in a fork of one that has imported the
            framework; seconds slower.
    """
    env = dict(env or {})
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    if fresh:
        done = subprocess.run(
            command(*overrides),
            cwd=cwd,
            env=os.environ | ENV | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    else:
        done = _forked(list(overrides), cwd, env, timeout)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def _forked(
    overrides: list[str], cwd: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "out", Path(folder) / "err"
        pid = nursery().start(overrides, cwd, *files, **env)
        status = nursery().wait(pid, timeout)
        said = (file.read_text() for file in files)
        return subprocess.CompletedProcess(command(*overrides), status, *said)


def logged(run_dir: Path, column: str) -> list[float]:
    """A column of a run's CSV log, empty cells left out."""
    with open(run_dir / "csv" / "version_0" / "metrics.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
