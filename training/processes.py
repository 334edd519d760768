"""The processes of a run: which of them is the first, and whether whoever started them
has started too many.
"""

import os
from collections.abc import Mapping

from omegaconf import DictConfig

from utils import ConfigError

# What srun, torchrun, mpirun and Lightning tell a process of its place; of nodes, too.
RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"),
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK"),
)
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")


def num_processes(config: DictConfig) -> int:
    """Of the whole run."""
    return config.trainer.devices * config.trainer.num_nodes


def is_first(config: DictConfig) -> bool:
    """Whether this is the process of a run that writes its files."""
    if num_processes(config) == 1:
        return True
    return not any(_number(os.environ, name) for name in RANKS)


def has_others(config: DictConfig) -> bool:
    """Whether other processes wait for this one, or will: it must not end alone."""
    if num_processes(config) == 1:
        return False
    is_told = any(_number(os.environ, name) is not None for name in RANKS)
    return config.trainer.num_nodes > 1 or is_told


def check_processes(config: DictConfig) -> None:
    """Refuses more processes than devices: each would do all of it once more.

    Raises:
        ConfigError: With the variable that says how many were started.
    """
    wanted = num_processes(config)
    for name, count in _started(os.environ).items():
        if count > wanted:
            raise ConfigError(
                f"{name}={count}: {count} processes were started, for "
                f"trainer.devices={config.trainer.devices} x "
                f"trainer.num_nodes={config.trainer.num_nodes}. Start {wanted}, or "
                f"give these keys values whose product is {count}; where only one was "
                f"started, as in a batch script without srun, unset {name}."
            )


def check_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a Slurm job that says how many tasks it has, and not how many a node has.

    Raises:
        ConfigError: With what to give to sbatch in its place.
    """
    count = _number(environment, "SLURM_NTASKS") or 1
    is_said = "SLURM_NTASKS_PER_NODE" in environment
    if count > 1 and not is_said and not _is_slurm_shell(environment):
        raise ConfigError(
            f"SLURM_NTASKS={count}: give sbatch --ntasks-per-node=N in the place of "
            "--ntasks, one task for each device of a node."
        )


def _started(environment: Mapping[str, str]) -> dict[str, int]:
    """How many processes were started, by the variable that says it."""
    names = list(COUNTS)
    if "SLURM_PROCID" in environment and not _is_slurm_shell(environment):
        of_step = "SLURM_STEP_NUM_TASKS" in environment
        names.append("SLURM_STEP_NUM_TASKS" if of_step else "SLURM_NTASKS")
    counts = {name: _number(environment, name) for name in names}
    return {name: count for name, count in counts.items() if count is not None}


def _is_slurm_shell(environment: Mapping[str, str]) -> bool:
    """Whether somebody types commands in a job of Slurm's, as Lightning tells it."""
    return environment.get("SLURM_JOB_NAME") in ("bash", "interactive")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None
