"""The convolutional backbone for images: a U-Net with a logistic head.

Its hidden states are two numbers for each value of the image, location and log-scale
of a distribution over pixel values, of which the head makes logits. So what exists of
all pixels at a time is (B, L, 2), never (B, L, K).

Shapes: B batch, H = W side, L = 3 H W values in order (channel, row, column), K
vocabulary, C channels, E width of the time embedding. Parameter names are those of the
published code.

Precision: the embedding, the group norms and the head are float32 under autocast;
convolutions and matrix products follow autocast.
"""

import functools
import math
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor, nn

from models.attention import KERNELS, KVCache, attend
from models.conditioning import ClassEmbedding
from models.head import Head
from models.logistic import logistic_logits
from models.network import Network
from models.registry import SoftInput, num_groups
from utils import CHANNELS, choose

MAX_PERIOD = 10_000


class UNet(Network):
    """U-Net over pixel ids.

    Args:
        vocab_size: K, a mask entry included where there is one. Ids are centred by it:
            id k enters as 2 k / K - 1.
        side: H, a multiple of 2^(num_scales - 1).
        ch: Channels of the first level.
        ch_mult: Channels of each level, in multiples of `ch`.
        num_res_blocks: Residual blocks of each level.
        attention_level: The level whose residual blocks are followed by attention.
        time_embed_dim: Sinusoids of the noise level, an even number from 4 on.
        time_scale_factor: What the noise level is multiplied by first.
        dropout: Rate within residual blocks.
        skip_rescale: Whether residual sums are divided by sqrt(2).
        fix_logistic: See `logistic_logits`.
        num_classes: Of labels; None for a network without classes.
        adds_null_class: Whether no label means the class "none", and not nothing.
        attention: Kernel, a key of `models.attention.KERNELS`.
        checkpointing: Whether backward computes the inside of each block again.

    Reference: D3PM (arXiv:2107.03006), whose U-Net is that of DDPM (arXiv:2006.11239);
    DUO chapter II (arXiv:2602.21185).
    """

    takes_soft_inputs = True

    def __init__(
        self,
        *,
        vocab_size: int,
        side: int,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attention_level: int,
        time_embed_dim: int,
        time_scale_factor: float = 1000,
        dropout: float = 0.0,
        skip_rescale: bool = True,
        fix_logistic: bool = False,
        num_classes: int | None = None,
        adds_null_class: bool = True,
        attention: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        choose(KERNELS, attention, "model.attention")
        self.vocab_size = vocab_size
        self.side = side
        self.num_classes = num_classes
        self.time_embed_dim = time_embed_dim
        self.time_scale_factor = time_scale_factor
        self.checkpointing = checkpointing
        self.logistic = functools.partial(
            logistic_logits, vocab_size=vocab_size, fix_logistic=fix_logistic
        )
        width = 4 * ch  # E
        self.temb_modules = nn.ModuleList(
            [_zero_bias(time_embed_dim, width), _zero_bias(width, width)]
        )
        if num_classes is not None:
            self.cond_map = ClassEmbedding(num_classes, width, adds_null_class)
        self.input_conv = _conv3(CHANNELS, ch)

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, width, dropout, skip_rescale)

        def attend_at(level: int, channels: int) -> list[nn.Module]:
            if level != attention_level:
                return []
            return [AttentionBlock(channels, skip_rescale, attention)]

        widths = [ch * multiple for multiple in ch_mult]
        last = len(widths) - 1
        channels, skips, down = ch, [ch], []
        for level, outputs in enumerate(widths):
            for _ in range(num_res_blocks):
                down += [residual(channels, outputs), *attend_at(level, outputs)]
                channels = outputs
                skips.append(channels)
            if level != last:
                down.append(Downsample(channels))
                skips.append(channels)
        middle = [
            residual(channels, channels),
            AttentionBlock(channels, skip_rescale, attention),
            residual(channels, channels),
        ]
        up: list[nn.Module] = []
        for level, outputs in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                up += [residual(channels + skips.pop(), outputs)]
                up += attend_at(level, outputs)
                channels = outputs
            if level != 0:
                up.append(Upsample(channels))
        self.downsampling_modules = nn.ModuleList(down)
        self.middle_modules = nn.ModuleList(middle)
        self.upsampling_modules = nn.ModuleList(up)
        self.output_modules = nn.ModuleList(
            [GroupNorm(channels), _conv3(channels, 2 * CHANNELS)]
        )

    @classmethod
    def from_config(cls, config: DictConfig, vocab_size: int) -> Self:
        """Builds the network that `config.model` and `config.data` describe."""
        model = config.model
        return cls(
            vocab_size=vocab_size,
            side=math.isqrt(model.size),
            ch=model.ch,
            ch_mult=tuple(model.ch_mult),
            num_res_blocks=model.num_res_blocks,
            attention_level=model.scale_count_to_put_attn,
            time_embed_dim=model.time_embed_dim,
            time_scale_factor=model.time_scale_factor,
            dropout=model.dropout,
            skip_rescale=model.skip_rescale,
            fix_logistic=model.fix_logistic,
            num_classes=config.data.num_classes,
            adds_null_class=config.algo.compat != "reference",
            attention=model.attention,
            checkpointing=config.training.activation_checkpointing,
        )

    def trunk(
        self,
        x: Tensor | SoftInput,
        sigma: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Location and log-scale of every value, (B, L, 2).

        Args:
            x: Ids (B, L); or an object that mixes what the ids enter as.
            sigma: Noise level -log(alpha_t) of each image, (B,).
            cache: None; the network is not causal.
            labels: Class of each image, (B,), `num_classes` being none; or None.
        """
        centred = self.centred(x)  # (B, 3, H, W)
        with torch.autocast(centred.device.type, enabled=False):
            temb = self.embedded(sigma, labels)  # (B, E)
        out = self.body(centred, temb).to(centred.dtype)
        shift, log_scale = out.chunk(2, dim=1)
        mu = torch.tanh(centred + shift)
        return torch.stack([mu.flatten(1), log_scale.flatten(1)], dim=-1)

    def body(self, centred: Tensor, temb: Tensor) -> Tensor:
        """Everything with convolutions, (B, 3, H, W) and (B, E) -> (B, 6, H, W)."""
        h = self._layer(self.input_conv, centred, None)
        skips = [h]
        for module, following in _followed(self.downsampling_modules):
            h = self._layer(module, h, temb)
            if not isinstance(following, AttentionBlock):
                skips.append(h)
        for module in self.middle_modules:
            h = self._layer(module, h, temb)
        for module in self.upsampling_modules:
            if isinstance(module, ResidualBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._layer(module, h, temb)
        norm, conv = self.output_modules
        return conv(F.silu(norm(h)))

    def centred(self, x: Tensor | SoftInput) -> Tensor:
        """Ids as numbers in [-1, 1), channels last in memory, (B, 3, H, W).

            c = 2 id / K - 1

        with K the vocabulary size, a mask included: published weights were made so.
        """
        dtype = self.input_conv.weight.dtype
        if isinstance(x, Tensor):
            values = x.to(dtype)
        else:
            device = self.input_conv.weight.device
            ids = torch.arange(self.vocab_size, dtype=dtype, device=device)
            values = x.embed(ids[:, None]).squeeze(-1)
        image = rearrange(
            2 * values / self.vocab_size - 1,
            "b (c h w) -> b c h w",
            c=CHANNELS,
            h=self.side,
        )
        return image.contiguous(memory_format=torch.channels_last)

    def embedded(self, sigma: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """The embedding of noise levels (B,) and of classes (B,), (B, E)."""
        first, second = self.temb_modules
        if sigma is None:
            raise ValueError("the U-Net needs a noise level")
        e = sinusoids(self.time_scale_factor * sigma, self.time_embed_dim)
        temb = second(F.silu(first(e.to(self.input_conv.weight.dtype))))
        return self.with_classes(temb, labels)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of pixel values, (..., 2) -> (..., K)."""
        return self.logistic(hidden)

    def head_of(self, hidden: Tensor) -> Head:
        return Head(hidden, None, None, self.logistic)

    @property
    def head_weight(self) -> Tensor:
        return self.input_conv.weight

    def parts(self) -> list[nn.Module]:
        """What the lists of the three stretches hold, in float32 as their norms are."""
        return [
            *self.downsampling_modules,
            *self.middle_modules,
            *self.upsampling_modules,
        ]

    def compile_blocks(self) -> None:
        """Compiles the body as one graph for each batch size, and no name changes.

        Blocks of a U-Net differ in their shapes: compiled one by one they would be too
        many kinds of one piece of code, and dynamic shapes fail on CPUs.
        """
        self.body = torch.compile(self.body, dynamic=False)  # type: ignore[method-assign]

    def _layer(self, module: nn.Module, h: Tensor, temb: Tensor | None) -> Tensor:
        """A module of one of the lists; residual blocks take the embedding, too."""
        inputs = (h, temb) if isinstance(module, ResidualBlock) else (h,)
        return self.run_block(module, *inputs)


def sinusoids(x: Tensor, dim: int) -> Tensor:
    """sin and cos of x at geometrically spaced frequencies, (B,) -> (B, dim).

    exp(-j log(10000) / (dim/2 - 1)) for j = 0 .. dim/2 - 1; all sines come first.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - 1)
    frequency = torch.exp(-math.log(MAX_PERIOD) * exponent)
    angle = x.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class GroupNorm(nn.GroupNorm):
    """Group norm over at most 32 groups of at least 4 channels, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups(channels), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class NiN(nn.Module):
    """A linear map of the channels of each pixel, (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, inputs: int, outputs: int, scale: float = 0.1) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(inputs, outputs))
        self.b = nn.Parameter(torch.zeros(outputs))
        bound = math.sqrt(3 * scale / ((inputs + outputs) / 2))  # of fan averages
        nn.init.uniform_(self.W, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.T[:, :, None, None], self.b)


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding between them, beside a shortcut.

    Args:
        inputs, outputs: Channels.
        width: E.
        dropout: Rate before the second convolution.
        skip_rescale: Whether the sum is divided by sqrt(2).
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, dropout: float, skip_rescale: bool
    ) -> None:
        super().__init__()
        self.groupnorm0 = GroupNorm(inputs)
        self.conv0 = _conv3(inputs, outputs)
        self.dense0 = _zero_bias(width, outputs)
        self.groupnorm1 = GroupNorm(outputs)
        self.conv1 = _conv3(outputs, outputs)
        self.nin = NiN(inputs, outputs) if inputs != outputs else None
        self.dropout = dropout
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """(B, C, H, W) and (B, E) -> (B, C', H, W)."""
        h = self.conv0(F.silu(self.groupnorm0(x)))
        h = h + self.dense0(F.silu(temb))[:, :, None, None]
        h = F.silu(self.groupnorm1(h))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        shortcut = x if self.nin is None else self.nin(x)
        return _sum(shortcut, h, self.skip_rescale)


class AttentionBlock(nn.Module):
    """Attention with one head over all pixels, beside a shortcut.

    Args:
        channels: C.
        skip_rescale: Whether the sum is divided by sqrt(2).
        attention: Kernel.
    """

    def __init__(self, channels: int, skip_rescale: bool, attention: str) -> None:
        super().__init__()
        self.GroupNorm_0 = GroupNorm(channels)
        self.NIN_0 = NiN(channels, channels)
        self.NIN_1 = NiN(channels, channels)
        self.NIN_2 = NiN(channels, channels)
        self.NIN_3 = NiN(channels, channels, scale=1e-10)
        self.skip_rescale = skip_rescale
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.GroupNorm_0(x)
        q, k, v = (
            rearrange(nin(h), "b c h w -> b (h w) 1 c")
            for nin in (self.NIN_0, self.NIN_1, self.NIN_2)
        )
        out = attend(q, k, v, causal=False, kernel=self.attention)
        out = rearrange(out, "b (h w) 1 c -> b c h w", h=x.shape[2])
        return _sum(x, self.NIN_3(out), self.skip_rescale)


class Downsample(nn.Module):
    """Halves the side by a convolution that looks one row and column further."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles every pixel, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Compiled for CPUs, torch's own doubling has a gradient of 0.
        rows = torch.stack([x, x], dim=3).flatten(2, 3)
        return self.conv(torch.stack([rows, rows], dim=4).flatten(3, 4))


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _zero_bias(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.bias)
    return linear


def _sum(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    return (x + h) / math.sqrt(2) if rescale else x + h


def _followed(modules: nn.ModuleList) -> list[tuple[nn.Module, nn.Module | None]]:
    """Each module with the next one."""
    return list(zip(modules, [*modules[1:], None], strict=True))
