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
    for name in ("NTASKS", "STEP_NUM_TASKS", "JOB_NAME"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
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
    for count in range(1, devices * nodes + 1):
        environment(name, str(count))
        check_processes(config)
    environment(name, str(devices * nodes + 1))
    parts = (f"{name}={devices * nodes + 1}", f"trainer.devices={devices} x ")
    refused(partial(check_processes, config), *parts, f"trainer.num_nodes={nodes}")


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
