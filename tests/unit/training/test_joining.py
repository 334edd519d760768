"""How processes wait for each other, and what they say in the end."""

import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from ports import free_port
from refusals import refused

from training import joining
from training.joining import INTERFACE, Joining, Place, Wait, interfaces_to, open_store
from training.lifelines import Lifeline
from utils import ConfigError, RunStopped

SHORT = 0.002  # minutes


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(joining, "PAUSE", 0.01)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LOCAL_RANK", "SLURM_LOCALID", INTERFACE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def of_rank(compose, rank: int, port: int, *overrides: str, host: str = "127.0.0.1"):
    """What one of two nodes has, and what it has connected."""
    connected = []
    place = {"main_address": host, "main_port": port}
    place |= {"local_rank": lambda: 0, "node_rank": lambda: rank}
    strategy = SimpleNamespace(
        cluster_environment=SimpleNamespace(**place),
        setup_environment=lambda: connected.append(rank),
    )
    config = compose("trainer.devices=1", "trainer.num_nodes=2", *overrides)
    return Joining(config, strategy), strategy, connected


@pytest.mark.parametrize("late", [0, 1])
def test_one_that_comes_late_is_waited_for(compose, late):
    port = free_port()
    nodes = [of_rank(compose, rank, port) for rank in range(2)]

    def start(rank: int) -> threading.Thread:
        thread = threading.Thread(target=nodes[rank][1].setup_environment)
        thread.start()
        return thread

    early = start(1 - late)
    time.sleep(0.1)
    assert not nodes[1 - late][2]
    for thread in (start(late), early):
        thread.join(timeout=30)
    assert [connected for *_, connected in nodes] == [[0], [1]]
    for callback, *_ in nodes:
        assert callback._lifeline is not None
        callback.teardown(None, None, "fit")
        assert callback._lifeline is None


def test_one_that_never_comes(compose):
    """The first process says how many have come, for which keys, and what to do."""
    minutes = f"strategy.timeout.minutes={SHORT}"
    port = free_port()
    callback, strategy, connected = of_rank(compose, 0, port, minutes)
    refused(
        strategy.setup_environment,
        minutes,
        "1 of trainer.devices=1 x trainer.num_nodes=2 processes have come",
        f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}",
        "Start the others",
        "give more time",
    )
    assert connected == []
    callback.on_exception(None, None, ConfigError(""))


def test_a_first_one_that_is_not_there(compose):
    """A wrong address, or 127.0.0.1 on another node."""
    minutes = f"strategy.timeout.minutes={SHORT}"
    _, strategy, connected = of_rank(compose, 1, free_port(), minutes)
    parts = (minutes, "the first process is not reached", "MASTER_ADDR has to be")
    refused(strategy.setup_environment, *parts)
    assert connected == []


def test_an_address_that_nobody_knows(compose):
    minutes = f"strategy.timeout.minutes={SHORT}"
    place = {"host": "no-such-node.invalid"}
    _, strategy, _ = of_rank(compose, 1, free_port(), minutes, **place)
    refused(strategy.setup_environment, "MASTER_ADDR=no-such-node.invalid")


def test_whoever_waits_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(joining, "SAYING", -1)
    caplog.set_level("INFO")
    wait, looks = Wait(Place("10.0.0.1", 5), 1), iter([False, False, True])
    wait.until(lambda: next(looks), lambda: "nobody has come", "")
    (line,) = caplog.messages
    assert line == "waiting: nobody has come at MASTER_ADDR=10.0.0.1, MASTER_PORT=5"


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        refused(
            lambda: open_store(Place("127.0.0.1", port), is_host=True),
            f"MASTER_PORT={port}",
            "another MASTER_PORT",
        )


@pytest.mark.parametrize(
    ("said", "is_explained"),
    [
        ("Gloo connectFullMesh failed with [pair.cc:152] timed out connecting", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_an_interface_that_nobody_is_reached_by(
    compose, monkeypatch, said, is_explained
):
    def fail() -> None:
        raise RuntimeError(said)

    monkeypatch.setenv(INTERFACE, "lo")
    monkeypatch.setattr(Joining, "_meet", lambda self: None)
    strategy = SimpleNamespace(setup_environment=fail)
    callback = Joining(compose(), strategy)
    callback._lifeline = line = Lifeline(lambda: None)
    if is_explained:
        refused(strategy.setup_environment, f"{INTERFACE}=lo", "ip -brief address")
    else:
        with pytest.raises(RuntimeError, match=re.escape(said)):
            strategy.setup_environment()
    assert line._is_over.is_set()


@pytest.mark.parametrize(
    ("error", "is_in_order"),
    [(RunStopped(""), True), (ConfigError(""), True), (ValueError(""), False)],
)
def test_whether_the_others_end_by_themselves(compose, error, is_in_order):
    callback, *_ = of_rank(compose, 0, 1)
    told = []
    callback._lifeline = SimpleNamespace(close=told.append)
    callback.on_exception(None, None, error)
    assert told == [is_in_order]


def test_the_interface_of_this_machine_alone_is_none():
    assert interfaces_to("127.0.0.1") == []
    assert interfaces_to("no-such-node.invalid") == []


def test_the_interface_of_an_address():
    names = [name for _, name in socket.if_nameindex()]
    for name in interfaces_to("192.0.2.1"):  # where the default route leads, if any
        assert name in names
        assert name != "lo"
