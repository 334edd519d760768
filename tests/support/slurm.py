"""A Slurm of one machine for tests, with daemons, ports and files of its own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "runuser")
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
KillWait=60
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
    "RealMemory=1000 State=UNKNOWN"
)

# For scripts of published runs.
TINY = (
    "data=synthetic",
    "data.num_train=400",
    "data.num_valid=16",
    "model.hidden_size=16",
    "model.cond_dim=8",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.length=16",
    "loader.global_batch_size=16",
    "loader.batch_size=8",
    "loader.eval_global_batch_size=16",
    "loader.eval_batch_size=8",
    "trainer.accelerator=cpu",
    "+trainer.enable_progress_bar=False",
    "eval.generate_samples=False",
)
HERE = ("--mem=500", "--gres=none")  # this machine has neither


def reason_to_skip() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    if missing := [name for name in PROGRAMS if _find(name) is None]:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


class Slurm:
    """A running one.

    Args:
        conf: Path of its slurm.conf.
    """

    def __init__(self, conf: Path) -> None:
        self.env = os.environ | {"SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1"}

    def call(self, *command: str, **options) -> str:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, **options
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *options: str) -> str:
        """The number of the new job."""
        return self.call("sbatch", "--parsable", *options)

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.call("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str, timeout: float = 120) -> str:
        """Waits until the job is in one of some states; says which."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"{state}, waited for {states}"
            time.sleep(0.3)
        return state

    def start_now(self, job: str) -> None:
        """Slurm lets a job that came back wait for two minutes; within the second in
        which it was ended it could not start again."""
        self.wait(job, "PENDING")
        time.sleep(2)
        self.call("scontrol", "update", f"jobid={job}", "starttime=now")


@contextmanager
def running(folder: Path, num_nodes: int = 1) -> Iterator[Slurm]:
    """Starts munged, slurmctld and slurmd, and stops them at the end.

    Args:
        folder: Of their files.
        num_nodes: 2 makes this machine two nodes, `localhost` the second one.
    """
    host = socket.gethostname().split(".")[0]
    names = [host, "localhost"][:num_nodes]
    for name in ("state", "munge"):
        (folder / name).mkdir()
    # The socket's folder has to be open to all on the way there, munge's own to none.
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o711)
    munge = folder / "munge"
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    shutil.chown(munge, "munge", "munge")
    shutil.chown(munge / "key", "munge", "munge")
    munge.chmod(0o755)
    conf = folder / "slurm.conf"
    own = {"host": host, "cpus": os.cpu_count()}
    nodes = [NODE.format(name=name, port=free_port(), **own) for name in names]
    whole = {"port": free_port(), "folder": folder, "nodes": "\n".join(nodes)}
    conf.write_text(CONF.format(host=host, **whole))
    slurm = Slurm(conf)
    files = [f"--{x}-file={munge}/{x}" for x in ("key", "pid", "log", "seed")]
    munged = (_find("munged"), "--foreground", *files, f"--socket={munge}/socket")
    daemons = [
        [_find("runuser"), "-u", "munge", "--", *munged, "--force"],
        [_find("slurmctld"), "-D"],
        *([_find("slurmd"), "-D", "-N", name] for name in names),
    ]
    started = []
    try:
        for command in daemons:
            log = open(folder / f"{len(started)}.out", "w")  # noqa: SIM115
            process = subprocess.Popen(command, env=slurm.env, stdout=log, stderr=log)
            started.append(process)
            time.sleep(1)
            assert process.poll() is None, (folder / log.name).read_text()
        end = time.monotonic() + 30
        all_idle = "\n".join(["idle"] * num_nodes)
        while slurm.call("sinfo", "--noheader", "--Node", "--format=%T") != all_idle:
            assert time.monotonic() < end, slurm.call("sinfo")
            time.sleep(0.5)
        yield slurm
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=30)
