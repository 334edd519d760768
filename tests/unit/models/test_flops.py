"""The sizes of the scaling study, and the arithmetic of a train step."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cli.settle import algorithm_class
from models.dit import DIT
from models.flops import Compute, Passes, num_parameters, train_flops
from utils import ConfigError

SIZES = sorted(
    (Path(__file__).parents[3] / "configs" / "model").glob("[0-9]*M.yaml"),
    key=lambda path: int(path.stem[:-1]),
)
PAGE = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
K = 32_001
# Width, and blocks in the grid of arXiv:2203.15556, of which 16 D^2 n is the name.
GRID = {"6M": (256, 6), "170M": (768, 18), "1028M": (1792, 20), "2121M": (2176, 28)}


def sizes(path):
    shared = OmegaConf.load(path.parent / "_ladder.yaml")
    return OmegaConf.merge(shared, OmegaConf.load(path))


def network(model, causal=False):
    with torch.device("meta"):
        return DIT(
            vocab_size=K,
            hidden_size=model.hidden_size,
            cond_dim=model.cond_dim,
            n_blocks=model.n_blocks,
            n_heads=model.n_heads,
            dropout=model.dropout,
            causal=causal,
            length=model.length,
        )


def test_the_ladder_has_the_published_names():
    names = [path.stem for path in SIZES]
    assert len(names) == 30
    assert (names[0], names[1], names[-1]) == ("6M", "19M", "2121M")
    for name, (width, blocks) in GRID.items():
        assert abs(16 * width**2 * blocks / 1e6 - int(name[:-1])) < 1
        assert sizes(SIZES[names.index(name)]).hidden_size == width


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_a_size_has_about_as_many_parameters_as_its_name_says(path):
    """Within 5 %, without memory for them; so many blocks come nearest."""
    model = sizes(path)
    name, width = int(path.stem[:-1]), model.hidden_size
    assert model.name == path.stem
    assert (width // model.n_heads, width % model.n_heads) in ((64, 0), (128, 0))
    found = network(model)
    assert {x.device.type for x in found.parameters()} == {"meta"}
    count = num_parameters(found)
    assert abs(count / 1e6 / name - 1) < 0.05
    row = f"| `{path.stem}` | {width} | {model.n_heads} | {model.n_blocks} | "
    assert f"{row}{count / 1e6:.1f} |" in PAGE
    block = sum(x.numel() for x in found.blocks[0].parameters())
    assert model.n_blocks == round(name * 1e6 / block)
    every = sum(x.numel() for x in found.parameters())
    assert every - count == K * width + (K * width + K)  # rows; head with its bias


@pytest.mark.parametrize("causal", [False, True])
def test_products_of_a_train_step_are_counted(causal):
    """By torch's own counter, without what acts once a row; L = 32, two blocks."""
    B, L, D, vocabulary = 2, 32, 64, 50
    torch.manual_seed(0)
    model = DIT(
        vocab_size=vocabulary,
        hidden_size=D,
        cond_dim=16,
        n_blocks=2,
        n_heads=2,
        dropout=0.0,
        causal=causal,
        length=L,
    )
    x = torch.randint(vocabulary, (B, L))
    sigma = None if causal else torch.rand(B)
    plain = sdpa_kernel(SDPBackend.MATH)  # others are not counted on a CPU
    with plain, FlopCounterMode(display=False) as counter:
        model(x, sigma).sum().backward()
    maps = 16 * (2 * 6 * D + 2 * D) + 256 * 16 + 16 * 16
    once_a_row = 0 if causal else 6 * B * maps
    ours = train_flops(model, tokens=B * L, scored=B * L, length=L)
    assert counter.get_total_flops() == pytest.approx(ours + once_a_row, rel=0.01)
    half = train_flops(model, tokens=B * L, scored=B * L / 2, length=L)
    assert ours - half == 3 * D * vocabulary * B * L


def test_a_budget_buys_whole_steps():
    compute = Compute(parameters=10, token_flops=60.0, step_tokens=100)
    assert compute.step_flops == 6000
    assert [compute.steps(x) for x in (5999, 6000, 17_999, 18_000)] == [0, 1, 2, 3]
    assert compute.steps(6000 * 12_345) == 12_345


def test_what_a_token_goes_through(algo_name, compose):
    """Counted by drawing: the share of masks, D3PM's second pass, AR's last token."""
    config = compose(f"algo={algo_name}", "mode=train", "training.flops=1")
    algorithm = algorithm_class(config)
    counted = {
        "ar": Passes(7 / 8, 7 / 8),
        "mdlm": Passes(1, 0.5 * 0.999 * 1.001),
        "sedd": Passes(1, 0.5 * 0.999 * 1.001),
        "d3pm": Passes(2, 1 + 0.5005 * 0.999 + 0.0005),
        "duo_base": Passes(1, 1),
    }
    if algo_name not in counted:
        with pytest.raises(ConfigError, match=r"training.flops=1.*trainer.max_steps"):
            algorithm.passes(config)
        return
    assert algorithm.passes(config) == pytest.approx(counted[algo_name], rel=2e-3)


@pytest.mark.parametrize("noise", ["log-linear", "cosine"])
def test_the_share_of_masks_is_that_of_training(make_model, noise, place):
    model = make_model(
        "algo=mdlm",
        f"noise={noise}",
        "loader.global_batch_size=4096",
        "model.length=64",
    ).train()
    place(model)
    x0 = torch.zeros(4096, 64, dtype=torch.long)
    z = model.corrupt(x0, model.sample_t(len(x0)))
    share = type(model).passes(model.config).head
    assert len(z.scored) / x0.numel() == pytest.approx(share, abs=0.003)
