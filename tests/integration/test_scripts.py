"""Scripts of scripts/: what each asks Slurm for and gives to main.py, against the table
of published settings, and what they refuse; test_script_runs.py runs them.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from nursery import ROOT
from recorder import (
    FOLDER,
    IMAGES,
    OVER_STEPS,
    SCRIPTS,
    SINGLE,
    TABLE,
    ZERO_SHOT,
    filled,
    has_mode,
    parsed,
    path_of,
    published,
    record,
    required,
    resolved,
    variables,
)

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
# What depends on the site, of which alone scripts say something.
PATHS = {"data.cache_dir", "eval.checkpoint_path", "eval.generated_samples_path"}
PATHS |= {"training.finetune_path"}
STRANGE = "/some where/a=b,c/it's \\[x]\\"  # a path that Hydra would read otherwise


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


def test_each_script_of_images_has_its_line():
    lines = (FOLDER / "README.md").read_text().splitlines()
    rows = [x.split("|") for x in lines if "composes to the published settings" in x]
    assert sorted(row[1].strip(" `") for row in rows) == IMAGES


# ---------------------------------------------------------------- what they run


@pytest.mark.parametrize("script", SINGLE)
def test_settings_are_the_published_ones(script, tmp_path, compose):
    """As Slurm starts it, with the variables' defaults: the script names its experiment
    and paths, and what main.py composes is what the published command composes."""
    values = dict.fromkeys(required(script), STRANGE) | variables(script)
    paths = dict.fromkeys(required(script), STRANGE)
    ran = as_sbatch(script, tmp_path, **paths)
    assert (ran.status, ran.said) == (0, "")
    words, expected = ran.overrides(), published(script, values)
    given = parsed(words)
    folder = given.pop("hydra.run.dir")
    if own := parsed(expected).get("hydra.run.dir"):
        assert folder == os.path.normpath(tmp_path / own)
    assert folder.startswith(str(tmp_path / "outputs"))
    devices = header(script)["--ntasks-per-node"]
    machines = {"trainer.num_nodes": "1", "trainer.devices": devices}
    assert given.pop("experiment") == script
    assert {key: given.pop(key) for key in machines} == machines
    assert given.keys() <= PATHS
    assert ran.srun.startswith(f"--job-name={script.split('/')[-1]} recorder -u ")
    machines = [f"{key}={value}" for key, value in machines.items()]
    config = compose(*words, tiny=False)
    assert resolved(config) == resolved(compose(*expected, *machines, tiny=False))
    check_batches(config)


@pytest.mark.parametrize("script", [x for x in SINGLE if variables(x)])
def test_variables_come_from_the_environment(script, tmp_path, compose):
    """All of them, and runs with different ones do not share a folder."""
    paths = dict.fromkeys(required(script), "/a")
    values = {name: str(i + 3) for i, name in enumerate(variables(script))} | paths
    if noise := variables(script).get("NOISE"):
        values["NOISE"] = {"cosine": "log-linear", "log-linear": "cosine"}[noise]
    folders = set()
    for env in (paths, values):
        words = record(path_of(script), folder=tmp_path, **env).overrides()
        config = compose(*words, tiny=False)
        folders.add(filled(parsed(words), config)["hydra.run.dir"])
    assert len(folders) == 2
    assert not any(folder.count("${") for folder in folders)
    assert "trainer.devices" not in parsed(words)  # Lightning counts them
    expected = compose(*published(script, values), tiny=False)
    assert resolved(config) == resolved(expected)


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


def test_arguments_of_a_script_win(tmp_path, compose):
    """Over every key and group of its experiment, and its folder follows them."""
    arguments = ["trainer.max_steps=10", "model.length=64", "seed=2"]
    arguments += ["data=ptb", "algo=sedd", "model=tiny", "logger=none"]
    words = record(path_of("train_owt_mdlm"), *arguments, folder=tmp_path).overrides()
    assert words[-len(arguments) :] == arguments
    config = compose(*words, tiny=False)
    assert (config.trainer.max_steps, config.model.length, config.seed) == (10, 64, 2)
    assert (config.data.train, config.algo.name) == ("ptb", "sedd")
    assert (config.model.name, config.get("logger")) == ("tiny", {})
    assert config.loader.batch_size == 2  # what is not overridden stays

    path = path_of("gen_ppl_owt_duo")
    words = record(path, "sampling.steps=8", folder=tmp_path, checkpoint_path="/a")
    words = words.overrides()
    given = filled(parsed(words), compose(*words, tiny=False))
    assert given["hydra.run.dir"].endswith("/gen_ppl_owt_duo/8-1-last")
    assert given["eval.generated_samples_path"].endswith("/1-8-ckpt-last.json")


@pytest.mark.parametrize("script", ZERO_SHOT)
def test_zero_shot_runs_over_all_data(script, tmp_path):
    """Each in a folder of its own; a table at the end, outside of srun."""
    ran = as_sbatch(script, tmp_path, checkpoint_path=STRANGE)
    assert (ran.status, ran.said) == (0, "")
    *runs, report = map(parsed, ran.calls)
    assert [x["data"] for x in runs] == list(DATASETS)
    top = tmp_path / "outputs" / script
    for given in runs:
        name = given["data"]
        assert given == {
            "experiment": script,
            "eval.checkpoint_path": STRANGE,
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
    """To what the published command composes, on every data set."""
    ran = record(path_of(script), folder=tmp_path, checkpoint_path="a")
    *calls, report = ran.calls
    check_batches(compose(*report, tiny=False))
    for name, call in zip(DATASETS, calls, strict=True):
        config = compose(*call, tiny=False)
        check_batches(config)
        results = (
            f"eval.results_path={tmp_path}/outputs/{script}/{name}/likelihood.json"
        )
        words = published(script, {"checkpoint_path": "a", "data": name})
        assert resolved(config) == resolved(compose(*words, results, tiny=False))


def test_zero_shot_of_local_copies(tmp_path, compose):
    """As scripts/README.md has it: a folder for each data set."""
    source = "data.source=/copies/${data.valid}"
    assert source in (FOLDER / "README.md").read_text()
    path = path_of("zero_shot_duo")
    *calls, _ = record(path, source, folder=tmp_path, checkpoint_path="a").calls
    found = [compose(*call, tiny=False).data.source for call in calls]
    assert found == [f"/copies/{name.removesuffix('-gpt2')}" for name in DATASETS]


# ---------------------------------------------------------------- samples by steps


@pytest.mark.parametrize("script", OVER_STEPS)
def test_samples_in_several_numbers_of_steps(script, tmp_path, compose):
    """Each in a folder of its own, as what the table says; then a report of them."""
    ran = as_sbatch(script, tmp_path, checkpoint_path=STRANGE)
    assert (ran.status, ran.said) == (0, "")
    *runs, report = ran.calls
    ((name, numbers),) = ((k, x.split()) for k, x in variables(script).items())
    assert [parsed(words)[f"sampling.{name}"] for words in runs] == numbers
    top = tmp_path / "outputs" / script
    for steps, words in zip(numbers, runs, strict=True):
        given = parsed(words)
        assert given == {
            "experiment": script,
            "eval.checkpoint_path": STRANGE,
            f"sampling.{name}": steps,
            "hydra.run.dir": f"{top}/{steps}",
            "eval.generated_samples_path": f"{top}/{steps}/samples.json",
            "trainer.num_nodes": "1",
            "trainer.devices": "1",
        }
        values = {"checkpoint_path": STRANGE, name: steps}
        own = (f"eval.generated_samples_path={top}/{steps}/samples.json",)
        own += ("trainer.num_nodes=1", "trainer.devices=1")
        config = compose(*words, tiny=False)
        expected = compose(*published(script, values), *own, tiny=False)
        assert resolved(config) == resolved(expected)
        check_batches(config)
    assert parsed(report) == {
        "mode": "report",
        "report.table": "distillation",
        "report.runs": f"['{top}']",
        "report.path": f"{top}/report",
        "hydra.run.dir": f"{top}",
    }


@pytest.mark.parametrize("script", OVER_STEPS)
def test_some_numbers_of_steps(script, tmp_path):
    (name,) = variables(script)
    env = {"checkpoint_path": "a", name: "2 4", "RUN_DIR": "greedy"}
    argument = "sampling.noise_removal=greedy"
    *runs, _ = record(path_of(script), argument, folder=tmp_path, **env).calls
    assert [x[-1] for x in runs] == [argument] * 2
    found = [parsed(x)["hydra.run.dir"] for x in runs]
    assert found == [f"{tmp_path}/greedy/{steps}" for steps in (2, 4)]


# ---------------------------------------------------------------- the other spelling


LINKS = sorted(path.name for path in (ROOT / "script").iterdir())


def test_what_the_readme_of_the_source_names_is_there():
    """script/NAME.sh of each distillation, as scripts/NAME.sh."""
    names = {f"{x}.sh" for x in SCRIPTS if "distill_" in x}
    assert set(LINKS) == names
    for name in names:
        assert (ROOT / "script" / name).resolve() == FOLDER / name


@pytest.mark.parametrize("name", LINKS)
def test_a_link_does_what_its_script_does(name, tmp_path):
    env = dict.fromkeys(required(name.removesuffix(".sh")), "/a") | {"steps": "2"}
    one = record(ROOT / "script" / name, "seed=3", folder=tmp_path, **env)
    two = record(FOLDER / name, "seed=3", folder=tmp_path, **env)
    assert (one.status, one.said) == (0, "")
    assert one.calls == two.calls


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
