"""Runs the parts of a long check one after the other, each in a process of its own and
within a time limit of its own: what goes wrong with one does not end the others.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Note = Callable[[str, Row], None]  # keeps a row of a table


class Failed(Exception):
    """A part that ends with a reason of one line."""


class Part(NamedTuple):
    """What is checked, and for how long at most."""

    name: str
    check: Callable[[Note], None]
    limit: float  # seconds


class Outcome(NamedTuple):
    """What became of a part."""

    name: str
    failure: str | None  # one line; None: all is well
    seconds: float
    rows: dict[str, list[Row]]  # of each table, as far as the part has come
    log: str  # the end of what it printed


def run_parts(parts: Sequence[Part], budget: float) -> Iterator[Outcome]:
    """The outcome of each part as it ends.

    Args:
        parts: In this order.
        budget: Seconds for all; a part for which too few are left is not run.
    """
    end = time.monotonic() + budget
    for part in parts:
        left = end - time.monotonic()
        if left < min(part.limit, 10):
            yield Outcome(part.name, "not run: no time was left", 0, {}, "")
        else:
            yield run_part(part._replace(limit=min(part.limit, left)))


def run_part(part: Part) -> Outcome:
    """Forks, so that what is imported is there; nothing may have used the device."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("rows", "error", "log")}
        start = time.monotonic()
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(part.check, files)
        )
        process.start()
        process.join(part.limit)
        is_late = process.is_alive()
        _end_group(process)
        failure = _failure(files["error"], process.exitcode, is_late, part.limit)
        rows: dict[str, list[Row]] = {}
        for line in _text(files["rows"]).splitlines():
            table, row = json.loads(line)
            rows.setdefault(table, []).append(row)
        log = _text(files["log"])[-4000:]
        return Outcome(part.name, failure, time.monotonic() - start, rows, log)


def _child(check: Callable[[Note], None], files: dict[str, Path]) -> None:
    os.setpgid(0, 0)  # so that it can be ended with its own processes

    def note(table: str, row: Row) -> None:
        with open(files["rows"], "a") as file:
            file.write(json.dumps([table, row]) + "\n")

    with open(files["log"], "a", buffering=1) as log:
        for descriptor in (1, 2):  # of its own processes, too
            os.dup2(log.fileno(), descriptor)
        sys.stdout = sys.stderr = log
        try:
            check(note)
            code = 0
        except BaseException as error:
            files["error"].write_text(one_line(error))
            traceback.print_exc()
            code = 1
        log.flush()
        os._exit(code)  # nothing of the parent's is to be ended here


def _end_group(process: Any) -> None:
    """Ends the process and those that it has left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def _failure(
    error: Path, exitcode: int | None, is_late: bool, limit: float
) -> str | None:
    if is_late:
        return f"not done within {limit:.0f} s; what was measured before counts"
    if error.exists():
        return error.read_text()
    if exitcode:
        number = -exitcode
        name = signal.Signals(number).name if number > 0 else f"code {exitcode}"
        return f"the process ended with {name}"
    return None


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def one_line(error: BaseException) -> str:
    """A reason for a table: kind and first line."""
    lines = str(error).strip().splitlines() or [""]
    text = (
        lines[0] if isinstance(error, Failed) else f"{type(error).__name__}: {lines[0]}"
    )
    return text[:300].replace("|", "/")
