"""Processes of this machine as nodes: started by torchrun or by hand, and in network
namespaces, of which each has a 127.0.0.1 of its own.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from command_line import ROOT
from nursery import ENV, HERE
from ports import free_port

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ADDRESSES = ("10.231.7.1", "10.231.7.2")  # of two namespaces


class Node:
    """A command that runs, with what it says.

    Args:
        folder: Where it runs.
        command: Its words.
        env: NAME=value of its environment.
    """

    numbers = itertools.count()

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        number = next(self.numbers)
        self.paths = [folder / f"{number}.{name}" for name in ("out", "err")]
        with open(self.paths[0], "w") as out, open(self.paths[1], "w") as err:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | ENV | {"PYTHONPATH": str(HERE), "STOP_AT": ""} | env,
                stdout=out,
                stderr=err,
            )

    @property
    def stdout(self) -> str:
        return self.paths[0].read_text()

    @property
    def stderr(self) -> str:
        return self.paths[1].read_text()

    @property
    def errors(self) -> list[str]:
        return [x for x in self.stderr.splitlines() if x.startswith("error: ")]

    def wait(self, timeout: float = 240) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self.stdout[-2000:] + self.stderr[-2000:]) from None

    def kill(self) -> None:
        """All of its processes, as if the machine had lost its power."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """The command's process and those that come from it."""
        found = [self.process.pid]
        for pid in found:
            with suppress(FileNotFoundError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                found += map(int, children.split())
        return found

    def wait_frozen(self, timeout: float = 120) -> None:
        """Waits until one of its processes has been stopped, by SIGSTOP."""
        end = time.monotonic() + timeout
        while " T " not in self._states():
            assert time.monotonic() < end, self.stdout[-2000:] + self.stderr[-2000:]
            time.sleep(0.05)

    def _states(self) -> str:
        found = ""
        for pid in self.pids():
            with suppress(FileNotFoundError):
                found += Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
        return found


def by_torchrun(folder: Path, *argv: str, nodes: int = 2, **env: str) -> list[Node]:
    """As docs/training.md starts nodes, of one process each."""
    port = str(free_port())
    return [
        Node(
            folder,
            [*TORCHRUN, *torchrun_words(nodes, rank, "127.0.0.1", port), *argv],
            env,
        )
        for rank in range(nodes)
    ]


def torchrun_words(nodes: int, rank: int, address: str, port: str) -> list[str]:
    words = [f"--nnodes={nodes}", "--nproc-per-node=1", f"--node-rank={rank}"]
    words += [f"--master-addr={address}", f"--master-port={port}"]
    return [*words, str(ROOT / "main.py")]


def by_hand(
    folder: Path, *argv: str, rank: int, address: str, port: str, **env: str
) -> Node:
    """A node without a launcher, in the namespace of that number."""
    place = {"MASTER_ADDR": address, "MASTER_PORT": port, "NODE_RANK": str(rank)}
    command = [sys.executable, str(ROOT / "main.py"), *argv]
    return Node(folder, [*inside(rank), *command], place | env)


# ---------------------------------------------------------------- namespaces


def inside(number: int) -> list[str]:
    return ["ip", "netns", "exec", f"duo-node-{number}"]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def reason_to_skip() -> str | None:
    """Why there can be no namespaces; None if there can be."""
    try:
        with namespaces():
            return None
    except (AssertionError, FileNotFoundError) as error:
        return f"needs root and iproute2 for network namespaces: {error}"


@contextmanager
def namespaces() -> Iterator[None]:
    """Two that are joined by a pair of interfaces, `node0` and `node1`."""
    names = ["duo-node-0", "duo-node-1"]
    try:
        for name in names:
            ip("netns", "add", name)
        peer = ("peer", "name", "node1", "netns", names[1])
        ip("link", "add", "node0", "netns", names[0], "type", "veth", *peer)
        for number, name in enumerate(names):
            device = f"node{number}"
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", device)
            for one in ("lo", device):
                ip("-n", name, "link", "set", one, "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def pull_the_plug(number: int) -> None:
    """Nothing leaves the namespace any more, and nothing says so."""
    ip("-n", f"duo-node-{number}", "link", "set", f"node{number}", "down")
