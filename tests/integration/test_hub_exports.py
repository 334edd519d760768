"""Exports of every algorithm, loaded by an interpreter that cannot see this project:
the same logits, and the same samples from the same seed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import export, files_of, save_tiny
from safetensors.torch import load_file
from tiny import ALGORITHMS

from data.tokenizers import get_tokenizer
from models.attention import KVCache
from sampling.prompts import Given

FOREIGN = Path(__file__).parents[1] / "support" / "foreign.py"
BYTES = ("data.tokenizer_name_or_path=bytes",)
TEXT8 = ("data.tokenizer_name_or_path=text8",)
# What matters to the network and to samples: every algorithm, schedule and switch.
CASES = {
    **{
        name: (f"algo={name}", *BYTES)
        for name, algorithm in ALGORITHMS.items()
        if not algorithm.is_one_step  # which is refused
    },
    "cosine": ("algo=mdlm", "noise=cosine", "noise.eps=0.01", *TEXT8),
    "linear": ("algo=mdlm", "noise=linear", "noise.sigma_max=5.0", *TEXT8),
    "told the time": ("algo=mdlm", "algo.time_conditioning=True", *TEXT8),
    "not told the time": ("algo=duo_base", "algo.time_conditioning=False", *TEXT8),
    "bos": ("algo=sedd", "algo.ignore_bos=True", *TEXT8),
    "steps without a change": ("algo=mdlm", *TEXT8),
    "nucleus": ("algo=duo_base", "sampling.p_nucleus=0.7", *TEXT8),
    "nucleus of ar": ("algo=ar", "sampling.p_nucleus=0.7", *TEXT8),
    "first hitting": ("algo=mdlm", "sampling.predictor=first_hitting", *TEXT8),
    "greedy": ("algo=duo_base", "sampling.noise_removal=greedy", *TEXT8),
    "greedy of masks": ("algo=mdlm", "sampling.noise_removal=greedy", *TEXT8),
    "blocks of masks": ("algo=mdlm", "algo.block_size=4", *TEXT8),
    "blocks told the time": (
        *("algo=duo_base", "algo.block_size=2", "sampling.temperature=2"),
        *("sampling.num_blocks=6", "noise=linear", "noise.sigma_min=0.4", *TEXT8),
    ),
    # More tokens a step than a chunk of 100 000 logits holds.
    "several chunks": ("algo=duo_base", "data.vocab_size=30_000", "model.length=16"),
    "several chunks of masks": (
        "algo=mdlm",
        "data.vocab_size=30_000",
        "model.length=16",
    ),
}
NUM_SAMPLES, SEED = 4, 5
STEPS = {
    "steps without a change": 90,
    "several chunks": 3,
    "several chunks of masks": 2,
}


def steps_of(name: str) -> int:
    return STEPS.get(name, 6)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Models, their folders, inputs."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    for name, overrides in CASES.items():
        place = root / name.replace(" ", "-")
        model = save_tiny(place / "a.ckpt", *overrides)
        export(place / "a.ckpt", place / "folder")
        torch.manual_seed(3)
        ids = torch.randint(min(30, model.vocab_size), (2, model.num_tokens))
        sigma = torch.tensor([0.2, 3.0])
        given = [-1] * model.sampler.length(model.num_tokens)
        given[1:3] = [5, 6]
        found[name] = SimpleNamespace(
            model=model, folder=place / "folder", ids=ids, sigma=sigma, given=given
        )
    return found


def load_elsewhere(python: str, ours: dict, cwd: Path) -> dict[str, torch.Tensor]:
    """What `foreign.py` finds in the folders under an interpreter."""
    jobs = {
        name: {
            "folder": str(x.folder),
            "auto_class": f"AutoModelFor{'Causal' if is_causal(x) else 'Masked'}LM",
            "ids": x.ids.tolist(),
            "timesteps": x.sigma.tolist(),
            "text": "once upon",
            "template": x.given,
            "generate": {
                "num_samples": NUM_SAMPLES,
                "num_steps": steps_of(name),
                "seed": SEED,
                **{
                    name: x.model.config.sampling[name]
                    for name in ("p_nucleus", "predictor", "noise_removal")
                },
                **options_of(x),
            },
        }
        for name, x in ours.items()
    }
    (cwd / "inputs.json").write_text(json.dumps(jobs))
    env = {k: x for k, x in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"}
    words = (python, "-I", FOREIGN, "inputs.json", "outputs.safetensors")
    options = {"cwd": cwd, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(words, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # noqa: T201
    return load_file(cwd / "outputs.safetensors")


def is_causal(x: SimpleNamespace) -> bool:
    return type(x.model).is_autoregressive


def options_of(x: SimpleNamespace) -> dict[str, Any]:
    """Those of a model with blocks."""
    sampling = x.model.config.sampling
    names = ("temperature", "num_blocks")
    return {} if size_of(x) is None else {name: sampling[name] for name in names}


def size_of(x: SimpleNamespace) -> int | None:
    """L' of a model with blocks."""
    return None if is_causal(x) else x.model.block_size


def check(name: str, x: SimpleNamespace, theirs: dict[str, torch.Tensor]) -> None:
    """The same logits and samples of a case."""
    model, found = x.model, {}
    for key, value in theirs.items():
        case, what = key.rsplit(".", 1)
        if case == name:
            found[what] = value
    with torch.no_grad():
        condition = None if is_causal(x) else model.condition(x.sigma[:, None])
        size = size_of(x)
        cache = None if size is None else KVCache(x.ids.shape[1], size)
        logits = model.backbone.head(model.backbone.trunk(x.ids, condition, cache))
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-6)
    assert not found["same"].any()
    assert int(found["states"]) == model.config.model.n_blocks + 2
    torch.testing.assert_close(found["half"], logits, rtol=0.1, atol=0.5)

    def samples(given: Given | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        steps = steps_of(name)
        return model.generate_samples(NUM_SAMPLES, generator, steps, given).tokens

    assert torch.equal(found["samples"], samples(None))
    tokens = torch.tensor(x.given).expand(NUM_SAMPLES, -1)
    assert torch.equal(found["given"], samples(Given(tokens, tokens >= 0)))
    expected = get_tokenizer(model.config)("once upon")["input_ids"]
    assert found["tokens"].tolist() == expected


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    return load_elsewhere(sys.executable, ours, tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_elsewhere(name, ours, theirs):
    check(name, ours[name], theirs)


@pytest.mark.parametrize("name", CASES)
def test_an_export_of_an_export_is_the_same(name, ours, tmp_path):
    """Whatever the command line says of algorithm, network and tokenizer."""
    export(ours[name].folder, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(ours[name].folder)


# ---------------------------------------------------------------- other versions


@pytest.mark.slow
@pytest.mark.parametrize(
    "packages",
    [("transformers==4.38.2", "numpy<2"), ("transformers>=5",)],
    ids=["oldest", "newest"],
)
def test_a_clean_environment(packages, ours, tmp_path):
    """With torch, transformers, safetensors, what these need, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1"]
    version = torch.__version__.split("+")[0]
    for wanted in ([f"torch=={version}"], [*packages, "safetensors"]):
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"pip cannot install {' '.join(wanted)}: {reason}")
    theirs = load_elsewhere(python, ours, tmp_path)
    for name, x in ours.items():
        check(name, x, theirs)
