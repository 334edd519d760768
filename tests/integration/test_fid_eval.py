"""`mode=fid_eval` from the command line to the npz, the picture, the record and the
table: beside torchmetrics, killed and gone on with, over processes, and what it
refuses."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from command_line import command, run
from extractors import NUM_FEATURES, Extractor, write_extractor
from image_files import images_of, labels_of, write_both
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from cli.settle import algorithm_class
from data.tokenizers import get_tokenizer
from metrics.fid import inception_score
from sampling.correctors import Gibbs

SIDE, NUM_REAL, NUM_IMAGES, BATCH_SIZE = 8, 22, 26, 4
REAL = images_of(NUM_REAL, SIDE, seed=1)
LABELS = labels_of(NUM_REAL)[::-1].copy()
TINY = (
    "data=images",
    "data.source=set",
    f"data.size={SIDE**2}",
    "data.num_classes=3",
    "data.cache_dir=cache",
    "model=unet",
    "model.ch=8",
    "model.num_scales=2",
    "model.ch_mult=[1,2]",
    "model.num_res_blocks=1",
    "algo.backbone=unet",
    "loader.global_batch_size=4",
    f"loader.eval_batch_size={BATCH_SIZE}",
    "trainer.accelerator=cpu",
    "sampling.steps=3",
    "sampling.guid_weight=2.0",
    "eval.checkpoint_path=random.ckpt",
    "eval.fid_features=extractor.pt",
)
FID = (*TINY, "algo=duo_base", "mode=fid_eval", f"eval.fid_num_images={NUM_IMAGES}")


class Features(nn.Module):
    """The first half of it, as torchmetrics wants it."""

    num_features = NUM_FEATURES

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return Extractor()(images)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a data set, an extractor and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("fid")
    valid = images_of(6, SIDE, seed=2), labels_of(6)
    write_both("folder", folder / "set", (REAL, LABELS), valid)
    write_extractor(folder / "extractor.pt")
    return folder


@pytest.fixture
def checkpoint(compose, folder, monkeypatch) -> None:
    path = folder / "random.ckpt"
    if path.exists():
        return
    monkeypatch.chdir(folder)
    config = compose(*FID, tiny=False)
    torch.manual_seed(0)
    model = algorithm_class(config)(config, get_tokenizer(config))
    with torch.no_grad():
        for x in model.backbone.parameters():
            x.add_(0.1 * torch.randn_like(x))
    about = {"algo": {"name": "duo_base"}}
    content = {"state_dict": model.state_dict(), "global_step": 7}
    torch.save(content | {"hyper_parameters": {"config": about}}, path)


def fid_eval(folder, name: str, *overrides: str, **options):
    """A run that writes `name`.npz, .png and .json."""
    paths = (
        f"eval.generated_samples_path={name}.npz",
        f"eval.results_path={name}.json",
        f"hydra.run.dir=run-{name}",
    )
    return run(*FID, *paths, *overrides, cwd=folder, **options)


@pytest.fixture
def whole(checkpoint, folder):
    """The arrays and the record of a run that nothing disturbs, and what it said."""
    if not (folder / "whole.json").exists():
        done = fid_eval(folder, "whole")
        (folder / "said").write_text(done.stdout)
    with np.load(folder / "whole.npz") as arrays:
        arrays = dict(arrays)
    record = json.loads((folder / "whole.json").read_text())
    return arrays, record, (folder / "said").read_text()


def as_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- what a run makes


def test_images_and_their_classes(whole, folder):
    """As many as asked for, in one npz; classes as in the training set, in its order,
    and from its beginning again. Nothing else is left."""
    arrays, _, _ = whole
    assert sorted(arrays) == ["images", "labels"]
    assert arrays["images"].shape == (NUM_IMAGES, SIDE, SIDE, 3)
    assert arrays["images"].dtype == np.uint8
    in_order = np.sort(LABELS)  # of folders, which are read by class
    expected = np.concatenate([in_order, in_order])[:NUM_IMAGES]
    np.testing.assert_array_equal(arrays["labels"], expected)
    assert len(np.unique(arrays["images"].reshape(NUM_IMAGES, -1), axis=0)) > 20
    assert not list(folder.glob("whole*.parts"))
    assert not list(folder.glob("whole*.lock"))
    with Image.open(folder / "whole.png") as picture:
        assert picture.format == "PNG"


def test_scores_are_those_of_torchmetrics(whole):
    """On the very images that are in the npz, beside all real ones as they are."""
    arrays, record, _ = whole
    metric = FrechetInceptionDistance(Features(), input_img_size=(3, SIDE, SIDE))
    metric.set_dtype(torch.float64)
    metric.update(as_torch(REAL), real=True)
    metric.update(as_torch(arrays["images"]), real=False)
    assert record["fid"] == pytest.approx(float(metric.compute()), rel=1e-5)
    _, logits = Extractor()(as_torch(arrays["images"]))
    generator = torch.Generator().manual_seed(record["seed"])
    order = torch.randperm(NUM_IMAGES, generator=generator)
    score = inception_score(logits, order)
    found = record["inception_score"], record["inception_score_std"]
    assert found == pytest.approx(score, rel=1e-5)


def test_the_record_says_what_the_numbers_depend_on(whole, folder):
    _, record, said = whole
    assert record["mode"] == "fid_eval"
    assert (record["num_images"], record["num_real"]) == (NUM_IMAGES, NUM_REAL)
    assert record["num_features"] == NUM_FEATURES
    assert record["sampling"] == {
        "steps": 3,
        "refine_steps": 0,
        "predictor": "ancestral",
        "guid_weight": 2.0,
        "noise_removal": "ancestral",
        "temperature": 1.0,
        "p_nucleus": 1.0,
        "use_float64": True,
        "order": "top_prob",
        "order_noise": 0.0,
        "gamma": 0.1,
        "corrector": None,
        **Gibbs.keys,
        "noise": "log-linear",
        "batch_size": BATCH_SIZE,
        "processes": 1,
        "global_batch_size": BATCH_SIZE,
    }
    assert record["extractor"]["kind"] == "TorchScript"
    assert len(record["extractor"]["sha256"]) == 64
    assert record["checkpoint"]["step"] == 7
    assert record["checkpoint"]["weights"] == "raw"
    assert record["data"]["num_classes"] == 3
    assert record["evaluations"] > 0
    assert record["seconds"] > 0
    assert record["images"] == str(folder / "whole.npz")
    assert record["picture"] == str(folder / "whole.png")
    for part in (
        "26 images beside 22",
        "FID",
        "global batch",
        "TorchScript",
        "guidance",
    ):
        assert part in said


def test_a_second_run_finds_the_real_images_in_the_cache(whole, folder):
    """Its numbers are the same to the last digit; the images are not drawn from
    anything but the seed, and the picture is theirs."""
    _, record, _ = whole
    (cached,) = (folder / "cache" / "fid").iterdir()
    before = cached.stat().st_mtime_ns
    fid_eval(folder, "second")
    again = json.loads((folder / "second.json").read_text())
    for name in ("fid", "inception_score", "inception_score_std"):
        assert again[name] == record[name]
    assert cached.stat().st_mtime_ns == before
    for suffix in ("npz", "png"):
        first = (folder / f"whole.{suffix}").read_bytes()
        assert (folder / f"second.{suffix}").read_bytes() == first


def test_without_classes(checkpoint, folder):
    """A model with classes draws without them, too; the number of images is that of the
    training set by default."""
    more = ("sampling.guid_weight=null", "eval.fid_num_images=null")
    fid_eval(folder, "free", *more)
    with np.load(folder / "free.npz") as arrays:
        assert sorted(arrays) == ["images"]
        assert len(arrays["images"]) == NUM_REAL


# ---------------------------------------------------------------- interruptions


def stop(folder, name: str, number: int) -> int:
    """Starts a run and sends a signal once three more batches are there.

    Returns:
        The status it ends with.
    """
    parts = folder / f"{name}.npz.parts"
    wanted = len(list(parts.glob("batch_*.npz"))) + 2
    paths = (
        f"eval.generated_samples_path={name}.npz",
        f"eval.results_path={name}.json",
        f"hydra.run.dir=run-{name}",
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*FID, *paths), cwd=folder, env=env, **quiet)
    try:
        limit = time.monotonic() + 120
        while len(list(parts.glob("batch_*.npz"))) < wanted:
            assert process.poll() is None, "the run ended before it was stopped"
            assert time.monotonic() < limit
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def same_as_whole(folder, name: str, record: dict) -> None:
    """The npz byte for byte, and the scores to the last digit."""
    first = (folder / "whole.npz").read_bytes()
    assert (folder / f"{name}.npz").read_bytes() == first
    found = json.loads((folder / f"{name}.json").read_text())
    for key in ("fid", "inception_score", "inception_score_std", "num_images"):
        assert found[key] == record[key]
    assert not list(folder.glob(f"{name}*.parts"))


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on(whole, folder):
    """Killed, then interrupted, then left alone; the real images' features, too."""
    _, record, _ = whole
    shutil.rmtree(folder / "cache" / "fid")
    assert stop(folder, "stopped", signal.SIGKILL) == -signal.SIGKILL
    parts = sorted((folder / "stopped.npz.parts").glob("batch_*.npz"))
    times = {part: part.stat().st_mtime_ns for part in parts}
    assert stop(folder, "stopped", signal.SIGTERM) == 128 + signal.SIGTERM
    assert not (folder / "stopped.npz").exists()
    for part, written in times.items():  # nothing is drawn twice
        assert part.stat().st_mtime_ns == written
    done = fid_eval(folder, "stopped", "sampling.steps=4", status=2)
    assert "another sampling.steps (3 there, 4 now)" in done.stderr
    fid_eval(folder, "stopped")
    same_as_whole(folder, "stopped", record)
    done = fid_eval(folder, "stopped", status=2)
    assert "not overwritten" in done.stderr


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(whole, folder):
    """And their features add up to the same FID, to the last digit."""
    _, record, _ = whole
    shutil.rmtree(folder / "cache" / "fid")
    fid_eval(folder, "two", "trainer.devices=2", "loader.batch_size=2")
    same_as_whole(folder, "two", record)
    found = json.loads((folder / "two.json").read_text())["sampling"]
    assert (found["processes"], found["global_batch_size"]) == (2, 2 * BATCH_SIZE)


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    "other weights": (
        ["eval.fid_features=random.ckpt"],
        ["eval.fid_features", "FID's Inception network"],
    ),
    "a folder for a file": (
        ["eval.results_path=."],
        ["eval.results_path=", "cannot be written"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, checkpoint, folder):
    """Others are in tests/unit/cli/test_checks.py, at no cost."""
    overrides, expected = MISTAKES[name]
    done = fid_eval(folder, "mistake", *overrides, status=2)
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    for part in expected:
        assert part in error
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(folder.glob("mistake*"))
