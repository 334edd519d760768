"""The processes of a run come together before they exchange anything: each waits for
the others as long as `strategy.timeout` says, and one that waited in vain ends with a
line that says who was missing and what to do.
"""

import contextlib
import logging
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from omegaconf import DictConfig, OmegaConf

from training.lifelines import Lifeline, end_alone
from training.processes import is_first_of_node, num_processes
from utils import ConfigError, RunStopped, first_line

log = logging.getLogger(__name__)

MINUTES = 30.0  # that processes wait for each other where `strategy` does not say it
PAUSE = 0.2  # seconds between two looks for other processes
SAYING = 20.0  # seconds after which a process says that it waits
INTERFACE = "GLOO_SOCKET_IFNAME"  # by which torch's own exchanges on hosts go
# What torch says where processes do not reach each other by the interface it has taken.
APART = re.compile(r"connectFullMesh|timed out connecting|Connection refused")


class Place(NamedTuple):
    """Where the processes of a run meet: on the host of the first one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.host}, MASTER_PORT={self.port}"


class Wait:
    """What a process waits for at the start of a run.

    Args:
        place: Where the processes meet.
        minutes: After how long in all it waits no more.
    """

    def __init__(self, place: Place, minutes: float) -> None:
        self._place = place
        self._minutes = minutes
        self._begun = time.monotonic()
        self._is_said = not is_first_of_node()

    def until_reached(self) -> None:
        """Waits until the first process listens.

        Raises:
            ConfigError: If it does not within the time.
        """
        reason = ""

        def is_reached() -> bool:
            nonlocal reason
            try:
                socket.create_connection(self._place, timeout=5).close()
            except OSError as error:
                reason = str(error)
            else:
                reason = ""
            return not reason

        self.until(
            is_reached,
            lambda: f"the first process is not reached ({reason})",
            "MASTER_ADDR has to be the name or address of the first node as every "
            "other one sees it, MASTER_PORT one that a firewall lets through",
        )

    def until(
        self, is_so: Callable[[], bool], now: Callable[[], str], cure: str
    ) -> None:
        """Waits until something is so.

        Args:
            is_so: Whether it is.
            now: How it is, for a line.
            cure: What the user can do.

        Raises:
            ConfigError: If it is not within the time.
        """
        while not is_so():
            passed = time.monotonic() - self._begun
            if passed > 60 * self._minutes:
                raise ConfigError(
                    f"strategy.timeout.minutes={self._minutes:g}: {now()} at "
                    f"{self._place}. {cure}; or give more time."
                )
            if passed > SAYING and not self._is_said:
                log.info("waiting: %s at %s", now(), self._place)
                self._is_said = True
            time.sleep(PAUSE)


class Joining(lightning.Callback):
    """Has processes meet when a strategy connects them, and learn when one is lost.

    Args:
        config: The run's.
        strategy: What connects them, which waits here before it does.
    """

    def __init__(self, config: DictConfig, strategy: ParallelStrategy) -> None:
        self._config = config
        self._strategy = strategy
        self._lifeline: Lifeline | None = None
        self._store: dist.TCPStore | None = None  # is there while others need it
        connect = strategy.setup_environment

        def setup_environment() -> None:
            if not dist.is_initialized():  # of an earlier trainer
                self._meet()
            with self._together():
                connect()

        vars(strategy)["setup_environment"] = setup_environment

    def teardown(
        self, trainer: lightning.Trainer, model: lightning.LightningModule, stage: str
    ) -> None:
        self._leave(is_in_order=True)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        model: lightning.LightningModule,
        error: BaseException,
    ) -> None:
        # These are raised by all processes, which end by themselves.
        self._leave(isinstance(error, RunStopped | ConfigError))

    def _leave(self, is_in_order: bool) -> None:
        if self._lifeline is not None:
            self._lifeline.close(is_in_order)
            self._lifeline = None

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Explains why processes that have met do not reach each other.

        Raises:
            ConfigError: With the variable that says by which interface they do.
        """
        try:
            yield
        except RuntimeError as error:
            self._leave(is_in_order=False)
            if not APART.search(str(error)):
                raise
            raise ConfigError(
                f"{INTERFACE}={os.environ.get(INTERFACE, '')}: the processes have met "
                "at MASTER_ADDR, but do not reach each other by this network "
                f"interface; give {INTERFACE}, and NCCL_SOCKET_IFNAME for GPUs, the "
                "one by which a node sees the others (`ip -brief address` lists "
                f"them): {first_line(error)}"
            ) from None

    # ---- coming together

    def _meet(self) -> None:
        """Waits until all processes of the run are there.

        Raises:
            ConfigError: If some are not within `strategy.timeout`.
        """
        environment: Any = self._strategy.cluster_environment
        place = Place(environment.main_address, environment.main_port)
        local = environment.local_rank()
        rank = environment.node_rank() * self._config.trainer.devices + local
        minutes = OmegaConf.select(self._config, "strategy.timeout.minutes")
        wait = Wait(place, minutes or MINUTES)
        # torchrun holds the store itself, over all its attempts to start the processes.
        is_theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if rank or is_theirs:
            wait.until_reached()
        if self._config.trainer.num_nodes > 1:
            for name in interfaces_to(place.host):
                os.environ.setdefault(INTERFACE, name)
        self._store = store = open_store(place, is_host=not (rank or is_theirs))
        came, told, count = f"joined/{attempt}", f"lifeline/{attempt}", 0
        number, trainer = num_processes(self._config), self._config.trainer

        def are_all_there() -> bool:
            nonlocal count
            count = store.add(came, 0)
            return count >= number

        def who_is_there() -> str:
            product = f"{trainer.devices} x trainer.num_nodes={trainer.num_nodes}"
            return f"{count} of trainer.devices={product} processes have come"

        cure = "Start the others, with the same two variables on every node"
        if rank == 0:
            self._lifeline = Lifeline(self._end)
            store.set(told, self._lifeline.listen())
        else:
            wait.until(lambda: store.check([told]), who_is_there, cure)
            self._hold_on(place.host, store.get(told).decode())
        count = store.add(came, 1)
        wait.until(are_all_there, who_is_there, cure)

    def _end(self) -> None:
        """Ends this process, in which something waits for one that is lost."""
        is_training = self._config.mode == "train"
        folder = self._config.checkpointing.save_dir if is_training else ""
        end_alone(is_first_of_node(), folder)

    def _hold_on(self, host: str, told: str) -> None:
        lifeline = Lifeline(self._end)
        try:
            lifeline.connect(host, told)
        except OSError as error:
            line = "a process that is lost may be noticed late: no lifeline to %s (%s)"
            log.warning(line, host, error)
        else:
            self._lifeline = lifeline


def open_store(place: Place, is_host: bool) -> dist.TCPStore:
    """The store by which torch connects processes, before torch opens it, too.

    Args:
        place: Where it is.
        is_host: Whether this process holds it.

    Raises:
        ConfigError: If the port is taken.
    """
    try:
        return dist.TCPStore(
            *place, is_master=is_host, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        if not is_host:
            raise
        raise ConfigError(
            f"{place}: this port cannot be opened ({first_line(error)}); give all "
            "nodes another MASTER_PORT."
        ) from None


def interfaces_to(host: str) -> list[str]:
    """The network interface by which other machines are reached, if it can be told.

    Torch takes the one of this machine's name, which is often that of the machine
    alone (127.0.1.1 in /etc/hosts).

    Args:
        host: One of the machines, which may be this one.
    """
    if sys.platform != "linux":
        return []
    import fcntl

    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # nothing is sent
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if answer[20:24] == own and name != "lo":
                    return [name]
    return []
