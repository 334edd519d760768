"""Scripts of scripts/: what each asks Slurm for and gives to main.py, against the table
of published settings; what they refuse; and each for two steps at a tiny size.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from command_line import run
from nursery import ENV, ROOT
from recorder import (
    FOLDER,
    SCRIPTS,
    TABLE,
    parsed,
    path_of,
    placeholders,
    record,
    required,
    variables,
)
from stand_ins import write_documents

from cli.settle import check_batches

DATASETS = (
    "ag_news",
    "scientific_papers_pubmed",
    "scientific_papers_arxiv",
    "lambada",
    "wikitext2",
    "wikitext103",
    "ptb",
    "lm1b-gpt2",
)
ZERO_SHOT = [name for name in SCRIPTS if name.startswith("zero_shot")]
SINGLE = [name for name in SCRIPTS if name not in ZERO_SHOT]
IMAGES = [name for name in SCRIPTS if "cifar10" in name]
STRANGE = "/some where/a=b,c/it's \\[x]\\"  # a path that Hydra would read otherwise


def listed(script: str, values: dict[str, str]) -> dict[str, str]:
    """Key -> value of a script's overrides in the table, its variables filled in."""
    found = {}
    for key, text in parsed(TABLE[script]["overrides"].split()).items():
        for name in sorted(placeholders(text), key=len, reverse=True):
            text = text.replace(f"${name}", values[name])
        found[key] = text
    return found


def has_mode(script: str, mode: str) -> bool:
    return parsed(TABLE[script]["overrides"].split()).get("mode", "train") == mode


def header(script: str) -> dict[str, str]:
    """Option -> value of the #SBATCH lines."""
    lines = path_of(script).read_text().splitlines()
    words = " ".join(
        x.removeprefix("#SBATCH") for x in lines if x.startswith("#SBATCH")
    )
    return options(words)


def options(words: str) -> dict[str, str]:
    """`-N 1 --mem=5 --requeue` or `-N 1 --mem 5 --requeue`, value by option."""
    found = re.findall(r"(--?[\w-]+)(?:[ =]([^-\s]\S*))?", words)
    said = " ".join(f"{option} {value}".strip() for option, value in found)
    assert said == " ".join(words.replace("=", " ").split())  # all of it
    return dict(found)


def as_sbatch(script: str, folder, *arguments: str, submitted=ROOT, **env: str):
    """Runs a script as Slurm does, from a copy in its spool folder."""
    spool = folder / "spool"
    spool.mkdir(exist_ok=True)
    copy = shutil.copy(path_of(script), spool / "slurm_script")
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": header(script)["-N"],
        "SLURM_NTASKS_PER_NODE": header(script)["--ntasks-per-node"],
        "SLURM_SUBMIT_DIR": str(submitted),
    }
    return record(copy, *arguments, folder=folder, **(job | env))


# ---------------------------------------------------------------- the files


