"""The Inception network of FID: parameters, shapes, resizing; extractors of the user's
own. Its published weights are not on this machine: what is tested is all that does not
need them."""

import re
from functools import partial

import pytest
import torch
from refusals import refused
from torch import nn

from metrics.inception import Inception, Scripted, resized, tried


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Made by hand, of a size that lets signals through."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {k: x.shape for k, x in Inception().state_dict().items()}
    made = {}
    for name, shape in shapes.items():
        if name.endswith("conv.weight"):
            x = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            x = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        elif name.endswith("num_batches_tracked"):
            continue
        else:
            x = 0.02 * torch.randn(shape, generator=generator)
        made[name] = x
    return made


@pytest.fixture(scope="module")
def network(weights) -> Inception:
    return Inception.of_weights(weights)


def images(count: int, side: int = 32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, side, side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------- parameters

BRANCHES = {
    "Mixed_5[bcd]": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "Mixed_6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "Mixed_6[bcde]": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 "
    "7x7dbl_5 _pool",
    "Mixed_7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "Mixed_7[bc]": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b "
    "_pool",
}
STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")


def test_every_parameter_has_its_published_name():
    """94 convolutions, each with a batch norm, and the classes."""
    convolutions = {f"Conv2d_{name}" for name in STEM}
    for blocks, branches in BRANCHES.items():
        front, letters = re.fullmatch(r"(Mixed_\d)\[?(\w+)\]?", blocks).groups()
        convolutions |= {
            f"{front}{letter}.branch{name}"
            for letter in letters
            for name in branches.split()
        }
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    expected = {f"{name}.{part}" for name in convolutions for part in parts}
    expected |= {"fc.weight", "fc.bias"}
    names = {x for x in Inception().state_dict() if "num_batches" not in x}
    assert len(convolutions) == 94
    assert names == expected


SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch_pool.bn.running_var": (192,),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


def test_shapes_and_their_sum():
    """InceptionV3 of 1000 classes without its second head has 23,834,568 parameters;
    a class more has 2049 more."""
    network = Inception()
    state = network.state_dict()
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    count = sum(x.numel() for x in network.parameters())
    assert count == 23_834_568 + 8 * 2049
    norms = [x for x in network.modules() if isinstance(x, nn.BatchNorm2d)]
    assert {x.eps for x in norms} == {1e-3}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda x: x.pop("fc.bias"), ["fc.bias is not there", "(1008,)"]),
        (
            lambda x: x.update({"AuxLogits.fc.weight": torch.zeros(3)}),
            ["AuxLogits.fc.weight is (3,)", "in the network it is not there"],
        ),
        (
            lambda x: x.update({"fc.weight": torch.zeros(1000, 2048)}),
            ["fc.weight is (1000, 2048)", "is (1008, 2048)"],
        ),
    ],
)
def test_other_weights_are_refused(weights, change, parts):
    given = dict(weights)
    change(given)
    refused(partial(Inception.of_weights, given), "eval.fid_features", *parts)


def test_counters_of_batches_do_not_matter(weights, network):
    more = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    other = Inception.of_weights({**weights, **more})
    x = images(1)
    assert torch.equal(other(x)[0], network(x)[0])


# ---------------------------------------------------------------- what it computes

SEEN = {
    "Conv2d_1a_3x3": (32, 149, 149),
    "Conv2d_2b_3x3": (64, 147, 147),
    "Conv2d_4a_3x3": (192, 71, 71),
    "Mixed_5b": (256, 35, 35),
    "Mixed_5d": (288, 35, 35),
    "Mixed_6a": (768, 17, 17),
    "Mixed_6e": (768, 17, 17),
    "Mixed_7a": (1280, 8, 8),
    "Mixed_7c": (2048, 8, 8),
}


@torch.no_grad()
def test_outputs(network):
    """Shapes all the way; features are means of positives; the logits leave the bias
    out."""
    seen = {}
    for name in SEEN:
        network.get_submodule(name).register_forward_hook(
            lambda _, __, x, name=name: seen.update({name: tuple(x.shape[1:])})
        )
    features, logits = network(images(2))
    assert seen == SEEN
    assert features.shape == (2, 2048)
    assert (features >= 0).all()
    torch.testing.assert_close(logits, features @ network.fc.weight.T)
    assert not network.training
    assert not any(x.requires_grad for x in network.parameters())


