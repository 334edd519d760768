"""What the tests share: composed configs, a stub tokenizer, tiny models, seeds.

Fixtures with parameters run a test once per entry of a registry, so that an entry
added to the code is tested without an edit here.
"""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hydra
import hypothesis
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion import AbsorbingState, Diffusion, UniformState
from models.noise import SCHEDULES
from samplers import SAMPLERS
from trainer_base import TrainerBase
from utils import register_resolvers

CONFIGS = Path(__file__).parents[1] / "configs"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

TINY = (
    "model=tiny",
    "model.hidden_size=32",
    "model.cond_dim=16",
    "model.n_blocks=2",
    "model.n_heads=2",
    "model.length=8",
    "model.dropout=0",
    "loader.global_batch_size=4",
    "loader.eval_global_batch_size=4",
    "trainer.accelerator=cpu",
    "sampling.steps=8",
)

hypothesis.settings.register_profile(
    "replayable", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("replayable")
torch.set_num_threads(1)  # more of them only wait for each other on tiny tensors


def compose(*overrides: str, tiny: bool = True) -> DictConfig:
    """The run's config as `main.py` composes it; the caller may edit it.

    Args:
        overrides: As on the command line.
        tiny: Whether to make model, data and batches tiny first.
    """
    return copy.deepcopy(_composed(overrides, tiny))


@functools.cache  # Hydra takes longer to compose than a tiny model to run
def _composed(overrides: tuple[str, ...], tiny: bool) -> DictConfig:
    register_resolvers()
    has_data = any(override.startswith("data=") for override in overrides)
    data = [] if has_data else ["data=synthetic", "data.vocab_size=7"]
    base = [*TINY, *data] if tiny else []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return hydra.compose("config", [*base, *overrides])


class StubTokenizer:
    """What a model asks of a tokenizer.

    The default has no mask and one token added later, as GPT-2 with its [PAD]; so
    absorbing and uniform models alike have K = 7.
    """

    def __init__(
        self,
        vocab_size: int = 6,
        num_added: int = 1,
        mask_token_id: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_added = num_added
        self.mask_token_id = mask_token_id
        self.bos_token_id, self.eos_token_id = 0, 1

    def __len__(self) -> int:
        return self.vocab_size + self.num_added

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


def tiny_model(*overrides: str, tokenizer: StubTokenizer | None = None):
    """A model in evaluation mode whose outputs depend on its inputs.

    Args:
        overrides: As on the command line, `algo=...` among them.
        tokenizer: The stub to use.
    """
    config = compose(*overrides)
    torch.manual_seed(0)
    algorithm = hydra.utils.get_class(config.algo._target_)
    model = algorithm(config, tokenizer or StubTokenizer())
    with torch.no_grad():  # heads start at zero, which would hide much
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return model.eval()


def available_algorithms() -> dict[str, type]:
    """Config name -> class, for every algo config whose class exists."""
    found = {}
    for path in sorted((CONFIGS / "algo").glob("*.yaml")):
        target = OmegaConf.load(path)._target_
        module, name = target.rsplit(".", 1)
        try:
            found[path.stem] = getattr(__import__(module), name)
        except (ImportError, AttributeError):
            continue
    return found


ALGORITHMS = available_algorithms()
DIFFUSION = [name for name, cls in ALGORITHMS.items() if issubclass(cls, Diffusion)]
SAMPLING = [
    (predictor, name)
    for predictor, samplers in SAMPLERS.items()
    for name, algorithm in ALGORITHMS.items()
    if any(sampler.fits(algorithm) for sampler in samplers)
]


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

    It gets what `model.hidden` gets, the rows of a subset of the sequences, and
    returns raw logits (B, L, K).
    """

    def give(model: TrainerBase, logits: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(model, "hidden", logits)
        monkeypatch.setattr(model, "logits_for_loss", lambda hidden: hidden)

    return give
