"""One process at a time writes into a folder: it holds a lock file there.

The file says which process that is; the kernel has a lock on it, which ends with the
process; and its time of change is set anew every few seconds. Whoever finds one on the
same machine, in whichever container, asks the kernel. Where the file system has no such
locks, the process is looked for by its pid and the moment it began. Of another machine,
with which a network file system is shared, the time has to change within a minute. A
file that nobody holds any more, or that is a copy, is taken over.
"""

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from utils import ConfigError, Process, filesystem_of, is_local

log = logging.getLogger(__name__)

NAME = "run.lock"
BEAT = 5.0  # seconds between two changes of its time
SILENCE = 60.0  # seconds without one, after which the holder is taken for dead


class Holder(NamedTuple):
    """Who holds a folder."""

    process: Process
    since: str  # local time
    is_locked: bool  # by the kernel, too

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host} (since {self.since})"

    @classmethod
    def read(cls, path: str) -> "Holder | None":
        """None where the file does not say; a FileNotFoundError if there is none."""
        with open(path, "rb") as file:
            try:
                host, pid, started, space, since, locked = json.loads(file.read(10_000))
                process = Process(str(host), int(pid), str(started), str(space))
                is_pid = 0 < process.pid < 2**31
                return cls(process, str(since), locked is True) if is_pid else None
            except (ValueError, TypeError, OverflowError, RecursionError):
                return None


@contextlib.contextmanager
def holding(path: str, key: str, *, is_file: bool = False) -> Iterator[None]:
    """While this lasts no other process holds the folder, or the file.

    Args:
        path: Its folder is made if it is not there. What is not on a file system of
            this machine cannot be held, and nothing is done.
        key: Config key of the path, for the message.
        is_file: Whether it is a file, whose lock lies beside it.

    Raises:
        ConfigError: If a process that lives holds it.
    """
    if not is_local(path):
        yield
        return
    _, inner = filesystem_of(path)
    lock = f"{inner}.lock" if is_file else os.path.join(inner, NAME)
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    file = _take(lock, f"{key}={path!r}")
    is_over = threading.Event()
    beats = threading.Thread(target=_beat, args=(file, is_over), daemon=True)
    beats.start()
    try:
        yield
    finally:
        is_over.set()
        beats.join()
        if _is_there(lock, file):
            os.remove(lock)
        _close(file)


def _take(path: str, where: str) -> int:
    """Makes the lock file, and locks it.

    Returns:
        Its file descriptor.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            return _make(path)
        try:
            seen = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # it has just been given up
        try:
            holder = Holder.read(path)
            if lives(path, holder):
                who = holder or "another process"
                raise ConfigError(
                    f"{where}: {who} holds it. Wait until it has ended, or give "
                    "another one (hydra.run.dir, where the key is not on the command "
                    "line)."
                )
            _remove(path, seen)
        except FileNotFoundError:
            continue
        finally:
            os.close(seen)
        log.info("%s was left behind by %s: taken over", path, holder)


def _make(path: str) -> int:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    _files.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except OSError:  # a file system without locks
        is_locked = False
    holder = [*Process.this(), time.strftime("%Y-%m-%d %H:%M:%S"), is_locked]
    os.write(file, json.dumps(holder).encode())
    return file


def _remove(path: str, seen: int) -> None:
    """Removes the file that was seen, and not one that another has made meanwhile.

    Of processes that want to, only the one that has locked it does. That it is open
    keeps its number from being given to another file.

    Args:
        path: Of the lock file.
        seen: Its descriptor.
    """
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            fcntl.flock(seen, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # another one looks at it, or removes it
            time.sleep(0.01)
        except OSError:  # a file system without locks
            break
    if _is_there(path, seen):
        os.remove(path)


def _is_there(path: str, file: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


# ---------------------------------------------------------------- signs of life


def lives(path: str, holder: Holder | None) -> bool:
    """Whether the holder of a lock file lives, by the first sign that is clear."""
    is_seen = None
    if holder is not None and holder.is_locked and holder.process.is_of_this_machine():
        is_seen = _is_locked(path)
    if is_seen is None and holder is not None:
        is_seen = holder.process.lives()
    return _is_beating(path, holder) if is_seen is None else is_seen


def _is_locked(path: str) -> bool | None:
    """Whether a process on this machine has locked the file; None: no telling."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def _is_beating(path: str, holder: Holder | None) -> bool:
    """Whether the file's time changes, or the file itself, while one looks."""
    first = _time_of(path)
    if first is None or _time_there(path) - first > SILENCE:
        return False
    log.info("waiting up to %d s to see whether %s lives", SILENCE, holder)
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(BEAT / 10)
        if (now := _time_of(path)) != first:
            return now is not None
    return False


def _time_of(path: str) -> float | None:
    """When a file has changed; opening it has a network file system ask anew."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _time_there(path: str) -> float:
    """What time it is for the file system, whose clock may be another machine's."""
    probe = f"{path}.{os.getpid()}"
    with open(probe, "wb") as file:
        now = os.fstat(file.fileno()).st_mtime
    os.remove(probe)
    return now


def _beat(file: int, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT):
        with contextlib.suppress(OSError):  # a network that is away for a while
            os.utime(file)


# ---------------------------------------------------------------- forks

_files: set[int] = set()  # that this process has locked


def _close(file: int) -> None:
    _files.discard(file)
    os.close(file)


def _forget() -> None:
    """A child of this process, such as a data worker, holds nothing."""
    for file in list(_files):
        _close(file)


os.register_at_fork(after_in_child=_forget)
