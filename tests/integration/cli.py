"""Runs the real command line as a subprocess, at a size that takes seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

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
    timeout: float = 240,
) -> subprocess.CompletedProcess:
    """Runs main.py in `cwd` with no network and one thread; checks its status."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["COLUMNS"] = "200"  # rich wraps tables otherwise
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    options = {"capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run(command(*overrides), cwd=cwd, env=env, **options)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def logged(run_dir: Path, column: str) -> list[float]:
    """A column of a run's CSV log, empty cells left out."""
    with open(run_dir / "csv" / "version_0" / "metrics.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
