"""Which process is the first one of a run, and how many there may be."""

from functools import partial

import pytest
from refusals import refused

from training import processes
from training.processes import COUNTS, RANKS, check_processes, has_others, is_first


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nobody has started this process but the user."""
    for name in (*RANKS, *COUNTS):
        monkeypatch.delenv(name, raising=False)
    for name in ("NTASKS", "STEP_NUM_TASKS", "JOB_NAME", "NTASKS_PER_NODE"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def config_of(compose, devices: int, nodes: int = 1):
    return compose(f"trainer.devices={devices}", f"trainer.num_nodes={nodes}")


@pytest.mark.parametrize("name", [*COUNTS, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_more_processes_than_devices_are_refused(
    compose, environment, name, devices, nodes
):
    config = config_of(compose, devices, nodes)
    environment("SLURM_PROCID", "0")
    environment(name, str(devices * nodes))
    check_processes(config)
    environment(name, str(devices * nodes + 1))
    parts = (f"{name}={devices * nodes + 1}", f"trainer.devices={devices} x ")
    refused(partial(check_processes, config), *parts, f"trainer.num_nodes={nodes}")


@pytest.mark.parametrize(
    "launcher", [("SLURM_PROCID", "0"), ("TORCHELASTIC_RUN_ID", "x")]
)
def test_fewer_processes_than_devices_are_refused(compose, environment, launcher):
    """They would train with smaller batches than the config says."""
    environment(*launcher)
    name = "SLURM_NTASKS" if launcher[0] == "SLURM_PROCID" else "WORLD_SIZE"
    environment(name, "3")
    config = config_of(compose, 2, 2)
    refused(partial(check_processes, config), f"{name}=3", "wants 4", f"unset {name}")
    environment(name, "4")
    check_processes(config)


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("SLURM_PROCID", ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS")),
        ("TORCHELASTIC_RUN_ID", ("LOCAL_WORLD_SIZE", "WORLD_SIZE")),
    ],
)
def test_nodes_have_as_many_processes_as_devices(compose, environment, launcher, names):
    """Two of one node are not two nodes, and the other way round."""
    environment(launcher, "0")
    per_node, every = names
    environment(every, "2")
    environment(per_node, "2")
    check_processes(config_of(compose, 2, 1))
    two_nodes = config_of(compose, 1, 2)
    refused(partial(check_processes, two_nodes), f"{per_node}=2", "wants 1")
    environment(per_node, "1")
    check_processes(two_nodes)


def test_nodes_that_nothing_brings_together_are_refused(compose, environment):
    """Each would wait for the others at an address and a port of its own."""
    two_nodes = config_of(compose, 1, 2)
    refused(
        partial(check_processes, two_nodes),
        "trainer.num_nodes=2: MASTER_ADDR, MASTER_PORT, NODE_RANK not set",
    )
    environment("MASTER_ADDR", "10.0.0.1")
    environment("MASTER_PORT", "29500")
    refused(partial(check_processes, two_nodes), "=2: NODE_RANK not set")
    environment("NODE_RANK", "0")
    check_processes(two_nodes)


def test_slurm_and_mpi_bring_nodes_together(compose, environment):
    environment("OMPI_COMM_WORLD_RANK", "0")
    check_processes(config_of(compose, 1, 2))


def test_the_first_process_of_a_node(environment):
    assert processes.is_first_of_node()
    environment("RANK", "8")
    environment("LOCAL_RANK", "0")
    assert processes.is_first_of_node()
    environment("SLURM_LOCALID", "1")
    assert not processes.is_first_of_node()


def test_the_tasks_of_a_step_and_not_of_its_job(compose, environment):
    environment("SLURM_PROCID", "0")
    environment("SLURM_NTASKS", "8")
    environment("SLURM_STEP_NUM_TASKS", "1")
    check_processes(config_of(compose, 1))


@pytest.mark.parametrize("shell", ["bash", "interactive"])
def test_a_shell_in_a_job_starts_one(compose, environment, shell):
    environment("SLURM_PROCID", "0")
    environment("SLURM_NTASKS", "8")
    environment("SLURM_JOB_NAME", shell)
    check_processes(config_of(compose, 1))


def test_an_allocation_alone_has_started_nothing(compose, environment):
    environment("SLURM_NTASKS", "8")  # of salloc
    check_processes(config_of(compose, 1))


@pytest.mark.parametrize("text", ["", "many", "-1"])
def test_what_is_no_number_says_nothing(compose, environment, text):
    environment("WORLD_SIZE", text)
    environment("RANK", text)
    check_processes(config_of(compose, 1))
    assert is_first(config_of(compose, 2))


@pytest.mark.parametrize("name", RANKS)
def test_the_first_process(compose, environment, name):
    two = config_of(compose, 1, 2)
    assert is_first(two)
    environment(name, "0")
    assert is_first(two)
    environment(name, "1")
    assert not is_first(two)
    assert is_first(config_of(compose, 1))  # each of two would train alone


def test_who_has_others(compose, environment):
    """Lightning starts those of one node when training begins, and not before."""
    assert not has_others(config_of(compose, 1))
    assert not has_others(config_of(compose, 2))
    assert has_others(config_of(compose, 1, 2))
    environment("LOCAL_RANK", "0")
    assert has_others(config_of(compose, 2))
    assert not has_others(config_of(compose, 1))
    assert processes.num_processes(config_of(compose, 2, 3)) == 6
