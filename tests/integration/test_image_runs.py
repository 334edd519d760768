"""Runs on images through the real command line, from files of every kind."""

import json
import re
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from image_files import NAMES, images_of, labels_of, write_both
from stand_ins import SHARED

from metrics.numbers import measured

TRAIN = images_of(30), labels_of(30)
VALID = images_of(12, seed=1), labels_of(12)
CLASSES = f"data.num_classes={len(NAMES)}"
SMALL = (
    *("data=images", "data.size=16", "model=tiny", "model.length=48"),
    *("model.n_blocks=1", "model.n_heads=1", "model.hidden_size=16"),
    *("model.cond_dim=8", "loader.global_batch_size=4"),
    *("loader.eval_global_batch_size=4", "trainer.accelerator=cpu"),
    *("trainer.num_sanity_val_steps=0", "trainer.max_steps=6", "sampling.steps=2"),
    *("trainer.val_check_interval=3", "trainer.log_every_n_steps=1"),
    "sampling.num_sample_batches=1",
)


def start(folder: Path, source: Path | str, *overrides: str, status: int = 0):
    places = (f"data.cache_dir={folder}/cache", f"hydra.run.dir={folder}/run")
    given = (*SMALL, f"data.source={source}", *places, *overrides)
    return command_line.run(*given, cwd=folder, status=status)


def fingerprints(stdout: str) -> list[str]:
    """Rows, tokens and hash of each split."""
    lines = [line for line in stdout.splitlines() if "sha256" in line]
    return [line[line.index(": ") :] for line in lines]


