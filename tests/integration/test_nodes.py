"""Several nodes on one machine: two launchers of torchrun, and two network namespaces,
of which neither reaches the other by 127.0.0.1. What they train is what one node does;
one that is late is waited for, one that is lost ends the others, and the run goes on.

Those with Slurm are in test_slurm_nodes.py.
"""

import os
import signal
import time

import pytest
from nodes import (
    ADDRESSES,
    TORCHRUN,
    Node,
    by_hand,
    by_torchrun,
    inside,
    namespaces,
    pull_the_plug,
    torchrun_words,
)
from nodes import reason_to_skip as no_namespaces
from ports import free_port
from resumed import Life, check_same, differences, last, with_base

TWO_NODES = ("trainer.num_nodes=2", "trainer.devices=1", "loader.batch_size=4")
LINE = "error: another process of this run has ended, and this one with it"
LIMIT = 60  # seconds in which the others end when a node is lost


def check_lost(life_or_node, begun: float) -> None:
    """How a node ends that was left alone: soon, and with one line."""
    assert life_or_node.wait() == 1
    assert time.monotonic() - begun < LIMIT
    ours = [x for x in life_or_node.stderr.splitlines() if x.startswith("error: ")]
    assert len(ours) == 1
    assert ours[0].startswith(LINE)


# ---------------------------------------------------------------- by hand


