"""A signal ends a process soon, in order and with its status, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cli import signals
from cli.signals import KEPT, ending_on_signals, was_left_alone, what_is_kept
from main import MODES
from utils import STOP_SIGNALS, SignalReceived


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_it_is_raised_where_the_process_stands(number, monkeypatch):
    """No handler of errors takes it for one, and `finally` is done."""
    monkeypatch.setattr(signals, "SECONDS", 9999)  # pytest is not to end then
    before = [signal.getsignal(x) for x in STOP_SIGNALS]
    done = []

    def work():
        with ending_on_signals():
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            except Exception:
                done.append("an error")
            finally:
                done.append("in order")

    with pytest.raises(SignalReceived) as error:
        work()
    assert error.value.code == 128 + number
    assert error.value.number == number
    assert done == ["in order"]
    assert [signal.getsignal(x) for x in STOP_SIGNALS] == before


def program(text: str) -> subprocess.Popen:
    """Runs Python below handlers of signals; it says when it is ready."""
    lines = ["import os, signal, sys, time", "from cli import signals"]
    lines += ["with signals.ending_on_signals():"]
    lines += [f"    {line}" for line in text.splitlines()]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


READY = "print('ready', flush=True)"


def test_a_second_ctrl_c_ends_at_once():
    """Further signals of a scheduler do not disturb what is put in order."""
    slow = f"try:\n    {READY}\n    time.sleep(60)\nfinally:\n    {READY}\n    "
    for second, status in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)):
        process = program(f"{slow}time.sleep(1)")
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.stdout.readline()
        process.send_signal(second)
        assert process.wait(20) == status


def test_what_does_not_come_to_an_end_is_ended():
    process = program(
        f"signals.SECONDS = 0.2\ntry:\n    {READY}\n    time.sleep(60)\n"
        "finally:\n    time.sleep(60)"
    )
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 128 + signal.SIGUSR1


def test_processes_that_were_forked_end_by_the_signal():
    """They say nothing and put nothing in order that is their parent's."""
    text = (
        f"child = os.fork()\nif not child:\n    try:\n        {READY}\n"
        "        time.sleep(60)\n    finally:\n        print('mine', flush=True)\n"
        "time.sleep(0.3)\nos.kill(child, signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    said = program(text).communicate(timeout=20)[0].split()
    assert said == ["ready", str(-signal.SIGTERM)]


def test_every_mode_has_a_line():
    assert KEPT.keys() <= MODES.keys()
    assert all(what_is_kept(mode) for mode in (*MODES, None, 3))


@pytest.mark.parametrize(
    ("text", "processes", "expected"),
    [
        ("gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:9", 2, True),
        ("Read error [10.0.0.1]:1: Connection reset by peer", 8, True),
        ("a network error or a remote process exiting prematurely", 2, True),
        ("Connection closed by peer", 1, False),
        ("mat1 and mat2 shapes cannot be multiplied", 2, False),
    ],
)
def test_an_error_that_is_of_another_process(text, processes, expected):
    assert was_left_alone(RuntimeError(text), processes) is expected
