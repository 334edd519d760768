"""Who learns that a process is lost, and who does not."""

import os
import signal
import socket
import sys
import threading
import time

import pytest

from training import lifelines
from training.lifelines import KEEPALIVE, Lifeline


@pytest.fixture
def three(monkeypatch):
    """Lifelines of a first process and two others, and the names of those that end."""
    monkeypatch.setattr(lifelines, "GRACE", 0.02)
    ended: list[str] = []
    lines = {name: Lifeline(lambda name=name: ended.append(name)) for name in "abc"}
    told = lines["a"].listen()
    for name in "bc":
        lines[name].connect("127.0.0.1", told)
    wait_for(lambda: len(lines["a"]._connections) == 2)
    yield lines, ended
    for one in lines.values():
        one.close(is_in_order=True)


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def cut(lifeline: Lifeline) -> None:
    """What the kernel does when the process is killed."""
    for one in lifeline._connections:
        one.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("lost", ["a", "b"])
def test_all_others_learn_of_a_lost_one(three, lost):
    """Also those that have no connection with it."""
    lines, ended = three
    cut(lines[lost])
    wait_for(lambda: {*"abc"} - {lost} <= {*ended})


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_that_ends_in_order_is_not_lost(three, name):
    lines, ended = three
    lines[name].close(is_in_order=True)
    other = lines["a" if name == "b" else "b"]
    wait_for(lambda: len(other._connections) < (2 if name == "b" else 1))
    assert ended == []


def test_one_that_fails_is_lost(three):
    lines, ended = three
    lines["b"].close(is_in_order=False)
    wait_for(lambda: {*"ac"} <= {*ended})


def test_a_process_that_ends_by_itself_is_left_to_it(three, monkeypatch):
    """Within the time that it has for that."""
    lines, ended = three
    monkeypatch.setattr(lifelines, "GRACE", 60)
    cut(lines["b"])
    wait_for(lambda: not lines["c"]._connections or lines["c"]._thread.is_alive())
    for name in "ac":
        lines[name].close(is_in_order=True)
        assert not lines[name]._thread.is_alive()
    assert not {*"ac"} & {*ended}


def test_a_stranger_is_nobody_of_the_run(three):
    lines, ended = three
    port = lines["a"]._listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"0" * 32)
        assert stranger.recv(1) == b""  # it is sent away
    assert len(lines["a"]._connections) == 2
    assert ended == []


def test_the_kernels_ask_within_a_minute(three):
    """Of both ends; with the time for an end in order it is less than a minute."""
    idle, interval, number = KEEPALIVE.values()
    assert idle + interval * number + 10 < 60
    for line in three[0].values():
        for one in line._connections:
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for name, value in KEEPALIVE.items():
                option = getattr(socket, name)
                assert one.getsockopt(socket.IPPROTO_TCP, option) == value


def test_a_child_holds_nothing(three):
    """A data worker that outlives its parent does not make it seem alive."""
    lines, ended = three
    child = os.fork()
    if not child:
        signal.pause()
    try:
        lines["b"].forget()  # the parent ends, and the child does not
        wait_for(lambda: {*"ac"} <= {*ended})
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("folder", ["runs/a", "", None])
def test_the_end_of_a_process_wherever_it_is(folder):
    """Its main thread stands in a call that does not return."""
    own = (folder is not None, folder or "")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        sys.stderr = os.fdopen(writing, "w", buffering=1)
        thread = threading.Thread(target=lifelines.end_alone, args=own)
        thread.start()
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    with open(reading) as said:
        line = said.read()
    where = f". Its command goes on with checkpointing.save_dir={folder}"
    told = f"error: {lifelines.LEFT_ALONE}{where if folder else ''}\n"
    assert line == (told if folder is not None else "")