def test_a_late_node_is_waited_for_and_a_lost_one_ends_the_other(tmp_path):
    """The second one is killed in its update 3; the first one says so."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"STOP_AT": "3:train:9", "STOP_RANK": "1"}
    own = [*with_base(*TWO_NODES), "eval.generate_samples=False"]
    lives = []
    for node in "01":
        time.sleep(0.5 * int(node))
        lives.append(Life(tmp_path, own, {**place, "NODE_RANK": node}))
    assert lives[1].wait() == -9
    check_lost(lives[0], time.monotonic())
    assert "Traceback" not in lives[0].stderr
    assert "on every node, by what started it: cd " in lives[0].stderr


# ---------------------------------------------------------------- torchrun


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    """The folder of a run with two processes on one node."""
    folder = tmp_path_factory.mktemp("one")
    two = ("trainer.devices=2", "loader.batch_size=4")
    life = Life.start(folder, *two)
    assert life.wait() == 0, life.stderr
    return folder


def argv_of(folder, *overrides: str) -> list[str]:
    return with_base(*TWO_NODES, f"hydra.run.dir={folder}", *overrides)


def same_end(one, two) -> None:
    """Weights, average and optimiser of two runs are the same to the bit."""
    first, second = last(one), last(two)
    for name in ("state_dict", "ema", "optimizer_states", "global_step"):
        assert differences(first[name], second[name], name) == []


@pytest.mark.slow
def test_two_nodes_by_torchrun_are_one_node(one_node, tmp_path):
    """Weights, curves and rows to the bit; the first node alone writes and speaks."""
    argv = argv_of(tmp_path / "run")
    nodes = by_torchrun(tmp_path, *argv, DATALOG=f"{tmp_path}/run/log")
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].stderr[-3000:]
    check_same(one_node, tmp_path / "run")
    assert "on cpu, 2 devices" in nodes[0].stdout
    assert nodes[1].stdout == ""
    assert [node.stderr for node in nodes] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_dies_and_the_run_goes_on(one_node, tmp_path, lost):
    """With its launcher and all its processes, in update 12; what the other one says
    is one line, beside torchrun's own report."""
    argv = argv_of(tmp_path / "run")
    place = {"STOP_AT": "12:train:19", "STOP_RANK": str(lost)}  # there it stands
    nodes = by_torchrun(tmp_path, *argv, **place)
    nodes[lost].wait_frozen()
    nodes[lost].kill()
    check_lost(nodes[1 - lost], time.monotonic())
    assert 'main.py", line' not in nodes[1 - lost].stderr  # no traceback of ours
    assert last(tmp_path / "run")["global_step"] == 10
    nodes = by_torchrun(tmp_path, *argv)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].stderr[-3000:]
    same_end(one_node, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_with_other_nodes_than_the_config_says(tmp_path):
    """Two processes of two nodes where the config wants those of one."""
    argv = [*argv_of(tmp_path / "run"), "trainer.num_nodes=1", "trainer.devices=2"]
    for node in by_torchrun(tmp_path, *argv):
        assert node.wait() == 1  # torchrun's own
        (line,) = node.errors
        assert line.startswith("error: LOCAL_WORLD_SIZE=1: 1 processes were started")
        assert 'main.py", line' not in node.stderr


# ---------------------------------------------------------------- without launchers


@pytest.mark.slow
def test_nodes_without_a_shared_folder(one_node, tmp_path):
    """Only the first one has checkpoints, a log and samples."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    lives = []
    for node in "01":
        folder = tmp_path / node
        folder.mkdir()
        lives.append(Life(folder, with_base(*TWO_NODES), {**place, "NODE_RANK": node}))
    assert [life.wait() for life in lives] == [0, 0], lives[0].stderr
    same_end(one_node, tmp_path / "0")
    names = {
        x.name for x in (tmp_path / "1").iterdir() if x.suffix not in (".out", ".err")
    }
    assert names <= {".hydra", "main.log", "log1"}


# ---------------------------------------------------------------- namespaces

NO_NAMESPACES = no_namespaces()
apart = pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))


@pytest.fixture
def two_machines():
    with namespaces():
        yield str(free_port())


def both(folder, port: str, *overrides: str, address=ADDRESSES[0], **env: str):
    argv = argv_of(folder / "run", *overrides)
    return [
        by_hand(folder, *argv, rank=rank, address=address, port=port, **env)
        for rank in range(2)
    ]


@apart
@pytest.mark.slow
def test_two_machines_are_one_node(one_node, two_machines, tmp_path):
    """Though the name of each is 127.0.0.1 to itself, which torch would tell others."""
    nodes = both(tmp_path, two_machines, DATALOG=f"{tmp_path}/run/log")
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].stderr[-3000:]
    check_same(one_node, tmp_path / "run")
    assert nodes[1].stdout == ""
    assert [node.stderr for node in nodes] == ["", ""]


@apart
@pytest.mark.slow
def test_torchrun_on_two_machines(one_node, two_machines, tmp_path):
    argv = argv_of(tmp_path / "run")
    nodes = [
        Node(
            tmp_path,
            [
                *inside(rank),
                *TORCHRUN,
                *torchrun_words(2, rank, ADDRESSES[0], two_machines),
                *argv,
            ],
            {},
        )
        for rank in range(2)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].stderr[-3000:]
    same_end(one_node, tmp_path / "run")


@apart
@pytest.mark.slow
def test_an_address_that_is_another_machine_to_each(two_machines, tmp_path):
    """127.0.0.1: both say within the time that they have waited in vain, and why."""
    minutes = "strategy.timeout.minutes=0.1"
    nodes = both(tmp_path, two_machines, minutes, address="127.0.0.1")
    assert [node.wait() for node in nodes] == [2, 2]
    first, second = (node.stderr.splitlines() for node in nodes)
    assert len(first) == len(second) == 1
    assert first[0].startswith(f"error: {minutes}: 1 of trainer.devices=1 x ")
    assert second[0].startswith(f"error: {minutes}: the first process is not reached")
    assert all("MASTER_ADDR=127.0.0.1" in line for line in (*first, *second))


@apart
@pytest.mark.slow
def test_an_interface_that_is_of_each_machine_alone(two_machines, tmp_path):
    """One of them finds it out, and both end."""
    nodes = both(tmp_path, two_machines, GLOO_SOCKET_IFNAME="lo")
    assert {node.wait() for node in nodes} <= {1, 2}
    lines = [line for node in nodes for line in node.errors]
    assert len(lines) == 2
    assert any(x.startswith("error: GLOO_SOCKET_IFNAME=lo: ") for x in lines)
    assert "Traceback" not in "".join(node.stderr for node in nodes)


@apart
@pytest.mark.slow
def test_a_cable_that_is_pulled(one_node, two_machines, tmp_path):
    """Neither hears of the other any more, and no connection is closed."""
    nodes = both(tmp_path, two_machines, STOP_AT="12:train:19", STOP_RANK="1")
    nodes[1].wait_frozen()
    begun = time.monotonic()
    pull_the_plug(1)
    check_lost(nodes[0], begun)
    assert nodes[0].stderr.count("\n") == 1
    nodes[1].kill()
    nodes[1].wait()


@apart
@pytest.mark.slow
def test_a_machine_that_only_stands_still_is_not_lost(two_machines, tmp_path):
    """Longer than a cable may be away."""
    nodes = both(tmp_path, two_machines, STOP_AT="12:train:19", STOP_RANK="1")
    nodes[1].wait_frozen()
    time.sleep(LIMIT)
    for pid in nodes[1].pids():
        os.kill(pid, signal.SIGCONT)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].stderr[-3000:]
