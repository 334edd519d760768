"""The U-Net: its parts, what it is told, what it costs, and sizes it refuses."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.conditioning import ClassEmbedding
from models.head import Precision, chunked_loss
from models.unet import NiN, UNet, sinusoids
from utils import ConfigError

K, SIDE, B = 13, 8, 2
L = 3 * SIDE**2
SIZES = {
    "vocab_size": K,
    "side": SIDE,
    "ch": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_level": 1,
    "time_embed_dim": 8,
}


def build(**kwargs) -> UNet:
    torch.manual_seed(0)
    return UNet(**(SIZES | kwargs)).eval()


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randint(K, (B, L), generator=generator)


@pytest.fixture
def sigma() -> Tensor:
    return torch.tensor([0.3, 2.0])


def test_hidden_states_are_two_numbers_of_every_value(x, sigma):
    """Of which the head makes logits, of all or of some."""
    network = build()
    hidden = network.trunk(x, sigma)
    assert hidden.shape == (B, L, 2)
    assert (hidden[..., 0].abs() <= 1).all()
    logits = network(x, sigma)
    assert logits.shape == (B, L, K)
    some = network.head(hidden[:, 5:9])
    torch.testing.assert_close(some, logits[:, 5:9])


def test_the_published_size():
    """About 35 million parameters, with classes; on the meta device."""
    with torch.device("meta"):
        network = UNet(
            vocab_size=256,
            side=32,
            ch=128,
            ch_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_level=1,
            time_embed_dim=128,
            num_classes=10,
        )
    count = sum(p.numel() for p in network.parameters())
    assert 34e6 < count < 37e6
    names = network.state_dict().keys()
    assert {name.split(".")[0] for name in names} == {
        "temb_modules",
        "cond_map",
        "input_conv",
        "downsampling_modules",
        "middle_modules",
        "upsampling_modules",
        "output_modules",
    }


@pytest.mark.parametrize("side", [4, 8, 16])
@pytest.mark.parametrize("ch_mult", [(1,), (1, 2), (2, 1, 2)])
@pytest.mark.parametrize("num_res_blocks", [1, 3])
def test_any_square_whose_side_halves(side, ch_mult, num_res_blocks, generator):
    network = build(side=side, ch_mult=ch_mult, num_res_blocks=num_res_blocks)
    x = torch.randint(K, (1, 3 * side**2), generator=generator)
    assert network(x, torch.ones(1)).shape == (1, 3 * side**2, K)


def test_values_are_in_order_of_channel_row_column(sigma):
    """A value is centred at its own place: 2 id / K - 1."""
    network = build()
    x = torch.arange(L).remainder(K).expand(B, L)
    centred = network.centred(x)
    assert centred.shape == (B, 3, SIDE, SIDE)
    expected = 2 * x[0].view(3, SIDE, SIDE).float() / K - 1
    torch.testing.assert_close(centred[1], expected)


def test_pixels_are_seen_near_and_far(x, sigma):
    """A change of one value reaches the whole image through attention."""
    network = build()
    other = x.clone()
    other[0, 0] = (x[0, 0] + 6) % K
    change = (network.trunk(other, sigma) - network.trunk(x, sigma)).abs()
    assert (change[0] > 0).float().mean() > 0.9
    assert not change[1].any()


def test_soft_values_are_their_mean(x, sigma):
    """An input that mixes ids enters as the mixture of what the ids enter as."""

    class Certain:
        def embed(self, embedding):
            return embedding[x]

    network = build()
    torch.testing.assert_close(network.trunk(Certain(), sigma), network.trunk(x, sigma))


# ---------------------------------------------------------------- what it is told


def test_noise_levels_matter(x, sigma):
    network = build()
    assert not torch.equal(network.trunk(x, sigma), network.trunk(x, 2 * sigma))
    with pytest.raises(ValueError, match="noise level"):
        network.trunk(x)


def test_classes_matter_and_none_is_one_of_them(x, sigma):
    network = build(num_classes=3)
    outputs = [network.trunk(x, sigma, labels=torch.full((B,), c)) for c in range(4)]
    for first, second in pairwise(outputs):
        assert not torch.equal(first, second)
    assert torch.equal(network.trunk(x, sigma), outputs[3])


def test_each_image_has_its_own_class(x, sigma):
    network = build(num_classes=3)
    both = network.trunk(x, sigma, labels=torch.tensor([0, 2]))
    for row, label in enumerate((0, 2)):
        one = network.trunk(
            x[row : row + 1], sigma[row : row + 1], labels=torch.tensor([label])
        )
        torch.testing.assert_close(both[row : row + 1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adds_null_class", [True, False])
def test_no_labels_at_all(adds_null_class):
    """The class "none", or nothing, as published."""
    table = ClassEmbedding(3, 4, adds_null_class)
    embedding = torch.ones(2, 4)
    none = table(embedding, torch.tensor([3, 3]))
    assert torch.equal(table(embedding, None), none if adds_null_class else embedding)
    assert not torch.equal(none, embedding)


def test_sinusoids():
    """Sines, then cosines, of frequencies from 1 down to 1 / 10000."""
    x, dim = torch.tensor([0.0, 1.5]), 6
    table = sinusoids(x, dim)
    frequency = torch.tensor([1.0, 1e-2, 1e-4])
    expected = torch.cat([(1.5 * frequency).sin(), (1.5 * frequency).cos()])
    torch.testing.assert_close(table[1], expected)
    assert table[0].tolist() == [0, 0, 0, 1, 1, 1]


# ---------------------------------------------------------------- parts


def test_nin_is_a_linear_map_of_channels(generator):
    nin = NiN(5, 3)
    x = torch.randn(2, 5, 4, 4, generator=generator)
    expected = torch.einsum("bchw,cd->bdhw", x, nin.W) + nin.b[:, None, None]
    torch.testing.assert_close(nin(x), expected)
    bound = (3 * 0.1 / 4) ** 0.5
    assert 0.8 * bound < float(nin.W.detach().abs().max()) <= bound


def test_blocks_begin_as_their_shortcut():
    """The last map of attention is next to nothing at the start."""
    block = build().middle_modules[1]
    x = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(block(x), x / 2**0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_recomputing_in_backward_changes_no_gradient(x, sigma, num_classes):
    grads = []
    for checkpointing in (False, True):
        network = build(checkpointing=checkpointing, num_classes=num_classes).train()
        network(x, sigma).logsumexp(dim=-1).sum().backward()
        grads.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*grads)
    assert all(grad is not None for grad in grads[0])


@pytest.mark.slow
def test_a_compiled_network_is_the_same(x, sigma):
    """Logits, the gradient of every parameter, and names."""
    results, names = [], []
    for is_compiled in (False, True):
        network = build(num_classes=3).double()
        if is_compiled:
            network.compile_blocks()
        logits = network(x, sigma.double(), torch.tensor([0, 3]))
        logits.logsumexp(dim=-1).sum().backward()
        results.append((logits.detach(), [p.grad for p in network.parameters()]))
        names.append(list(network.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert names[0] == names[1]


def test_half_precision_keeps_the_head_wide(x, sigma):
    network = build()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network.trunk(x, sigma)
    assert hidden.dtype == torch.float32
    wide = network.trunk(x, sigma)
    assert (hidden - wide).abs().max() < 0.2
    assert not torch.equal(hidden, wide)


# ---------------------------------------------------------------- its head in a loss


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("fix_logistic", [False, True])
def test_a_chunked_loss_is_that_of_all_logits(x, sigma, generator, chunk, fix_logistic):
    """Value, gradients of every parameter: the logits of a chunk at a time."""
    network = build(fix_logistic=fix_logistic, num_classes=2).double()
    target = torch.randint(K, (B * L,), generator=generator)
    weights = torch.rand(B * L, generator=generator, dtype=torch.float64)

    def loss(logits, *, target):
        return -logits.log_softmax(dim=-1).gather(-1, target[:, None]).squeeze(-1)

    results = []
    for size in (None, chunk):
        network.zero_grad()
        hidden = network.trunk(x, sigma.double(), labels=torch.tensor([0, 2]))
        head = network.head_of(hidden.flatten(0, 1))
        precision = Precision(torch.float64, torch.float64)
        total, nll = chunked_loss(
            [head], loss, {"target": target}, weights, precision=precision, chunk=size
        )
        total.backward()
        grads = [p.grad.clone() for p in network.parameters()]
        results.append((total.detach(), nll, grads))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_no_tensor_of_all_logits_in_a_chunked_loss(x, sigma, generator):
    """No tensor that a chunked loss makes has K numbers of every value."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(part, Tensor) and part.shape[-1:] in ((K,), (K + 1,)):
                    largest = max(largest, part.numel())
            return out

    network, chunk = build(), 16
    target = torch.randint(K, (B * L,), generator=generator)

    def loss(logits, *, target):
        return -logits.log_softmax(dim=-1).gather(-1, target[:, None]).squeeze(-1)

    hidden = network.trunk(x, sigma)
    head = network.head_of(hidden.flatten(0, 1))
    precision = Precision(torch.float32, torch.float32)
    with Watch():
        total, _ = chunked_loss(
            [head],
            loss,
            {"target": target},
            torch.ones(B * L),
            precision=precision,
            chunk=chunk,
        )
        total.backward()
    assert 0 < largest <= chunk * (K + 1)


# ---------------------------------------------------------------- refusals

UNET = ("algo=duo_base", "algo.backbone=unet", "model=unet", "data=cifar10")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.size=1000", ["model.size=1000", "square"]),
        ("model.size=900", ["model.size=900", "multiple of 8"]),
        ("model.length=1024", ["model.length=1024", "3072"]),
        ("model.ch_mult=[1,2]", ["model.ch_mult=[1, 2]", "num_scales=4"]),
        ("model.time_embed_dim=7", ["model.time_embed_dim=7", "even"]),
        ("model.scale_count_to_put_attn=4", ["put_attn=4", "num_scales=4"]),
        ("model.ch=130", ["model.ch=130", "multiple of 4"]),
        ("algo.causal_attention=True", ["unet is not causal"]),
        ("model=tiny", ["model.type", "unet"]),
    ],
)
def test_sizes_that_make_no_network_are_refused(compose, override, words):
    from models.registry import validate_backbone

    config = compose(*UNET, override, tiny=False)
    with pytest.raises(ConfigError) as error:
        validate_backbone(config)
    assert all(word in str(error.value) for word in words), str(error.value)
