"""Folders of runs by the real command line: where they are, who may use them, what goes
on in them, on one machine and on two that share no disk.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import TINY, command, run
from nursery import ENV
from ports import free_port
from resumed import BASE, DUO_BASE, Life, last

from training.holding import holding

HERE = Path(__file__).parents[1] / "support"
SMALL = (*TINY, "algo=mdlm", "eval.generate_samples=False", "trainer.max_steps=2")
SMALL += ("trainer.val_check_interval=2", "+trainer.enable_progress_bar=False")


def errors(text: str) -> list[str]:
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def printed_command(text: str) -> tuple[Path, list[str]]:
    """Folder and overrides of the command that a stopped run has printed."""
    assert "Traceback" not in text
    (line,) = (x for x in text.splitlines() if x.startswith("stopped by"))
    place, _, words = line.partition("The command that goes on: ")[2].partition(" && ")
    overrides = shlex.split(words)
    assert overrides[1].endswith("main.py")
    return Path(shlex.split(place)[1]), overrides[2:]


def test_a_stopped_run_prints_what_goes_on(tmp_path):
    """Relative paths lead to the same places both times."""
    given = (*BASE, *DUO_BASE, "checkpointing.save_dir=my runs/one")
    options = {"pythonpath": HERE, "cwd": tmp_path}
    done = run(*given, **options, status=143, env={"STOP_AT": "7:train:15"})
    save_dir = tmp_path / "my runs" / "one"
    assert last(save_dir)["global_step"] == 8
    folder, overrides = printed_command(done.stderr)
    assert folder == tmp_path
    assert not [x for x in save_dir.rglob("*") if x.suffix in (".lock", ".partial")]
    done = run(*overrides, **options)
    assert last(save_dir)["global_step"] == 30
    assert f"{save_dir}/checkpoints" in done.stdout
    assert len(list((tmp_path / "outputs").rglob(".hydra"))) == 1


@pytest.mark.slow
def test_a_job_of_a_sweep_prints_what_goes_on(tmp_path):
    given = (*BASE, *DUO_BASE, "-m", "seed=1,2", "hydra.sweep.dir=sweep")
    options = {"pythonpath": HERE, "cwd": tmp_path}
    done = run(*given, **options, status=143, env={"STOP_AT": "7:train:15"})
    _, overrides = printed_command(done.stderr)
    run(*overrides, "trainer.max_steps=9", **options)
    assert last(tmp_path / "sweep" / "0")["global_step"] == 9


@pytest.mark.slow
def test_jobs_of_a_sweep_do_not_share_a_place(tmp_path):
    given = (*SMALL, "-m", "seed=1,2", "checkpointing.save_dir=one")
    done = run(*given, cwd=tmp_path, status=2)
    assert "that of job 0 of this sweep" in " ".join(done.stdout.split())
    assert last(tmp_path / "one")["global_step"] == 2


def test_a_folder_that_is_held_or_of_another_run(tmp_path):
    corpus = tmp_path / "a.txt"
    corpus.write_text("to be or not to be, that is it. " * 300)
    data = ("data=text_files", "data.path=a.txt", "data.tokenizer_name_or_path=bytes")
    base = [x for x in SMALL if not x.startswith("data")]
    given = (*base, *data, "data.num_proc=1", "hydra.run.dir=r", "data.cache_dir=cache")
    with holding(str(tmp_path / "r"), "key"):
        done = run(*given, cwd=tmp_path, status=2)
        (line,) = errors(done.stderr)
        assert f"process {os.getpid()} on " in line
        assert not (tmp_path / "r" / "checkpoints").exists()
    run(*given, cwd=tmp_path)
    before = (tmp_path / "r/checkpoints/last.ckpt").read_bytes()
    done = run(*given, "algo=ar", cwd=tmp_path, status=2)
    (line,) = errors(done.stderr)
    assert "is of another run: algo.name='ar' here, 'mdlm' there" in line
    corpus.write_text("completely different " * 900)
    done = run(*given, "trainer.max_steps=4", cwd=tmp_path, status=2)
    (line,) = errors(done.stderr)
    assert "is of another run: the training data differ" in line
    assert (tmp_path / "r/checkpoints/last.ckpt").read_bytes() == before
    assert (tmp_path / "cache" / "rows").is_dir()
    assert not list((tmp_path / "r").rglob("rows"))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["all", "damaged", "other"])
def test_two_nodes_without_a_shared_disk(tmp_path, lost):
    """Node 1 finds no checkpoint, one that cannot be read, or that of another run."""

    def both(status: int, *overrides: str) -> list[str]:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        argv = [*BASE, *DUO_BASE, "trainer.num_nodes=2", "loader.batch_size=4"]
        argv += overrides
        lives = []
        for node in "01":
            (tmp_path / node).mkdir(exist_ok=True)
            lives.append(Life(tmp_path / node, argv, {**place, "NODE_RANK": node}))
        assert [life.wait() for life in lives] == [status] * 2
        return [line for life in lives for line in errors(life.stderr)]

    both(0, "trainer.max_steps=10")
    shutil.rmtree(tmp_path / "1", ignore_errors=True)
    if lost == "other":
        alone = [*BASE, *DUO_BASE, "trainer.max_steps=10", "optim.lr=1e-2"]
        (tmp_path / "x").mkdir()
        assert Life(tmp_path / "x", alone, {}).wait() == 0
        shutil.copytree(tmp_path / "x/checkpoints", tmp_path / "1/checkpoints")
    elif lost == "damaged":
        (tmp_path / "1/checkpoints").mkdir(parents=True)
        (tmp_path / "1/checkpoints/last.ckpt").write_bytes(b"torn")
    before = (tmp_path / "0/checkpoints/last.ckpt").read_bytes()
    lines = both(2, "trainer.max_steps=20")
    assert len(lines) == 2
    assert len(set(lines)) == 1
    parts = {"all": "step 0", "damaged": "1/checkpoints/last.ckpt"}
    assert parts.get(lost, "disagree on what to resume") in lines[0]
    assert (tmp_path / "0/checkpoints/last.ckpt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="becomes another user"
)
def test_another_user(tmp_path):
    """May not write to our run folder nor to our cache; each is one line, status 2."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and folder.stat().st_uid == 0:
            folder.chmod(folder.stat().st_mode | 0o711)
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "ours").mkdir()
    os.chown(mine, 54321, 54321)
    (tmp_path / "a.txt").write_text("to be or not to be, that is it. " * 300)
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    data = ["data=text_files", f"data.path={tmp_path}/a.txt", "data.num_proc=1"]
    data += ["data.tokenizer_name_or_path=bytes", f"data.cache_dir={tmp_path}/ours"]
    base = [x for x in SMALL if not x.startswith("data")]
    cases = {
        "hydra.run.dir": [*SMALL, f"hydra.run.dir={tmp_path}/ours/run"],
        "checkpointing.save_dir": [
            *(*SMALL, f"hydra.run.dir={mine}/a", f"checkpointing.save_dir={tmp_path}/x")
        ],
        "data.cache_dir": [*base, *data, f"hydra.run.dir={mine}/b"],
    }
    for key, overrides in cases.items():
        done = subprocess.run(
            [*user, *command(*overrides)],
            cwd=mine,
            env=os.environ | ENV | {"HOME": str(mine), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr[-2000:]
        (line,) = errors(done.stderr)
        assert key in line
