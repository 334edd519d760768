"""The wheel, installed in a fresh environment and used away from the clone: `make
test-wheel`. The package index has to be within reach."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from command_line import ROOT, TINY
from nursery import ENV

pytestmark = pytest.mark.slow

SHORT = (
    *TINY,
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "sampling.steps=2",
)
CHECKPOINT = "eval.checkpoint_path=run/checkpoints/last.ckpt"
SAMPLED = (
    *("algo=mdlm", "mode=sample_eval", CHECKPOINT),
    *("loader.eval_batch_size=4", "eval.gen_ppl_eval_model_name_or_path=null"),
)
PLUG_IN = """
from algo import MDLM
from utils import one_line


class Mine(MDLM):
    note = one_line("a  subclass")
"""

NOTE = """
import duo
from sampling.predictors import Ancestral


@duo.sampler("mine")
class Mine(Ancestral):
    pass


model = duo.load("run", device="cpu")
print(len(model.sample(2, steps=2, predictor="mine")), "texts")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the clone, because a build leaves files where it runs."""
    copy = tmp_path_factory.mktemp("tree") / "clone"
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "*.egg-info", "outputs", "multirun", "cases"
    )
    return shutil.copytree(ROOT, copy, ignore=unwanted)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(tree))
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """Where the commands of the environment are that has the wheel installed."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = folder / "pins.txt"  # pip wants no extras in it
    pins.write_text(re.sub(r"\[\w+\]", "", (ROOT / "requirements.txt").read_text()))
    pip(str(folder / "bin" / "python"), "install", "-c", str(pins), str(wheel))
    return folder / "bin"


@pytest.fixture(scope="module")
def start(bin_folder, tmp_path_factory):
    """Runs an installed command in a folder with nothing in it but the plug-in."""
    workplace = tmp_path_factory.mktemp("workplace")
    (workplace / "mine.py").write_text(PLUG_IN)
    (workplace / "my_configs" / "algo").mkdir(parents=True)
    config = "defaults: [mdlm, _self_]\n_target_: mine.Mine\n"
    (workplace / "my_configs" / "algo" / "mine.yaml").write_text(config)

    def run(name: str, *arguments: str, status: int = 0, **env: str):
        done = subprocess.run(
            [str(bin_folder / name), *arguments],
            cwd=workplace,
            env=clean(os.environ) | ENV | {"PYTHONPATH": ""} | env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    run.workplace = workplace
    return run


@pytest.fixture(scope="module")
def trained(start):
    """A folder in which two steps were trained."""
    done = start("discrete-diffusion", "algo=mdlm", *SHORT, "hydra.run.dir=run")
    assert "val/ppl" in done.stdout
    return start.workplace


def pip(python: str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", *arguments],
        env=clean(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """Without what would lead a new environment to this one's packages."""
    return {x: env[x] for x in env if x not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_the_wheel_has_all_that_runs_and_what_is_imported(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    packages = {path.parent for path in ROOT.glob("*/__init__.py")}
    packages -= {ROOT / "benchmarks", ROOT / "duo"}
    files = {*ROOT.glob("*.py"), ROOT / "report" / "published_results.csv"}
    files |= {ROOT / "report" / "viewer.html"}
    files |= {path for folder in packages for path in folder.rglob("*.py")}
    files |= set((ROOT / "configs").rglob("*.yaml"))
    expected = {f"discrete_diffusion/{path.relative_to(ROOT)}" for path in files}
    expected |= {str(x.relative_to(ROOT)) for x in (ROOT / "duo").glob("*.py")}
    assert names - about == expected


def test_a_trained_checkpoint_is_sampled_from_and_exported(start, trained):
    done = start("discrete-diffusion", *SAMPLED, *SHORT, "hydra.run.dir=samples")
    assert "entropy" in done.stdout
    start("discrete-diffusion", "mode=export", CHECKPOINT, "export.path=exported")
    names = {path.name for path in (trained / "exported").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert "modeling_discrete_diffusion.py" in names  # copied from the installed one


def test_two_processes(start, trained):
    """The second one is started by Lightning, from what it takes for this program."""
    two = ("trainer.devices=2", "trainer.max_steps=4", "hydra.run.dir=two")
    done = start("discrete-diffusion", "algo=mdlm", *SHORT, *two)
    assert "val/ppl" in done.stdout
    assert "on cpu, 2 devices" in done.stdout + done.stderr


def test_a_report_starts_evaluations(start, trained):
    overrides = [x for x in TINY if not x.startswith(("data=", "sampling"))]
    start(
        "discrete-diffusion",
        *("mode=report", "report.table=test_ppl", "report.path=report"),
        f"+report.checkpoints.mdlm={trained}/run/checkpoints/last.ckpt",
        *("report.data=[synthetic]", f"report.overrides={overrides}"),
        "hydra.run.dir=reported",
    )
    assert list(trained.glob("report/runs/test_ppl/mdlm-synthetic-*.json"))


def test_an_algorithm_of_the_users_own(start):
    """Its file is beside the user's data and says `from algo import MDLM`."""
    start(
        "discrete-diffusion",
        *("hydra.searchpath=[file://my_configs]", "algo=mine", *SHORT),
        "hydra.run.dir=mine",
        PYTHONPATH=".",
    )


def test_a_notebook_finds_it(start, trained):
    """From a folder of the user's own, with a plug-in in it."""
    (trained / "note.py").write_text(NOTE)
    done = start("python", "note.py")
    assert done.stdout.splitlines()[-1] == "2 texts"


def test_the_config_is_printed(start):
    done = start("discrete-diffusion", "algo=mdlm", "--cfg", "job")
    assert "_target_: algo.MDLM" in done.stdout


def test_a_mistake_costs_one_line(start):
    done = start("discrete-diffusion", "data=text9", status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "'text8'" in line


def test_tables_of_the_operator(start):
    start("discrete-diffusion-operator", "--vocab_size=9", "--folder=tables")
    assert (start.workplace / "tables" / "vocab_9.npz").exists()


def test_the_harness_says_what_it_needs(start):
    """lm_eval is in the extra `eval`, and this environment has no extra."""
    done = start("discrete-diffusion-harness", "--tasks", "arc_easy", status=2)
    (line,) = done.stderr.splitlines()
    assert "pip install lm_eval" in line


def test_a_torch_that_is_there_stays(wheel, tmp_path):
    """The oldest torch that is allowed, as far as pip can tell."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    torch = packages / "torch-2.11.0+cu128.dist-info"
    torch.mkdir()
    about = "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu128\n"
    (torch / "METADATA").write_text(about)
    (torch / "INSTALLER").write_text("pip\n")
    report = tmp_path / "report.json"
    dry_run = ("--dry-run", "--report", str(report))
    pip(str(python), "install", *dry_run, str(wheel))
    wanted = {x["metadata"]["name"] for x in json.loads(report.read_text())["install"]}
    assert "lightning" in wanted
    assert "torch" not in wanted
