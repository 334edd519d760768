"""What the tests share: composed configs, a stub tokenizer, tiny models, seeds.

Fixtures with parameters run a test once per entry of a registry, so that an entry
added to the code is tested without an edit here.
"""

import gc
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from omegaconf import DictConfig
from tiny import ALGORITHMS, DIFFUSION, SAMPLING, StubTokenizer, compose, tiny_model
from torch import Tensor

from diffusion.absorbing import AbsorbingState
from diffusion.base import Diffusion
from diffusion.uniform import UniformState
from models.noise import SCHEDULES
from trainer_base import TrainerBase
from utils import STOP_SIGNALS

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

hypothesis.settings.register_profile(
    "replayable", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("replayable")
torch.set_num_threads(1)  # more of them only wait for each other on tiny tensors


def pytest_configure(config: pytest.Config) -> None:
    """Packed rows are shared by all tests, and by none of the user's runs."""
    if "DUO_CACHE_DIR" not in os.environ or not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="duo-tests-")
        os.environ["DUO_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_finish() -> None:
    """Tests and what they import stay: no garbage is looked for in them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def _signals_are_as_before() -> Iterator[None]:
    """A handler that a test leaves would change what processes of later ones do."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    after = [signal.getsignal(number) for number in STOP_SIGNALS]
    for number, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(name="compose")
def _compose() -> Callable[..., DictConfig]:
    return compose


@pytest.fixture(name="stub_tokenizer")
def _stub_tokenizer() -> type[StubTokenizer]:
    return StubTokenizer


@pytest.fixture
def make_model() -> Callable:
    return tiny_model


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=sorted(SCHEDULES))
def schedule_name(request) -> str:
    return request.param


@pytest.fixture(params=sorted(ALGORITHMS))
def algo_name(request) -> str:
    return request.param


@pytest.fixture(params=DIFFUSION)
def diffusion_name(request) -> str:
    return request.param


@pytest.fixture(
    params=[n for n in DIFFUSION if issubclass(ALGORITHMS[n], UniformState)]
)
def uniform_name(request) -> str:
    return request.param


@pytest.fixture(
    params=[n for n in DIFFUSION if issubclass(ALGORITHMS[n], AbsorbingState)]
)
def absorbing_name(request) -> str:
    return request.param


@pytest.fixture(params=SAMPLING, ids=["-".join(pair) for pair in SAMPLING])
def sampling_pair(request) -> tuple[str, str]:
    """A sampler (`sampling.predictor`) and an algorithm that fits it."""
    return request.param


@pytest.fixture(params=["gpt2", "bert-base-uncased"])
def pretrained(request) -> str:
    """Folder of a published tokenizer."""
    folder = SHARED_DATA / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    return str(folder)


@pytest.fixture
def place(monkeypatch) -> Callable[..., None]:
    """Puts a model somewhere in a run: place(model, rank=1, step=7)."""

    def put(model, *, rank: int = 0, step: int = 0) -> None:
        for name, value in {"global_rank": rank, "global_step": step}.items():
            monkeypatch.setattr(type(model), name, property(lambda _, v=value: v))

    return put


# ---------------------------------------------------------------- laws


def marginal(model: Diffusion, x0: Tensor, alpha: Tensor) -> Tensor:
    """q(x_t | x_0) as probabilities, by definition of the forward process.

    Args:
        model: Says which process and how many tokens.
        x0: Ids, any shape.
        alpha: Signal levels that broadcast against x0.

    Returns:
        float64, one more axis of size K than x0.
    """
    onehot = torch.nn.functional.one_hot(x0, model.vocab_size).double()
    prior = torch.zeros(model.vocab_size, dtype=torch.float64)
    if isinstance(model, AbsorbingState):
        prior[model.mask_index] = 1
    else:
        prior[:] = 1 / model.vocab_size
    alpha = torch.as_tensor(alpha, dtype=torch.float64)[..., None]
    return alpha * onehot + (1 - alpha) * prior


def output_for(model: Diffusion, x_theta: Tensor, xt: Tensor, alpha_t: Tensor):
    """What `forward` returns for a denoiser that believes x_theta, (B, L, K) log.

    Log-probabilities; for a score model the log-scores that x_theta implies.
    """
    log_x_theta = x_theta.log().clamp(min=-1e6)
    if model.config.algo.parameterization != "score":
        return log_x_theta
    log_score = log_x_theta + torch.log(alpha_t / (1 - alpha_t))[..., None]
    return log_score.scatter(-1, xt[..., None], 0.0)


def logits_for(model: Diffusion, x_theta: Tensor) -> Tensor:
    """Raw logits of a head that believes x_theta at noisy tokens, (..., K).

    A score model's are log s + log(e^sigma - 1) + log(K - 1), and the true score is
    s = x_theta / (e^sigma - 1).
    """
    logits = x_theta.log().clamp(min=-1e6)
    if model.config.algo.parameterization != "score":
        return logits
    return logits + math.log(model.vocab_size - 1)


def clean_ids(model: Diffusion) -> Tensor:
    """Every id that clean data may hold."""
    ids = torch.arange(model.vocab_size)
    return ids if model.mask_index is None else ids[ids != model.mask_index]


@pytest.fixture
def laws() -> SimpleNamespace:
    """The definitions that property tests compare the code with."""
    return SimpleNamespace(
        marginal=marginal,
        output_for=output_for,
        logits_for=logits_for,
        clean=clean_ids,
    )


@pytest.fixture
def give_logits(monkeypatch) -> Callable[[TrainerBase, Callable], None]:
    """Puts a function in place of a model's network: give_logits(model, function).

    It gets what `model.hidden` gets, the rows of a subset of the sequences, with their
    labels if there are any, and returns raw logits (B, L, K).
    """

    def give(model: TrainerBase, logits: Callable[..., Tensor]) -> None:
        def hidden(x: Tensor, other: Any = None, labels: Tensor | None = None):
            return logits(x, other, *(() if labels is None else (labels,)))

        monkeypatch.setattr(model, "hidden", hidden)
        monkeypatch.setattr(model, "logits_for_loss", lambda hidden: hidden)

    return give
