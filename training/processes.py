"""The processes of a run: which of them is the first, and whether whoever started them
has started as many as the devices are.
"""

import os
from collections.abc import Mapping

from omegaconf import DictConfig

from utils import ConfigError

# What torchrun, Lightning, srun and mpirun tell a process of its place; of nodes, too.
RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"),
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK"),
)
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")


def num_processes(config: DictConfig) -> int:
    """Of the whole run."""
    return config.trainer.devices * config.trainer.num_nodes


def is_first(config: DictConfig) -> bool:
    """Whether this is the process of a run that writes its files."""
    if num_processes(config) == 1:
        return True
    return not any(_number(os.environ, name) for name in RANKS)


def is_first_of_node() -> bool:
    """Whether this is the process of its machine that says what all of them have."""
    return not any(_number(os.environ, name) for name in LOCAL_RANKS)


def has_others(config: DictConfig) -> bool:
    """Whether other processes wait for this one, or will: it must not end alone."""
    if num_processes(config) == 1:
        return False
    is_told = any(_number(os.environ, name) is not None for name in RANKS)
    return config.trainer.num_nodes > 1 or is_told


def check_processes(config: DictConfig) -> None:
    """Refuses other processes than the devices, and nodes that do not find each other.

    Each of too many would do all of it once more; too few would make smaller batches.

    Raises:
        ConfigError: With the variable that says how many were started.
    """
    wanted, trainer = num_processes(config), config.trainer
    product = (
        f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
    )
    for name, count in _started(os.environ).items():
        if count > wanted:
            raise ConfigError(
                f"{name}={count}: {count} processes were started, for {product}. Start "
                f"{wanted}, or give these keys values whose product is {count}; where "
                "only one was started, as in a batch script without srun, unset "
                f"{name}."
            )
    per_node, every = _started_by_launcher(os.environ)
    for name, found, number in ((*every, wanted), (*per_node, trainer.devices)):
        if wanted > 1 and found is not None and found != number:
            raise ConfigError(
                f"{name}={found}: {found} processes were started where {product} wants "
                f"{number}. trainer.devices is the number of processes of a node, "
                "trainer.num_nodes that of nodes; start as many by torchrun --nnodes "
                "and --nproc-per-node, or sbatch --nodes and --ntasks-per-node; in a "
                f"batch script without srun, unset {name}."
            )
    missing = [x for x in ("MASTER_ADDR", "MASTER_PORT") if x not in os.environ]
    missing += [] if {"NODE_RANK", "GROUP_RANK"} & os.environ.keys() else ["NODE_RANK"]
    if trainer.num_nodes > 1 and missing and not _is_launched(os.environ):
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}: {', '.join(missing)} not set, so "
            "that nodes do not find each other. Start every node by torchrun or srun, "
            "which set them, or set them yourself: the first node's address, a port of "
            "it that is free, and 0, 1, ... for the nodes."
        )


def check_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a Slurm job that says how many tasks it has, and not how many a node has.

    Raises:
        ConfigError: With what to give to sbatch in its place.
    """
    count = _number(environment, "SLURM_NTASKS") or 1
    is_said = "SLURM_NTASKS_PER_NODE" in environment
    is_ours = "TORCHELASTIC_RUN_ID" not in environment
    if count > 1 and is_ours and not is_said and not _is_slurm_shell(environment):
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


def _started_by_launcher(
    environment: Mapping[str, str],
) -> tuple[tuple[str, int | None], tuple[str, int | None]]:
    """Of torchrun or srun: how many processes it has started on this machine, and in
    all, by the variables that say it; None: it does not, or they were not started so.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        names = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
    elif "SLURM_PROCID" in environment and not _is_slurm_shell(environment):
        of_step = "SLURM_STEP_NUM_TASKS" in environment
        every = "SLURM_STEP_NUM_TASKS" if of_step else "SLURM_NTASKS"
        names = ("SLURM_NTASKS_PER_NODE", every)
    else:
        names = ("", "")
    one, other = ((name, _number(environment, name)) for name in names)
    return one, other


def _is_launched(environment: Mapping[str, str]) -> bool:
    """Whether nodes find each other by what started this process."""
    ranks = RANKS[RANKS.index("SLURM_PROCID") :]
    return any(name in environment for name in ("TORCHELASTIC_RUN_ID", *ranks))


def _is_slurm_shell(environment: Mapping[str, str]) -> bool:
    """Whether somebody types commands in a job of Slurm's, as Lightning tells it."""
    return environment.get("SLURM_JOB_NAME") in ("bash", "interactive")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None
