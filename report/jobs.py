"""The processes that make the evaluations that a report is missing."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.progress import progress
from report.runs import _mode, _read
from utils import (
    RunStopped,
    filesystem_of,
    hydra_quoted,
    path_exists,
    stopped_by,
)

MAIN = Path(__file__).parents[1] / "main.py"


# ---------------------------------------------------------------- making


# How the last line of a run begins that has not done its work.
ENDS = ("error: ", "stopped by ")


class Job(NamedTuple):
    """An evaluation to make, in a process of its own."""

    name: str  # of its folder
    overrides: dict[str, str]  # of the command line
    result: str  # key that takes the path of its file
    checkpoint: str

    def file(self, folder: str) -> str:
        """Its file in a folder; another one for other settings or contents."""
        about = [self.overrides, self.checkpoint]
        if path_exists(self.checkpoint):
            filesystem, inner = filesystem_of(self.checkpoint)
            info = filesystem.info(inner)
            about += [info.get("size"), str(info.get("mtime"))]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return f"{folder}/{self.name}-{digest[:8]}.json"

    def command(self, file: str, run_dir: Path) -> list[str]:
        """The command line that writes its file."""
        pairs = {self.result: file, "hydra.run.dir": str(run_dir), **self.overrides}
        quoted = (f"{key}={_for_hydra(value)}" for key, value in pairs.items())
        return [sys.executable, str(MAIN), *quoted]


_PLAIN = re.compile(r"[\w./:+\-\[\]]*")


def _for_hydra(value: str) -> str:
    """A value as Hydra wants it; one in quotes or brackets is so already."""
    if _PLAIN.fullmatch(value) or value[0] in "'\"[{":
        return value
    return hydra_quoted(value)


def make(jobs: Sequence[Job], folder: str) -> tuple[list[str], list[str]]:
    """Runs the jobs that have no finished file yet, one after the other.

    Args:
        jobs: To be done.
        folder: Where their files go; a stopped report goes on from there.

    Returns:
        The files of those that are done, and a line about each of the others.

    Raises:
        RunStopped: If none could be done, the message is that of the first; or after
            a signal.
    """
    files: list[str] = []
    failed: list[str] = []
    statuses: list[int] = []
    for job in (bar := progress(jobs, "evaluations")):
        bar.set_postfix_str(job.name)
        file = job.file(folder)
        if not is_finished(file):
            run_dir = Path(os.getcwd()) / "jobs" / Path(file).stem
            try:
                complaint = _run(job.command(file, run_dir), run_dir)
            except (KeyboardInterrupt, SystemExit) as error:  # after a signal
                done = f"{len(files)} of {len(jobs)} evaluations are in {folder}"
                raise stopped_by(error, done) from None
            if complaint:
                statuses.append(complaint[0])
                failed.append(f"{job.name}: {complaint[1]}")
                continue
        files.append(file)
    if failed and not files:
        message = f"{len(failed)} of {len(jobs)} evaluations failed; {failed[0]}"
        raise RunStopped(message, 2 if statuses[0] == 2 else 1)
    return files, failed


def is_finished(file: str) -> bool:
    """Whether a file of `make` is there and whole."""
    if not path_exists(file):
        return False
    content = _read(file)
    return _mode(content) == "ppl_eval" or content.get("complete") is True


def _run(command: list[str], run_dir: Path) -> tuple[int, str] | None:
    """Status and complaint of a process that failed. What it says is in log.txt."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "log.txt"
    with open(path, "w") as file:
        done = subprocess.run(
            command, cwd=run_dir, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if not (status := done.returncode):
        return None
    lines = path.read_text(errors="replace").splitlines()
    said = next((x for x in lines if x.startswith(ENDS)), f"status {status}")
    return status, f"{said.removeprefix('error: ')} (log: {path})"
