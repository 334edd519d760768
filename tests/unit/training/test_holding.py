"""One process at a time holds a folder, and a dead one none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

from training import holding as module
from training.holding import NAME, Holder, holding, lives
from utils import ConfigError, Process

ROOT = Path(__file__).parents[3]
KEY = "checkpointing.save_dir"
HOLD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from training.holding import holding
with holding(sys.argv[1], "key"):
    if "fork" in sys.argv:
        begun, tell = os.pipe()
        if os.fork() == 0:
            os.write(tell, b".")
            time.sleep(60)
            os._exit(0)
        os.read(begun, 1)
    print("held", flush=True)
    sys.stdin.readline()
"""


RACE = """
import contextlib, sys
sys.path.insert(0, {root!r})
from training.holding import holding
from utils import ConfigError
while sys.stdin.readline():
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(holding(sys.argv[1], "key"))
            print("held", flush=True)
        except ConfigError:
            print("refused", flush=True)
        sys.stdin.readline()
    print("given", flush=True)
"""


@pytest.fixture
def quick(monkeypatch):
    """Signs of life within fractions of a second."""
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "SILENCE", 0.5)


@pytest.fixture
def other():
    """Another process that holds a folder: other(folder, *options, before=command)."""
    started = []

    def start(folder, *options, before=()):
        command = [*before, sys.executable, "-c", HOLD, str(folder), *options]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def take(folder) -> None:
    with holding(str(folder), KEY):
        assert (Path(folder) / NAME).exists()


def left_behind(folder: Path, **changes) -> Path:
    """A lock file whose holder has died, or never lived."""
    holder = {**Process.this()._asdict(), "since": "now", "is_locked": False, **changes}
    path = folder / NAME
    path.write_text(json.dumps(list(holder.values())))
    return path


def test_it_is_there_while_it_is_held(tmp_path):
    folder = tmp_path / "a" / "b"
    with holding(str(folder), KEY):
        holder = Holder.read(f"{folder}/{NAME}")
        assert holder.process == Process.this()
        assert holder.is_locked
        refused(lambda: take(folder), f"{KEY}='{folder}'", f"process {os.getpid()} on ")
    assert list(folder.iterdir()) == []
    take(folder)


def test_it_is_given_up_whatever_happens(tmp_path):
    with pytest.raises(RuntimeError), holding(str(tmp_path), KEY):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_lives(tmp_path, other):
    process = other(tmp_path)
    began = time.monotonic()
    refused(lambda: take(tmp_path), f"process {process.pid} on ", " holds it")
    assert time.monotonic() - began < 2
    process.communicate("\n")
    take(tmp_path)


@pytest.mark.parametrize("options", [(), ("fork",)])
def test_a_process_that_was_killed(tmp_path, other, options):
    """At once, also while a child of it still lives."""
    process = other(tmp_path, *options)
    process.kill()
    process.wait()
    began = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - began < 2
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_folder_is_not_held(tmp_path, other):
    (tmp_path / "a").mkdir()
    process = other(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / NAME).write_bytes((tmp_path / "a" / NAME).read_bytes())
    take(tmp_path / "b")
    assert process.poll() is None
    with pytest.raises(ConfigError):
        take(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_container_that_was_restarted(tmp_path, other):
    """The pid is the same in both, and neither sees the processes outside."""
    container = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    pids = []
    for _ in range(2):
        process = other(tmp_path, before=container)
        pids.append(Holder.read(f"{tmp_path}/{NAME}").process.pid)
        began = time.monotonic()
        refused(lambda: take(tmp_path), " holds it")
        assert time.monotonic() - began < 2
        process.kill()
        process.wait()
        while module._is_locked(f"{tmp_path}/{NAME}"):  # the child dies after it
            assert time.monotonic() - began < 10
            time.sleep(0.01)
    assert pids[0] == pids[1]
    take(tmp_path)


# ---------------------------------------------------------------- without such locks


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"started": "1"}, False),  # the pid has come back
        ({"pid": 2**22 + 1}, False),
    ],
)
def test_processes_are_known_by_pid_and_start(tmp_path, changes, expected):
    path = left_behind(tmp_path, **changes)
    assert lives(str(path), Holder.read(str(path))) is expected


@pytest.mark.parametrize("space", ["", "another boot", None])
def test_other_machines_are_known_by_their_beats(tmp_path, quick, space):
    """Nobody of this file beats, so it is taken over after a while."""
    if space is None:
        path = tmp_path / NAME
        path.write_text("")  # its process died while it was made
    else:
        path = left_behind(tmp_path, space=space, host="node7")
    began = time.monotonic()
    take(tmp_path)
    assert 0.4 < time.monotonic() - began < 5


def test_an_old_file_of_another_machine_is_taken_at_once(tmp_path):
    path = left_behind(tmp_path, space="another", host="node7")
    os.utime(path, (time.time() - 100,) * 2)
    began = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - began < 2


def test_a_process_of_another_machine_that_beats(tmp_path, quick, monkeypatch):
    """And its clock may be an hour behind."""
    with holding(str(tmp_path), KEY):
        monkeypatch.setattr(Process, "is_of_this_machine", lambda self: False)
        monkeypatch.setattr(Process, "lives", lambda self: None)
        with pytest.raises(ConfigError):
            take(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 5000,
        b'["h", -1, "1", "s", "now", true]',
        b'["h", 0, "1", "s", "now", true]',
        b'["h", 1e99, "1", "s", "now", true]',
        b'["h", 99999999999999999999, "1", "s", "now", true]',
    ],
)
def test_files_that_say_nothing(tmp_path, quick, content):
    (tmp_path / NAME).write_bytes(content)
    assert Holder.read(f"{tmp_path}/{NAME}") is None
    take(tmp_path)


def test_a_file_that_another_has_made_meanwhile_is_not_removed(tmp_path):
    path = left_behind(tmp_path)
    seen = os.open(path, os.O_RDONLY)
    path.unlink()
    new = left_behind(tmp_path, host="the new one")
    content = new.read_text()
    module._remove(str(path), seen)
    assert path.read_text() == content
    os.close(seen)


def test_one_of_many_gets_it(tmp_path):
    """Processes that find a dead one's file at the same moment, again and again."""
    code = RACE.format(root=str(ROOT))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        for _ in range(10):
            left_behind(tmp_path, pid=2**22 + 1)
            for word in ("take\n", "give\n"):
                for process in processes:
                    process.stdin.write(word)
                    process.stdin.flush()
                answers = [process.stdout.readline() for process in processes]
                if word == "take\n":
                    assert answers.count("held\n") == 1
    finally:
        for process in processes:
            process.communicate()


def test_a_store_cannot_be_held():
    with holding("memory://run", KEY), holding("memory://run", KEY):
        pass


def test_a_file(tmp_path):
    """By a lock beside it, which is not in the way of others."""
    paths = [f"{tmp_path}/new/{name}.json" for name in "ab"]
    with holding(paths[0], "key", is_file=True), holding(paths[1], "key", is_file=True):
        with pytest.raises(ConfigError), holding(paths[0], "key", is_file=True):
            pass
        assert len(list((tmp_path / "new").iterdir())) == 2
    assert list((tmp_path / "new").iterdir()) == []