def test_images_are_prepared(tmp_path):
    """The same rows, whatever file they come from."""
    found = []
    for kind in ("folder", "archive"):
        source = write_both(kind, tmp_path / f"a {kind}", TRAIN, VALID)
        done = start(tmp_path, source, "mode=prepare_data", CLASSES)
        found.append(fingerprints(done.stdout))
    assert [line.split(",")[0] for line in found[0]] == [": 30 rows", ": 12 rows"]
    assert found[0] == found[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_the_hubs_files_of_cifar10(tmp_path):
    """A part of them, which is said; the same by either data set."""
    given = ("mode=prepare_data", "data.size=1024", "model.length=3072")
    source = SHARED / "cifar10" / "cifar10"
    done = start(tmp_path, source, "data=cifar10", *given)
    assert "100 images, the published set has 10000" in done.stdout + done.stderr
    own = start(tmp_path, source, *given, "data.num_classes=10")
    assert fingerprints(own.stdout) == fingerprints(done.stdout)
    assert len(fingerprints(own.stdout)) == 2


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "run" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_a_run_on_images_goes_on_where_it_stopped(tmp_path, compat):
    """With the flips of a run that nobody stopped, in the middle of an epoch."""
    source = write_both("npz", tmp_path, TRAIN, VALID)
    every = ("algo=mdlm", "eval.generate_samples=False", f"algo.compat={compat}")
    runs = {"whole": (6,), "parts": (3, 6), "plain": (6,)}
    for name, steps in runs.items():
        (tmp_path / name).mkdir()
        for number in steps:
            flip = f"data.flip={name != 'plain'}"
            given = (*every, flip, f"trainer.max_steps={number}")
            start(tmp_path / name, source, *given)
    whole, parts, plain = (weights(tmp_path / name) for name in runs)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert not all(torch.equal(whole[key], plain[key]) for key in whole)


UNET = (
    *("data=images", "data.size=16", CLASSES, "data.flip=True"),
    *("algo=duo_base", "algo.backbone=unet", "noise=cosine"),
    *("model=unet", "model.ch=8", "model.num_scales=2", "model.ch_mult=[1,2]"),
    *("model.num_res_blocks=1", "optim.lr=3e-3", "lr_scheduler.num_warmup_steps=5"),
    *("loader.global_batch_size=8", "loader.eval_global_batch_size=8"),
    *("trainer.accelerator=cpu", "trainer.max_steps=40", "sampling.steps=4"),
    *("trainer.val_check_interval=20", "trainer.log_every_n_steps=1"),
    *("trainer.num_sanity_val_steps=0", "sampling.num_sample_batches=1"),
    *("sampling.guid_weight=2", "training.class_dropout_p=0.3"),
)


@pytest.mark.slow
@pytest.mark.parametrize("process", ["algo=duo_base", "algo=mdlm"])
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, process):
    """A U-Net with classes. Noise and hidden labels are drawn by each process, so the
    validation after training agrees within 4 standard errors; the curves of training
    lie as close, and both are far below the first one."""
    dark = [(images_of(n, seed=n) // 8, labels_of(n)) for n in (64, 64)]
    source = write_both("npz", tmp_path / "set", *dark)
    own = (*UNET, process, f"data.source={source}", f"data.cache_dir={tmp_path}/cache")
    folders = {"one": 1, "two": 2}
    for name, devices in folders.items():
        given = (f"trainer.devices={devices}", f"hydra.run.dir={tmp_path}/{name}")
        command_line.run(*own, *given, cwd=tmp_path)
    one, two = (tmp_path / name for name in folders)
    spread = [command_line.logged(x, "val/nll_stderr")[-1] for x in (one, two)]
    last = [command_line.logged(x, "val/nll")[-1] for x in (one, two)]
    assert abs(last[0] - last[1]) <= 4 * np.hypot(*spread)
    curves = [command_line.logged(x, "train/nll") for x in (one, two)]
    assert [len(curve) for curve in curves] == [40, 40]
    means = [np.mean(curve[-10:]) for curve in curves]
    scatter = [np.std(curve[-10:]) / 10**0.5 for curve in curves]
    assert abs(means[0] - means[1]) <= 4 * np.hypot(*scatter)
    assert max(means) < 0.9 * min(curve[0] for curve in curves)
    for folder in (one, two):
        assert (folder / "samples" / "step_40.png").read_bytes().startswith(b"\x89PNG")


def check_likelihood(folder: Path, source: Path, *overrides: str) -> None:
    """Of a dimension, which has bits and a standard error, and no perplexity; beside a
    histogram of values. All of it in a file that reports read."""
    results = f"eval.results_path={folder}/likelihood.json"
    words = ("mode=ppl_eval", "eval.unigram_baseline=True", results)
    done = start(folder, source, *overrides, *words)
    said = json.loads((folder / "likelihood.json").read_text())
    assert said["bpd"] == pytest.approx(said["nll"] / np.log(2))
    assert said["bpd_stderr"] > 0
    assert said["ppl"] is said["ppl_stderr"] is None
    rows = [x for x in done.stdout.splitlines() if "val/" in x]
    (bits,) = (x for x in rows if "bits per dimension" in x)
    assert bits.endswith(f"  {measured(said['bpd'], said['bpd_stderr'])}")
    (histogram,) = (x for x in rows if "histogram of values" in x)
    assert (
        7.9 < float(re.search(r"\d+\.\d+", histogram)[0]) < 8.4
    )  # all values are alike
    assert "nats per dimension" in done.stdout
    assert "val/ppl" not in done.stdout
    report = ("mode=report", f"report.runs={folder}/likelihood.json")
    done = command_line.run(*report, f"hydra.run.dir={folder}/report", cwd=folder)
    assert "no published number for data 'images'" in done.stdout
    assert "bpd" in done.stdout


def test_training_and_sampling_show_images(tmp_path):
    """As pictures beside their numbers; the likelihood is of a value of a pixel."""
    source = write_both("npz", tmp_path, TRAIN, VALID)
    done = start(tmp_path, source, "algo=mdlm", CLASSES, "trainer.max_steps=3")
    assert "images of the source" in done.stdout
    assert "val/bpd" in done.stdout
    samples = tmp_path / "run" / "samples"
    assert json.loads((samples / "step_3.json").read_text())["num_images"] == 4
    assert (samples / "step_3.png").read_bytes().startswith(b"\x89PNG")
    path = f"eval.checkpoint_path={tmp_path}/run/checkpoints/last.ckpt"
    check_likelihood(tmp_path, source, "algo=mdlm", CLASSES, path)
    drawn = ("mode=sample_eval", "sampling.guid_weight=1", "sampling.labels=[2,0]")
    start(tmp_path, source, "algo=mdlm", CLASSES, path, *drawn)
    said = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert said["complete"]
    assert said["labels"] == [2, 0, 2, 0]
    with np.load(said["images"]) as arrays:
        assert arrays["images"].shape == (4, 4, 4, 3)
        assert arrays["labels"].tolist() == [2, 0, 2, 0]
    assert Path(said["picture"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.num_classes=2"], ["data.num_classes=2", "label 2"]),
        (["algo=mdlm", "sampling.noise_removal=none"], ["noise_removal", "mask"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, overrides, parts):
    source = write_both("npz", tmp_path, TRAIN, VALID)
    done = start(tmp_path, source, *overrides, status=2)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert all(part in line for part in parts)
    assert "Traceback" not in done.stdout + done.stderr


def test_the_demo_of_images(tmp_path):
    """Cut to two updates of a small network on small images: it says the bound and the
    histogram's, and draws every class."""
    source = write_both("npz", tmp_path, TRAIN, VALID)
    small = (
        *(
            "data.size=16",
            "data.length=48",
            CLASSES,
            "model.ch=4",
            "model.num_scales=2",
        ),
        *("model.ch_mult=[1,1]", "loader.global_batch_size=4"),
        *("loader.eval_global_batch_size=4", "trainer.accelerator=cpu"),
        *("trainer.max_steps=2", "trainer.val_check_interval=2", "sampling.steps=2"),
    )
    places = (f"data.cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run")
    given = ("experiment=demo_images", f"data.source={source}", *small, *places)
    done = command_line.run(*given, cwd=tmp_path)
    assert "val/bpd of a histogram of values" in done.stdout
    assert (tmp_path / "run" / "samples" / "step_2.png").stat().st_size > 0