@torch.no_grad()
def test_a_batch_is_its_images(network):
    """Whatever is beside an image, its features are the same; and the same again."""
    x = images(3)
    together, again = network(x), network(x)
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one, other)
    alone = [torch.cat(parts) for parts in zip(*map(network, x.split(1)), strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0][0], together[0][1])


@torch.no_grad()
def test_pooling_of_the_blocks():
    """Averages at a border are over what is there; Mixed_7c alone pools by maximum."""
    network = Inception()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    average = network.Mixed_7b.pool(x)[0, 0]
    assert float(average[0, 0]) == (0 + 1 + 4 + 5) / 4
    assert float(average[1, 1]) == x[0, 0, :3, :3].mean()
    maximum = network.Mixed_7c.pool(x)[0, 0]
    assert (float(maximum[0, 0]), float(maximum[3, 3])) == (5, 15)


# ---------------------------------------------------------------- resizing


def by_hand(x: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resizing of TensorFlow 1, a pixel at a time; (C, H, W)."""
    channels, height, width = x.shape
    out = torch.zeros(channels, size, size)
    for i in range(size):
        for j in range(size):
            y, z = i * height / size, j * width / size
            top, left = int(y), int(z)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = x[:, top, left] + (x[:, top, right] - x[:, top, left]) * (z - left)
            lower = x[:, below, left]
            lower = lower + (x[:, below, right] - lower) * (z - left)
            out[:, i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize(
    ("height", "width", "size"), [(8, 8, 37), (32, 32, 45), (5, 9, 4), (7, 7, 7)]
)
def test_resizing_is_that_of_tensorflow_1(height, width, size):
    generator = torch.Generator().manual_seed(0)
    x = 255 * torch.rand(2, 3, height, width, generator=generator)
    found = resized(x, size)
    for one, other in zip(x, found, strict=True):
        torch.testing.assert_close(other, by_hand(one, size), rtol=1e-5, atol=1e-4)


def test_resizing_to_the_same_size_is_nothing():
    x = images(1, 299).float()
    assert torch.equal(resized(x, 299), x)


# ---------------------------------------------------------------- scripts


class Colours(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[2, 3])


class Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean(dim=[2, 3])
        return x, 2 * x


class Detector(nn.Module):
    """As the scripts that are spread with another project's weights."""

    def forward(
        self,
        images: torch.Tensor,
        return_features: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        x = images.float().mean(dim=[2, 3])
        if return_features:
            return x
        bias = torch.zeros(3) if no_output_bias else torch.ones(3).cumsum(0)
        return (x / 50 + bias).softmax(dim=-1)


def test_what_scripts_give():
    """Features alone, with logits, or both on demand; probabilities are logits, too."""
    x = images(2)
    colours = x.float().mean(dim=(2, 3))
    scripted = [
        Scripted(torch.jit.script(kind())) for kind in (Colours, Pair, Detector)
    ]
    features, logits = zip(*(one(x) for one in scripted), strict=True)
    for found in features:
        torch.testing.assert_close(found, colours)
    assert logits[0] is None
    torch.testing.assert_close(logits[1], 2 * colours)
    torch.testing.assert_close(logits[2].softmax(-1), (colours / 50).softmax(-1))
    assert [tried(one, x) for one in scripted] == [3, 3, 3]


class Flat(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[1, 2, 3])


class Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class Bytes(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.float().flatten(1))


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (Flat, "gives (2,) of torch.float32"),
        (Maps, "gives (2, 3, 32, 32)"),
        (Bytes, "of torch.uint8"),
        (Narrow, "cannot read images (2, 3, 32, 32) of bytes"),
    ],
)
def test_scripts_that_are_no_extractors_are_refused(kind, part):
    extractor = Scripted(torch.jit.script(kind()))
    refused(partial(tried, extractor, images(2)), "eval.fid_features", part)
