"""Two nodes of a real Slurm, both this machine; make test-slurm."""

import shlex
import sys

import pytest
import torch
from command_line import command
from nodes import TORCHRUN
from nursery import ENV, HERE, ROOT
from ports import free_port
from resumed import Life, check_same, differences, last, with_base
from slurm import HERE as NEITHER
from slurm import TINY, reason_to_skip, running

REASON = reason_to_skip()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

TWO_NODES = ("trainer.num_nodes=2", "trainer.devices=1", "loader.batch_size=4")
NODES = ("--nodes=2", "--ntasks-per-node=1")
LINE = "error: another process of this run has ended, and this one with it"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with running(tmp_path_factory.mktemp("slurm"), num_nodes=2) as found:
        found.env |= ENV | {"PYTHON": sys.executable, "WANDB_MODE": "disabled"}
        found.env["PYTHONPATH"] = str(HERE)
        yield found


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    """The folder of a run with two processes that Slurm has nothing to do with."""
    folder = tmp_path_factory.mktemp("one")
    life = Life.start(folder, "trainer.devices=2", "loader.batch_size=4")
    assert life.wait() == 0, life.stderr
    return folder


def argv_of(folder) -> list[str]:
    return with_base(*TWO_NODES, f"hydra.run.dir={folder}")


def run(slurm, folder, words: str, **env: str) -> tuple[str, str]:
    """The state that a job ends in, and what it has said."""
    log = folder / "log"
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in env.items())])
    options = (f"--output={log}", "--open-mode=truncate", f"--export={export}")
    job = slurm.submit(*NODES, *options, f"--wrap={words}")
    return slurm.wait(job, "COMPLETED", "FAILED", timeout=240), log.read_text()


def same_end(one, two) -> None:
    first, second = last(one), last(two)
    for name in ("state_dict", "ema", "optimizer_states", "global_step"):
        assert differences(first[name], second[name], name) == []


def test_two_nodes_by_srun_are_one_node(slurm, one_node, tmp_path):
    (tmp_path / "run").mkdir()
    words = f"srun {shlex.join(command(*argv_of(tmp_path / 'run')))}"
    state, text = run(slurm, tmp_path, words, DATALOG=f"{tmp_path}/run/log")
    assert state == "COMPLETED", text[-3000:]
    assert text.count("on cpu, 2 devices") == 1
    assert text.count("step 30: wrote") == 1
    check_same(one_node, tmp_path / "run")


def test_two_nodes_by_srun_and_torchrun_are_one_node(slurm, one_node, tmp_path):
    """One launcher a node; what Slurm says of its tasks is of the launchers."""
    meet = f"$(scontrol show hostnames | head -n 1):{free_port()}"
    torchrun = (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d")
    words = (
        f"srun {shlex.join(torchrun)} --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint={meet}"
    )
    words += f" {shlex.join(command(*argv_of(tmp_path / 'run'))[1:])}"
    state, text = run(slurm, tmp_path, words)
    assert state == "COMPLETED", text[-3000:]
    same_end(one_node, tmp_path / "run")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_dies_and_the_job_goes_on(slurm, one_node, tmp_path, lost):
    """The task of the other node ends by itself; the same job ends as if nothing had
    been."""
    words = f"srun {shlex.join(command(*argv_of(tmp_path / 'run')))}"
    place = {"STOP_AT": "12:train:9", "STOP_RANK": str(lost)}
    state, text = run(slurm, tmp_path, words, **place)
    assert state == "FAILED"
    assert len([x for x in text.splitlines() if x.startswith(LINE)]) == 1
    assert "Traceback" not in text
    state, text = run(slurm, tmp_path, words)
    assert state == "COMPLETED", text[-3000:]
    same_end(one_node, tmp_path / "run")


def test_a_node_that_does_not_come(slurm, tmp_path):
    """Two nodes in the config and in the job, of which srun is told to start one."""
    own = [*argv_of(tmp_path / "run"), "strategy.timeout.minutes=0.1"]
    words = f"srun --nodes=1 --ntasks=1 {shlex.join(command(*own))}"
    state, text = run(slurm, tmp_path, words)
    assert state == "FAILED"
    (line,) = (x for x in text.splitlines() if x.startswith("error: SLURM"))
    assert "=1: 1 processes were started where trainer.devices=1 x " in line


def test_a_script_on_two_nodes(slurm, tmp_path):
    """As scripts/README.md says it."""
    log = tmp_path / "log"
    slurm.env |= {"DUO_ENV": "/dev/null", "RUN_DIR": str(tmp_path / "run")}
    options = (*NEITHER, *NODES, f"--output={log}", "scripts/train_owt_mdlm.sh")
    few = ("trainer.max_steps=4", "trainer.val_check_interval=4")
    job = slurm.call("sbatch", "--parsable", *options, *TINY, *few, cwd=ROOT)
    state = slurm.wait(job, "COMPLETED", "FAILED", timeout=240)
    assert state == "COMPLETED", log.read_text()[-3000:]
    assert "on cpu, 2 devices" in log.read_text()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 4
