"""A process that starts others quickly: it imports the framework once, and forks a real
process for each command line, which spares every one of them seconds of imports.
"""

import atexit
import functools
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENV = {
    "COLUMNS": "200",  # rich wraps tables otherwise
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE),
}


class Nursery:
    """The process, as its user sees it."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENV,
        )
        atexit.register(self._server.stdin.close)  # then it ends

    def start(
        self, argv: list[str], cwd: Path, stdout: Path, stderr: Path, **env: str
    ) -> int:
        """The pid of `python main.py ARGV`, with files that its output goes to."""
        return self._ask(
            {
                "argv": argv,
                "cwd": str(cwd),
                "stdout": str(stdout),
                "stderr": str(stderr),
                "env": env,
            }
        )

    def wait(self, pid: int, timeout: float = 240) -> int:
        """The status that a process ends with.

        Raises:
            TimeoutError: If it does not in so many seconds; it is killed.
        """
        end = time.monotonic() + timeout
        while (status := self._ask({"poll": pid})) is None:
            if time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                raise TimeoutError(f"process {pid} has run for {timeout} s")
            time.sleep(0.02)
        return status

    def _ask(self, request: dict) -> int | None:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@functools.cache
def nursery() -> Nursery:
    """The one of this process."""
    return Nursery()


# ---------------------------------------------------------------- as a program


def become(request: dict) -> None:
    """Turns into `python main.py` with the arguments of a request."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.path[1:1] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    for number, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(request[name], flags), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if limit := request["env"].get("FILE_SIZE_LIMIT"):  # Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    sys.argv = [str(ROOT / "main.py"), *request["argv"]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        leave(end.code or 0)
    leave(0)


def leave(status: int) -> NoReturn:
    """Ends as the interpreter does, but that it leaves all modules as they are: taking
    down those that came with the fork costs more than most commands do."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answers a command line by a pid, {poll: pid} by its status or null."""
    sys.path[:1] = [str(ROOT), str(HERE)]
    # For the children; the last ones are imported by nearly all of them.
    import aiobotocore.session  # noqa: F401
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import s3fs  # noqa: F401

    import algo  # noqa: F401
    import checkpoints.export  # noqa: F401
    import distillation  # noqa: F401
    import evaluation.likelihood
    import evaluation.samples  # noqa: F401
    import main  # noqa: F401
    import report.mode  # noqa: F401

    gc.freeze()  # else each child visits, and so copies, all of this as it ends
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return become(request)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    serve()
