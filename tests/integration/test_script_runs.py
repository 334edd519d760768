"""Scripts of scripts/, each for two steps at a tiny size with files in the place of the
hub; test_scripts.py has what they ask for.
"""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import run
from extractors import write_extractor
from image_files import NAMES, images_of, labels_of, write_both
from nursery import ENV
from recorder import (
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
    record,
    required,
    variables,
)
from stand_ins import write_documents
from tiny import compose

SMALL = (
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
)
TINY = (
    *SMALL,
    "model.hidden_size=16",
    "model.cond_dim=8",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.length=16",
    "sampling.num_sample_batches=1",
    "eval.gen_ppl_eval_model_name_or_path=null",
)
SIDE = 8
TINY_IMAGES = (
    *SMALL,
    "model.ch=8",
    "model.num_scales=2",
    "model.ch_mult=[1,2]",
    "model.num_res_blocks=1",
    f"data.size={SIDE**2}",
    f"data.length={3 * SIDE**2}",
    f"data.num_classes={len(NAMES)}",
)
OFF = {"WANDB_MODE": "disabled"}
QUICK = ("train_owt_duo", "eval_owt_duo", "gen_ppl_owt_duo")
QUICK += ("train_cifar10_mdlm_cosine", "psi_samplers/cifar10/mdlm_psi_pc")


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
def tiny_images(tmp_path_factory):
    """The same of a script on images."""
    folder = tmp_path_factory.mktemp("images")
    sets = [(images_of(n, SIDE, seed=n), labels_of(n)) for n in (12, 6)]
    return (*TINY_IMAGES, f"data.source={write_both('npz', folder, *sets)}")


@pytest.fixture(scope="module")
def comparing(tmp_path_factory):
    """What a script that compares images needs beside."""
    path = tmp_path_factory.mktemp("extractor") / "small.pt"
    return f"eval.fid_features={write_extractor(path)}", "eval.fid_num_images=6"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny, tiny_images, comparing):
    """What a script says when it is run in tiny, and what it was given; once each."""
    found = {}

    def call(script: str):
        if script not in found:
            folder = tmp_path_factory.mktemp("run")
            env = {name: str(checkpoint(script, name)) for name in required(script)}
            arguments = tiny_images if script in IMAGES else tiny
            arguments += comparing if has_mode(script, "fid_eval") else ()
            words = record(path_of(script), *arguments, folder=folder, **env)
            words = words.overrides()
            done = run(*words, cwd=folder, env=OFF)
            found[script] = done, filled(parsed(words), compose(*words, tiny=False))
        return found[script]

    def checkpoint(script: str, variable: str):
        if variable == "DATA_CACHE_DIR":
            return tmp_path_factory.mktemp("cache")
        algorithm = parsed(TABLE[script]["overrides"].split())["algo"]
        names = {"duo_base": "duo", "distillation": "duo"}
        names |= dict.fromkeys(("sdtt", "dimo"), "mdlm")
        name = names.get(algorithm, algorithm)
        is_image = script in IMAGES
        trained = f"train_cifar10_{name}_cosine" if is_image else f"train_owt_{name}"
        folder = call(trained)[1]["hydra.run.dir"] + "/checkpoints"
        as_folder = "$checkpoint_path/" in TABLE[script]["overrides"]
        return folder if as_folder else f"{folder}/last.ckpt"

    return call


TRAINING = [x for x in SINGLE if has_mode(x, "train")]
LIKELIHOOD = [x for x in SINGLE if has_mode(x, "ppl_eval")]
SAMPLING = [x for x in SINGLE if has_mode(x, "sample_eval")]
COMPARING = [x for x in SINGLE if has_mode(x, "fid_eval")]


def test_each_is_run():
    loops = ZERO_SHOT + OVER_STEPS
    assert sorted(TRAINING + LIKELIHOOD + SAMPLING + COMPARING + loops) == SCRIPTS


@pytest.mark.parametrize("script", one_in_a_few(TRAINING))
def test_it_trains(ran, script):
    done, given = ran(script)
    path = f"{given['hydra.run.dir']}/checkpoints/last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 2
    name = "val/aux_ppl" if "dimo" in script else "val/bpd"
    assert name in done.stdout


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


@pytest.mark.parametrize("script", one_in_a_few(COMPARING))
def test_it_compares_images(ran, script):
    _, given = ran(script)
    with open(f"{given['hydra.run.dir']}/fid.json") as file:
        results = json.load(file)
    assert results["num_images"] == 6
    assert results["fid"] >= 0
    assert results["sampling"]["guid_weight"] == 1
    with np.load(results["images"]) as arrays:
        assert arrays["images"].shape == (6, SIDE, SIDE, 3)
        assert len(arrays["labels"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("script", ZERO_SHOT)
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


@pytest.mark.slow
@pytest.mark.parametrize("script", OVER_STEPS)
def test_over_steps_in_tiny(ran, tiny, script, tmp_path):
    """Training, samples and the table; without a judge there is their entropy."""
    trained = ran(script.removeprefix("eval_"))[1]["hydra.run.dir"]
    (name,) = variables(script)
    numbers = {"steps": ("2", "3"), "refine_steps": ("1", "2")}[name]
    keys = ("sampling.steps=", "loader.", "trainer.max_steps")
    *calls, report = record(
        path_of(script),
        *(x for x in tiny if not x.startswith(keys)),
        *("loader.eval_batch_size=4", "loader.num_workers=0"),
        folder=tmp_path,
        checkpoint_path=f"{trained}/checkpoints/last.ckpt",
        **{name: " ".join(numbers)},
    ).calls
    for words in (*calls, report):
        run(*words, cwd=tmp_path, env=OFF)
    top = tmp_path / "outputs" / script
    for number in numbers:
        results = json.loads((top / number / "samples.json").read_text())
        assert results["settings"]["sampling"][name] == int(number)
        assert results["checkpoint"]["distilled"]
    with open(top / "report" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    methods = {"sdtt": "MDLM+SDTT", "duo": "Duo+DCD", "dimo": "MDLM+DiMO"}
    method = methods[script.split("_")[2]]
    measured = {row["steps"] for row in rows if row["measured"]}
    assert measured == {"2", "3"}  # the first step of a generator is one
    assert {row["model"] for row in rows if row["measured"]} == {method}
    has_paper = any(row["paper"] for row in rows if row["model"] == method)
    assert has_paper == (method != "MDLM+DiMO")  # of which no numbers are published


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
