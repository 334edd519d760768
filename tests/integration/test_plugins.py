"""The files of docs/extending.md, in a folder of their own, do what the page says."""

import json
import os
import re
import subprocess
import sys

import pytest
from command_line import ROOT, run
from documented import PAGES, blocks, commands, overrides_of
from nursery import ENV

PAGE = "docs/extending.md"
COMMANDS = [x for x in commands("main", PAGE) if "plugins=[" in x and "my_data" in x]
EVALUATED = (
    *("trainer.accelerator=cpu", "data.num_proc=1", "data.cache_dir=cache"),
    *("sampling.num_sample_batches=1", "sampling.steps=2"),
)
SHORT = (
    *("model.length=32", "model.n_blocks=1", "model.hidden_size=16"),
    *("data.num_documents=300", *EVALUATED),
)
TRAINED = ("trainer.max_steps=2", "trainer.val_check_interval=2")
MODES = {"ppl_eval": "val/ppl", "sample_eval": "digits"}


def files() -> dict[str, str]:
    """The page's Python files by name."""
    found = {}
    for block in blocks(PAGES[PAGE], "python"):
        name, _, content = block.partition("\n")
        found[name.removeprefix("# ")] = content
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the files, and a model that was trained by two processes."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, content in files().items():
        (folder / name).write_text(content)
    (train,) = (x for x in COMMANDS if "mode=" not in x)
    two = ("trainer.devices=2", "loader.num_workers=1")
    done = run(*overrides_of(train), *SHORT, *TRAINED, *two, cwd=folder)
    assert "val/ppl" in done.stdout
    return folder


def test_each_kind_is_one_short_file():
    named = files()
    kinds = {
        re.search(r"^@duo\.(\w+)\(", x, re.M)[1] for x in named.values() if "@" in x
    }
    assert kinds == {
        *("backbone", "dataset", "sampler", "schedule", "algorithm", "metric"),
    }
    assert all(len(text.splitlines()) < 60 for text in named.values())


@pytest.mark.parametrize("mode", MODES)
def test_what_was_trained_is_evaluated_and_sampled(mode, folder):
    (line,) = (x for x in COMMANDS if f"mode={mode}" in x)
    done = run(*overrides_of(line), *EVALUATED, f"hydra.run.dir={mode}", cwd=folder)
    assert MODES[mode] in done.stdout
    if mode == "sample_eval":
        content = json.loads((folder / mode / "samples.json").read_text())
        assert 0 <= content["digits"] <= 1
        assert content["settings"]["sampling"]["predictor"] == "power_grid"
        assert content["settings"]["sampling"]["power_grid"] == {"exponent": 3}


@pytest.mark.slow
def test_a_sweep_and_the_other_modes(folder):
    (train,) = (x for x in COMMANDS if "mode=" not in x)
    words = [x for x in overrides_of(train) if not x.startswith("hydra.")]
    done = run(
        *("-m", *words, *SHORT, "trainer.max_steps=1", "noise.power=1,3"),
        *("eval.generate_samples=False", "trainer.limit_val_batches=1"),
        "hydra.sweep.dir=sweep",
        cwd=folder,
    )
    assert "noise.power" in done.stdout
    done = run("mode=prepare_data", *words, *SHORT, "hydra.run.dir=p", cwd=folder)
    assert "sums" in done.stdout
    path = "eval.checkpoint_path=outputs/sums/checkpoints/last.ckpt"
    done = run("mode=inspect", path, "hydra.run.dir=i", cwd=folder)
    assert "my_backbone, my_data, my_noise, my_algo" in done.stdout


@pytest.mark.parametrize("given", [[], ["plugins=[my_backbone,my_data,my_noise]"]])
def test_without_them_the_checkpoint_is_refused(given, folder):
    path = "eval.checkpoint_path=outputs/sums"
    words = (path, *given, *EVALUATED, "hydra.run.dir=r")
    done = run("mode=ppl_eval", *words, cwd=folder, status=2)
    (line,) = done.stderr.splitlines()[-1:]
    missing = "my_algo" if given else "my_backbone,my_data,my_noise,my_algo"
    assert f"It was made with plugins=[{missing}], which" in line


@pytest.mark.slow
def test_an_own_network_takes_the_curriculum_if_it_says_so(folder):
    """The page's embedding takes soft inputs; its class does not say it."""
    text = files()["my_backbone.py"]
    (name,) = re.findall(r'^    """Residual.*\n', text, re.M)
    (folder / "my_soft.py").write_text(
        text.replace(name, f"{name}\n    takes_soft_inputs = True\n")
    )
    words = (
        *("model=convolution", "algo.backbone=convolution", "data=synthetic"),
        *("algo=duo", "loader.global_batch_size=4", "trainer.max_steps=1"),
        *("trainer.val_check_interval=1", "trainer.limit_val_batches=1"),
        *("eval.generate_samples=False", *SHORT[:3], "algo.curriculum.gamma_min=-3"),
        "trainer.accelerator=cpu",
        *("algo.curriculum.integral_cache_path=null", "hydra.run.dir=soft"),
    )
    done = run("plugins=[my_backbone]", *words, cwd=folder, status=2)
    assert "takes ids alone" in done.stderr
    assert "val/ppl" in run("plugins=[my_soft]", *words, cwd=folder).stdout


def test_the_notebook(tmp_path):
    """From another folder, with no more than the clone on the path."""
    (tmp_path / "notebook.py").write_text(
        files()["notebook.py"]
        .replace('"trainer.max_steps=100"', '"trainer.max_steps=2", *SHORT')
        .replace("batch_size=16", 'batch_size=16", "trainer.limit_val_batches=2')
        .replace("import duo\n", f"import duo\n\nSHORT = {NOTEBOOK}\n")
        + "assert len(texts) == 4 and len(starts) == 2 and len(filled) == 1\n"
        + "assert 'returns the ' in starts[1]\n"
    )
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=os.environ | ENV | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ppl, error = done.stdout.splitlines()[-1].split()
    assert float(ppl) > float(error) > 0


NOTEBOOK = [
    *("trainer.accelerator=cpu", "model.n_blocks=1", "model.hidden_size=32"),
    *("model.n_heads=2", "data.num_proc=1", "eval.generate_samples=False"),
    *("loader.global_batch_size=8", "trainer.val_check_interval=2"),
    "trainer.limit_val_batches=1",
]