def test_every_script_is_there():
    assert set(SCRIPTS) == set(TABLE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one(script):
    """It can be started, parses, knows its name, and begins as all the others do."""
    path = path_of(script)
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH ")
    assert text.endswith('  "$@"\n')
    preamble = re.search(r"^set -euo pipefail\n.*?launch\.sh\" ", text, re.M | re.S)[0]
    first = path_of(SCRIPTS[0]).read_text()
    assert preamble in first
    assert text.split(preamble)[1].splitlines()[0] == script


@pytest.mark.parametrize("script", SCRIPTS)
def test_resources_are_the_published_ones(script):
    """And a job may come back; one that trains has time to save before its limit."""
    expected = options(TABLE[script].get("slurm", ""))
    expected |= {"--open-mode": "append", "--requeue": ""}
    if has_mode(script, "train"):
        expected["--signal"] = "USR1@120"
    given = header(script)
    if "slurm" not in TABLE[script]:  # nothing is published
        for option in ("-N", "--ntasks-per-node", "--gres"):
            expected[option] = given[option]
    assert given == expected
    assert given["--gres"] == f"gpu:{given['--ntasks-per-node']}"


def test_shellcheck_has_nothing_to_say():
    beside = os.path.dirname(sys.executable)  # requirements.txt installs it
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck")
    done = subprocess.run(
        [shellcheck, "--external-sources", *sorted(FOLDER.rglob("*.sh"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout + done.stderr == ""


def test_no_site_is_named():
    """Folders of a cluster, its partitions and accounts are the user's to give."""
    site = r"/(home|share|scratch|mnt|work)\b|--(partition|account|constraint|qos)"
    found = {
        str(path.relative_to(ROOT)): match[0]
        for folder in ("scripts", "configs")
        for path in (ROOT / folder).rglob("*.*")
        if path.name != "env.sh" and (match := re.search(site, path.read_text()))
        if path.suffix != ".md"
    }
    assert found == {}


# ---------------------------------------------------------------- what they run


@pytest.mark.parametrize("script", SINGLE)
def test_overrides_are_the_published_ones(script, tmp_path, compose):
    """With the variables' defaults, as Slurm starts it; main.py accepts them all."""
    values = dict.fromkeys(required(script), STRANGE) | variables(script)
    paths = dict.fromkeys(required(script), STRANGE)
    ran = as_sbatch(script, tmp_path, **paths)
    assert (ran.status, ran.said) == (0, "")
    words = ran.overrides()
    given, expected = parsed(words), listed(script, values)
    folder = given.pop("hydra.run.dir")
    is_below = str(tmp_path / "outputs")
    if published := expected.pop("hydra.run.dir", None):
        assert folder == os.path.normpath(tmp_path / published)
    assert folder.startswith(is_below)
    devices = header(script)["--ntasks-per-node"]
    machines = {"trainer.num_nodes": "1", "trainer.devices": devices}
    assert given == machines | expected
    assert ran.srun.startswith(f"--job-name={script.split('/')[-1]} recorder -u ")
    config = compose(*words, tiny=False)
    check_batches(config)


@pytest.mark.parametrize("script", [x for x in SINGLE if variables(x)])
def test_variables_come_from_the_environment(script, tmp_path):
    """All of them, and runs with different ones do not share a folder."""
    paths = dict.fromkeys(required(script), "/a")
    default = record(path_of(script), folder=tmp_path, **paths)
    values = {name: str(i + 3) for i, name in enumerate(variables(script))} | paths
    ran = record(path_of(script), folder=tmp_path, **values)
    given, expected = parsed(ran.overrides()), listed(script, values)
    folder = given.pop("hydra.run.dir")
    assert folder != parsed(default.overrides())["hydra.run.dir"]
    assert given == expected  # nothing of devices: Lightning counts them


@pytest.mark.parametrize("script", [x for x in SCRIPTS if required(x)])
def test_a_missing_variable_is_named(script, tmp_path):
    """Before Python starts."""
    for name in required(script):
        others = {x: "/a" for x in required(script) if x != name}
        ran = record(path_of(script), folder=tmp_path, **others)
        assert ran.status == 2
        assert ran.calls == []
        (line,) = ran.said.splitlines()
        assert line.startswith(f"error: {name} is not set; for example: {name}=")
        assert line.endswith(f"sbatch scripts/{script}.sh")


def test_arguments_of_a_script_come_last(tmp_path):
    ran = record(
        path_of("train_owt_mdlm"), "trainer.max_steps=10", "seed=2", folder=tmp_path
    )
    assert ran.overrides()[-2:] == ["trainer.max_steps=10", "seed=2"]


@pytest.mark.parametrize("script", ZERO_SHOT)
def test_zero_shot_runs_over_all_data(script, tmp_path):
    """Each in a folder of its own; a table at the end, outside of srun."""
    ran = as_sbatch(script, tmp_path, checkpoint_path=STRANGE)
    assert (ran.status, ran.said) == (0, "")
    *runs, report = map(parsed, ran.calls)
    assert [x["data"] for x in runs] == list(DATASETS)
    top = tmp_path / "outputs" / script
    expected = listed(script, {"checkpoint_path": STRANGE})
    for given in runs:
        name = given["data"]
        assert given == expected | {
            "data": name,
            "hydra.run.dir": f"{top}/{name}",
            "eval.results_path": f"{top}/{name}/likelihood.json",
            "trainer.num_nodes": "1",
            "trainer.devices": "1",
        }
    assert report == {
        "mode": "report",
        "report.table": "zero_shot",
        "report.runs": f"['{top}']",
        "report.path": f"{top}/report",
        "hydra.run.dir": f"{top}",
    }
    assert ran.srun.count("recorder") == len(DATASETS)


@pytest.mark.parametrize("script", ZERO_SHOT)
def test_zero_shot_composes(script, tmp_path, compose):
    ran = record(path_of(script), folder=tmp_path, checkpoint_path="a")
    for call in ran.calls:
        check_batches(compose(*call, tiny=False))


def test_zero_shot_of_local_copies(tmp_path, compose):
    """As scripts/README.md has it: a folder for each data set."""
    source = "data.source=/copies/${data.valid}"
    assert source in (FOLDER / "README.md").read_text()
    path = path_of("zero_shot_duo")
    *calls, _ = record(path, source, folder=tmp_path, checkpoint_path="a").calls
    found = [compose(*call, tiny=False).data.source for call in calls]
    assert found == [f"/copies/{name.removesuffix('-gpt2')}" for name in DATASETS]


def test_zero_shot_goes_on_after_a_failure(tmp_path):
    ran = record(
        path_of("zero_shot_duo"),
        folder=tmp_path,
        checkpoint_path="a",
        datasets="ptb lambada",
        STATUS="3",
    )
    assert ran.status == 3
    assert [x.get("data") for x in map(parsed, ran.calls)] == ["ptb", "lambada", None]
    failures = [f"error: {name} failed with status 3" for name in ("ptb", "lambada")]
    assert ran.said.splitlines() == failures


# ---------------------------------------------------------------- the preamble


def test_nodes_and_tasks_are_those_of_the_job(tmp_path):
    ran = as_sbatch(
        "train_owt_duo",
        tmp_path,
        SLURM_NNODES="2",
        SLURM_NTASKS_PER_NODE="4",
        SLURM_CPUS_PER_TASK="6",
    )
    given = parsed(ran.overrides())
    assert given["trainer.num_nodes"] == "2"
    assert given["trainer.devices"] == "4"
    assert ran.srun.startswith("--job-name=train_owt_duo --cpus-per-task=6 recorder")


def test_a_task_of_a_step_starts_no_step(tmp_path):
    """srun --pty bash, and the script in it."""
    ran = as_sbatch(
        "train_owt_duo", tmp_path, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1"
    )
    assert ran.srun == ""
    assert "trainer.devices" not in parsed(ran.overrides())


def test_several_at_once_are_refused(tmp_path):
    """srun scripts/NAME.sh"""
    ran = as_sbatch(
        "train_owt_duo", tmp_path, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8"
    )
    assert (ran.status, len(ran.calls), ran.said.count("\n")) == (2, 0, 1)
    assert "sbatch" in ran.said


def test_a_job_from_elsewhere_needs_the_repository(tmp_path):
    name = "psi_samplers/owt/duo_loop_remdm"
    paths = dict.fromkeys(required(name), "/a")
    ran = as_sbatch(name, tmp_path, submitted=tmp_path, **paths)
    assert ran.status != 0
    assert ran.calls == []
    assert ran.said.endswith("run sbatch in the repository, or set DUO_REPO\n")
    ran = as_sbatch(name, tmp_path, submitted=tmp_path, DUO_REPO=str(ROOT), **paths)
    assert (ran.status, len(ran.calls)) == (0, 1)


def test_settings_of_a_site(tmp_path):
    """A file of them, over which the command line wins where the file says so."""
    settings = tmp_path / "site.sh"
    settings.write_text(
        ': "${checkpoint_path:=/from file}"\n'
        ': "${DUO_OUTPUTS:=/big}"\n'
        "false\n"  # as in what sets up an environment
        "unset nothing; : $nothing\n"
        'export DUO_CACHE_DIR="/cache"\n'
    )
    path, env = path_of("eval_owt_duo"), {"DUO_ENV": str(settings)}
    given = parsed(record(path, folder=tmp_path, **env).overrides())
    assert given["eval.checkpoint_path"] == "/from file"
    assert given["hydra.run.dir"] == "/big/eval_owt_duo"
    env |= {"checkpoint_path": "mine", "DUO_OUTPUTS": "here", "RUN_DIR": "that"}
    given = parsed(record(path, folder=tmp_path, **env).overrides())
    assert given["eval.checkpoint_path"] == "mine"
    assert given["hydra.run.dir"] == f"{tmp_path}/that"
    ran = record(path_of(IMAGES[0]), folder=tmp_path, **env, CHECKPOINT_PATH="a")
    assert parsed(ran.overrides())["data.cache_dir"] == "/cache"


@pytest.mark.parametrize("variable", ["PYTHON", "DUO_ENV"])
def test_what_is_not_there_is_named(variable, tmp_path):
    wrong = {variable: "/not/there"}
    ran = record(path_of("train_owt_ar"), folder=tmp_path, **wrong)
    assert (ran.status, ran.calls) == (2, [])
    assert ran.said.startswith(f"error: {variable}=/not/there is not ")
    assert ran.said.count("\n") == 1


@pytest.mark.parametrize("active", [{}, {"VIRTUAL_ENV": "/v"}, {"CONDA_PREFIX": "/c"}])
def test_an_environment_in_the_repository_is_used(active, tmp_path):
    """And settings beside the scripts are; an active environment stays."""
    repository = tmp_path / "a repository"
    shutil.copytree(FOLDER, repository / "scripts")
    (repository / "scripts" / "env.sh").write_text("echo settings >&2\n")
    if "CONDA_PREFIX" in active:
        active = active | {"CONDA_DEFAULT_ENV": "mine"}
    for folder, name in ((repository / ".venv" / "bin", "own"), (tmp_path, "other")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "python").write_text(f'#!/bin/sh\necho {name} "$2" >&2\n')
        (folder / "python").chmod(0o755)
    activate = repository / ".venv" / "bin" / "activate"
    activate.write_text(f'PATH="{activate.parent}:$PATH"\n')
    done = subprocess.run(
        ["scripts/train_owt_ar.sh"],
        cwd=repository,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | active,
        capture_output=True,
        text=True,
    )
    python = "other" if active else "own"
    assert done.stderr.splitlines() == ["settings", f"{python} {repository}/main.py"]


# ---------------------------------------------------------------- each for two steps

TINY = (
    "model.hidden_size=16",
    "model.cond_dim=8",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.length=16",
    "loader.global_batch_size=4",
    "loader.batch_size=2",
    "loader.eval_global_batch_size=4",
    "loader.eval_batch_size=4",
    "loader.num_workers=0",
    "lr_scheduler.num_warmup_steps=1",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.num_sanity_val_steps=0",
    "+trainer.enable_progress_bar=False",
    "sampling.steps=2",
    "sampling.num_sample_batches=1",
    "eval.gen_ppl_eval_model_name_or_path=null",
)
OFF = {"WANDB_MODE": "disabled"}
QUICK = ("train_owt_duo", "eval_owt_duo", "gen_ppl_owt_duo")
QUICK += ("zero_shot_duo", "train_cifar10_mdlm_cosine")


def one_in_a_few(names):
    slow = pytest.mark.slow
    return [x if x in QUICK else pytest.param(x, marks=slow) for x in names]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Overrides that make a script's run tiny, with files in the place of the hub."""
    source = write_documents(tmp_path_factory.mktemp("data"), num=20)
    cache = tmp_path_factory.mktemp("cache")
    own = ("data.tokenizer_name_or_path=bytes", f"data.cache_dir={cache}")
    local = (f"data.source={source}", "data.valid_documents=5", "data.num_proc=1")

    return (*TINY, *own, *local)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny):
    """What a script leaves when it is run in tiny, and its folder; once each."""
    found = {}

    def call(script: str):
        if script not in found:
            folder = tmp_path_factory.mktemp("run")
            env = {name: str(checkpoint(script, name)) for name in required(script)}
            words = record(path_of(script), *tiny, folder=folder, **env).overrides()
            done = run(*words, cwd=folder, env=OFF)
            found[script] = done, parsed(words)
        return found[script]

    def checkpoint(script: str, variable: str):
        if variable == "DATA_CACHE_DIR":
            return tmp_path_factory.mktemp("cache")
        algorithm = parsed(TABLE[script]["overrides"].split())["algo"]
        names = {"duo_base": "duo", "distillation": "duo"}
        trained = f"train_owt_{names.get(algorithm, algorithm)}"
        folder = call(trained)[1]["hydra.run.dir"] + "/checkpoints"
        as_folder = "$checkpoint_path/" in TABLE[script]["overrides"]
        return folder if as_folder else f"{folder}/last.ckpt"

    return call


TRAINING = [x for x in SINGLE if has_mode(x, "train") and x not in IMAGES]
LIKELIHOOD = [x for x in SINGLE if has_mode(x, "ppl_eval")]
SAMPLING = [x for x in SINGLE if has_mode(x, "sample_eval")]


def test_each_is_run():
    assert sorted(TRAINING + LIKELIHOOD + SAMPLING + IMAGES + ZERO_SHOT) == SCRIPTS


@pytest.mark.parametrize("script", one_in_a_few(TRAINING))
def test_it_trains(ran, script):
    done, given = ran(script)
    path = f"{given['hydra.run.dir']}/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert "val/ppl" in done.stdout


@pytest.mark.parametrize("script", one_in_a_few(LIKELIHOOD))
def test_it_evaluates(ran, script):
    done, _ = ran(script)
    assert "val/ppl" in done.stdout


@pytest.mark.parametrize("script", one_in_a_few(SAMPLING))
def test_it_samples(ran, script):
    _, given = ran(script)
    default = f"{given['hydra.run.dir']}/samples.json"
    with open(given.get("eval.generated_samples_path", default)) as file:
        results = json.load(file)
    assert results["complete"]
    assert len(results["generated_seqs"]) == 4


@pytest.mark.parametrize("script", one_in_a_few(ZERO_SHOT))
def test_zero_shot_in_tiny(ran, tiny, script, tmp_path):
    """Every run and the table."""
    algorithm = script.removeprefix("zero_shot_")
    trained = ran(f"train_owt_{algorithm}")[1]["hydra.run.dir"]
    calls = record(
        path_of(script),
        *tiny,
        folder=tmp_path,
        checkpoint_path=f"{trained}/checkpoints/last.ckpt",
        datasets="ptb scientific_papers_arxiv",
    ).calls
    for words in calls:
        run(*words, cwd=tmp_path, env=OFF)
    top = tmp_path / "outputs" / script
    for data in ("ptb", "scientific_papers_arxiv"):
        assert json.loads((top / data / "likelihood.json").read_text())


@pytest.mark.parametrize("script", one_in_a_few(IMAGES))
def test_images_are_refused_for_now(script, tmp_path):
    """In one line. Once they are supported this fails: move them to the runs above."""
    ran = record(
        path_of(script), folder=tmp_path, CHECKPOINT_PATH="a", DATA_CACHE_DIR="b"
    )
    done = run(*ran.overrides(), cwd=tmp_path, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


def plainly(script: str, *arguments: str, cwd, **env: str):
    """`bash scripts/NAME.sh`, as users do it."""
    return subprocess.run(
        ["bash", path_of(script), *arguments],
        cwd=cwd,
        env=os.environ | ENV | {"PYTHON": sys.executable, "DUO_ENV": os.devnull} | env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_training_in_a_shell(tiny, tmp_path):
    script = "train_owt_mdlm"
    done = plainly(script, *tiny, cwd=tmp_path, **OFF)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = {x.name for x in tmp_path.glob(f"outputs/{script}/checkpoints/*")}
    assert saved == {"last.ckpt", "best.ckpt"}


@pytest.mark.slow
def test_a_script_and_its_checkpoint_in_a_shell(tiny, tmp_path):
    """Training with the logger that the script asks for, then the same with more
    steps, which goes on where it was, then samples; in a folder whose name Hydra would
    split."""
    script, folder = "train_owt_mdlm", tmp_path / "a b=c"
    folder.mkdir()
    for steps in (2, 3):
        arguments = (*tiny, f"trainer.max_steps={steps}")
        done = plainly(script, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
    path = f"outputs/{script}/checkpoints/last.ckpt"
    assert torch.load(folder / path, weights_only=True)["global_step"] == 3
    assert (folder / "outputs" / script / "wandb").is_dir()
    script = "gen_ppl_owt_mdlm"
    done = plainly(script, *tiny, cwd=folder, checkpoint_path=path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "outputs" / script / "samples.json").exists()
