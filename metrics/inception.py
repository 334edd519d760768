"""The Inception network of FID, and what else makes features and logits of images.

The network is InceptionV3 as in the TensorFlow graph of 2015-12-05, which the published
FIDs are measured with. Its parameters have the names under which ported weights are
spread: `Conv2d_1a_3x3.conv.weight`, ..., `Mixed_7c.branch_pool.bn.running_var`,
`fc.weight`. It differs from the later InceptionV3 in four things: average pooling of
the mixed blocks leaves out the padding, the last block pools by the maximum, there are
1008 classes, and images are resized as TensorFlow 1 does.

Shapes: n images, H height, W width, C channels.

Reference: Szegedy et al. (arXiv:1512.00567); Heusel et al. (arXiv:1706.08500).
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.device import to_device
from utils import ConfigError

SIZE = 299  # height and width of what the network sees
FEATURES = 2048
CLASSES = 1008
BATCHES_SEEN = "num_batches_tracked"  # by batch norms; some files have it
KEY = "eval.fid_features"


class Extractor(Protocol):
    """Images as bytes, (n, 3, H, W) uint8, to features (n, d) and logits (n, k) or
    None."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the class."""


# ---------------------------------------------------------------- the network


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; the padding keeps the size unless
    it is given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (height // 2, width // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(
            inputs, outputs, (height, width), stride, padding=same, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def halving(inputs: int, outputs: int) -> Conv:
    """3x3 of stride 2 without padding."""
    return Conv(inputs, outputs, 3, stride=2, padding=0)


def average(x: Tensor) -> Tensor:
    """3x3 average of stride 1; at the borders over fewer positions."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """3x3 maximum of stride 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halved(x: Tensor) -> Tensor:
    """3x3 maximum of stride 2 without padding."""
    return F.max_pool2d(x, 3, stride=2)


class Mixed5(nn.Module):
    """Mixed_5b, 5c and 5d: 1x1, 5x5, two 3x3, pool; 224 channels and those of the
    pool."""

    def __init__(self, inputs: int, of_pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, of_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average(x)),
        )
        return torch.cat(branches, dim=1)


class Mixed6a(nn.Module):
    """From 288 channels to 768 of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = halving(288, 384)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = halving(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, halved(x)), dim=1)


class Mixed6(nn.Module):
    """Mixed_6b to 6e: 1x1, 7x7 as a row and a column, that twice, pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, column)
        self.branch7x7dbl_3 = Conv(width, width, row)
        self.branch7x7dbl_4 = Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(double),
            self.branch_pool(average(x)),
        )
        return torch.cat(branches, dim=1)


class Mixed7a(nn.Module):
    """From 768 channels to 1280 of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = halving(192, 320)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = halving(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = (
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            halved(x),
        )
        return torch.cat(branches, dim=1)


class Mixed7(nn.Module):
    """Mixed_7b and 7c, to 2048 channels; they differ in how the last branch pools."""

    def __init__(self, inputs: int, by_maximum: bool) -> None:
        super().__init__()
        self.pool = maximum if by_maximum else average
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )
        return torch.cat(branches, dim=1)


class Inception(nn.Module):
    """Images as bytes to pooled features (n, 2048) and logits (n, 1008).

    The logits are those without the bias of `fc`, which Inception Scores are made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = halving(3, 32)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed5(192, of_pool=32)
        self.Mixed_5c = Mixed5(256, of_pool=64)
        self.Mixed_5d = Mixed5(288, of_pool=64)
        self.Mixed_6a = Mixed6a()
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, by_maximum=False)
        self.Mixed_7c = Mixed7(2048, by_maximum=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resized(images.float(), SIZE) - 128) / 128  # (n, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halved(x)  # (n, 64, 73, 73)
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (n, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (n, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (n, 2048, 8, 8)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> "Inception":
        """The network with weights of a file, ready to evaluate.

        Raises:
            ConfigError: If names or shapes are not those of this network.
        """
        with torch.device("meta"):
            network = cls()
        wanted = {k: x.shape for k, x in network.state_dict().items()}
        wanted = {k: x for k, x in wanted.items() if not k.endswith(BATCHES_SEEN)}
        given = {k: x for k, x in weights.items() if not k.endswith(BATCHES_SEEN)}
        for name in sorted(wanted.keys() | given.keys()):
            there = given[name].shape if name in given else None
            if there != wanted.get(name):
                shapes = (
                    "is not there" if x is None else f"is {tuple(x)}"
                    for x in (there, wanted.get(name))
                )
                in_file, in_network = shapes
                raise ConfigError(
                    f"{KEY}: the file's weights are not those of FID's Inception "
                    f"network: {name} {in_file}; in the network it {in_network}."
                )
        network.load_state_dict(
            {name: x.float() for name, x in given.items()}, strict=False, assign=True
        )
        for name, buffer in network.named_buffers():
            if name.endswith(BATCHES_SEEN):
                module = network.get_submodule(name.rpartition(".")[0])
                module.num_batches_tracked = torch.zeros_like(buffer, device="cpu")
        return network.eval().requires_grad_(False)


def resized(x: Tensor, size: int) -> Tensor:
    """Bilinear to (size, size) as TensorFlow 1 does: pixel i of the result lies at
    i * H / size of the source, not at the centre of its share. (n, C, H, W)."""
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(size, dtype=torch.float64) * (length / size)
        low = at.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        shape = [size, 1] if dim == 2 else [size]
        part = to_device((at - low).to(x.dtype).view(shape), x.device)
        below, above = (
            x.index_select(dim, to_device(index, x.device)) for index in (low, high)
        )
        x = below + (above - below) * part
    return x


# ---------------------------------------------------------------- of the user's own


class Scripted(nn.Module):
    """An extractor of TorchScript: of images as bytes it gives features, or features
    and logits.

    Scripts of the Inception network whose `forward` has an argument `return_features`
    are asked for features by it, and for probabilities by `no_output_bias`.
    """

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script
        schema = getattr(script, "forward", None)
        arguments = getattr(getattr(schema, "schema", None), "arguments", ())
        self.names = {argument.name for argument in arguments}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if "return_features" in self.names:
            features = self.script(images, return_features=True)
            if "no_output_bias" not in self.names:
                return features, None
            probs = self.script(images, no_output_bias=True)
            return features, probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
        found = self.script(images)
        if isinstance(found, Tensor):
            return found, None
        features, logits = found
        return features, logits


def tried(extractor: nn.Module, images: Tensor) -> int:
    """Width d of an extractor's features, once it has been seen to work.

    Args:
        extractor: On its device.
        images: Two or more, (n, 3, H, W) uint8.

    Raises:
        ConfigError: If it does not give features (n, d), and logits (n, k) or none.
    """
    try:
        with torch.no_grad():
            features, logits = extractor(images)
        outputs = [features] if logits is None else [features, logits]
        are_rows = [x.dim() == 2 and len(x) == len(images) for x in outputs]
    except Exception as error:  # of the user's script, which may raise anything
        lines = str(error).strip().splitlines()  # the last one says what is wrong
        reason = lines[-1] if lines else type(error).__name__
        raise ConfigError(
            f"{KEY}: the extractor cannot read images {tuple(images.shape)} of bytes: "
            f"{reason}"
        ) from None
    if not all(are_rows) or not all(x.is_floating_point() for x in outputs):
        shapes = " and ".join(f"{tuple(x.shape)} of {x.dtype}" for x in outputs)
        raise ConfigError(
            f"{KEY}: of images {tuple(images.shape)} the extractor gives {shapes}, not "
            "a row of features an image (and a row of logits, or none)."
        )
    return features.shape[1]
