"""A backbone without attention: Mamba in both directions, with adaptive layer norm.

Shapes: B batch, L length, K vocabulary, D hidden size, C conditioning size, E = 2 D
inner channels, N states of a channel, R rank of the step sizes. Parameter names are
those of the published code.

Precision: embedding, noise embedding, norms, the residual stream, step sizes and states
are float32 under autocast; matrix products and convolutions follow autocast.
"""

import math
from collections.abc import Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from models.attention import KVCache
from models.conditioning import ClassEmbedding
from models.dit import NoiseEmbedding, embedded, modulate, zero_linear
from models.network import Network
from models.registry import SoftInput
from models.scan import SCANS
from utils import choose

NUM_STATES = 16  # N
WINDOW = 4  # of the convolution
EXPANSION = 2  # E / D
STEP_RANGE = (1e-3, 1e-1)  # of the step sizes at the start
SMALLEST_STEP = 1e-4  # at the start


class DiMamba(Network):
    """Bidirectional Mamba over tokens, told the noise level.

    Args:
        vocab_size: K, a mask entry included where there is one.
        hidden_size: D.
        cond_dim: C.
        n_blocks: Number of blocks.
        dropout: Rate on the residual branch.
        scan: A key of `models.scan.SCANS`.
        num_classes: Of labels; None for a network without classes.
        checkpointing: Whether backward computes the inside of each block again.

    Reference: Mamba (arXiv:2312.00752); both directions with shared projections,
    Caduceus (arXiv:2403.03234); used for diffusion by MDLM (arXiv:2406.07524).
    """

    takes_soft_inputs = True

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        cond_dim: int,
        n_blocks: int,
        dropout: float,
        scan: str = "auto",
        checkpointing: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        choose(SCANS, scan, "model.scan")
        self.checkpointing = checkpointing
        self.sigma_map = NoiseEmbedding(cond_dim)
        self.num_classes = num_classes
        if num_classes is not None:
            self.cond_map = ClassEmbedding(num_classes, cond_dim, std=0.02)
        layers = [
            Block(hidden_size, cond_dim, dropout, scan, n_blocks)
            for _ in range(n_blocks)
        ]
        trunk = _Trunk(vocab_size, hidden_size, cond_dim, layers)
        self.model = nn.ModuleDict(
            {
                "bimamba": nn.ModuleDict({"backbone": trunk}),
                "lm_head": nn.Linear(hidden_size, vocab_size, bias=False),
            }
        )

    @classmethod
    def from_config(cls, config: DictConfig, vocab_size: int) -> Self:
        """Builds the network that `config.model` and `config.data` describe."""
        model = config.model
        return cls(
            vocab_size=vocab_size,
            hidden_size=model.hidden_size,
            cond_dim=model.cond_dim,
            n_blocks=model.n_blocks,
            dropout=model.dropout,
            scan=model.scan,
            checkpointing=config.training.activation_checkpointing,
            num_classes=config.data.get("num_classes"),
        )

    def trunk(
        self,
        x: Tensor | SoftInput,
        sigma: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states that `head` maps to logits, (B, L, D).

        Args:
            x: Token ids (B, L); or (B, L, K) floats whose softmax mixes the embedding
                rows; or an object that mixes them itself.
            sigma: Noise level -log(alpha_t) of each sequence, (B,).
            cache: None; the network is not causal.
            labels: Class of each sequence, (B,), `num_classes` being none; or None.
        """
        if sigma is None:
            raise ValueError("DiMamba needs a noise level")
        trunk = self._trunk
        with torch.autocast(self.input_embedding.device.type, enabled=False):
            h = embedded(x, self.input_embedding)
            c = F.silu(self.with_classes(self.sigma_map(sigma), labels))  # (B, C)
        for block in trunk.layers:
            h = self.run_block(block, h, c)
        shift, scale = trunk.adaLN_modulation_final(c)[:, None].chunk(2, dim=-1)
        return modulate(trunk.norm_f(h), shift, scale)

    @property
    def output_embedding(self) -> nn.Linear:  # type: ignore[override]
        """The head's weight (K, D); it has no bias."""
        return cast(nn.Linear, self.model["lm_head"])

    @property
    def input_embedding(self) -> nn.Parameter:  # type: ignore[override]
        """The rows of the tokens, (K, D)."""
        return cast(nn.Parameter, self._trunk.embeddings["word_embeddings"].weight)

    @property
    def _trunk(self) -> "_Trunk":
        return cast(_Trunk, cast(nn.ModuleDict, self.model["bimamba"])["backbone"])

    def parts(self) -> list[nn.Module]:
        """The blocks, in float32: bfloat16 would round the rates of their states."""
        return list(self._trunk.layers)

    def compile_blocks(self) -> None:
        """Compiles each block in place, around its scans; names of parameters stay."""
        for block in self._trunk.layers:
            block.compile()


class _Trunk(nn.Module):
    """Parameters of all but the head, under their published names."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        cond_dim: int,
        layers: "Sequence[Block]",
    ) -> None:
        super().__init__()
        embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(embedding.weight, std=0.02)
        self.embeddings = nn.ModuleDict({"word_embeddings": embedding})
        self.layers = nn.ModuleList(layers)
        self.adaLN_modulation_final = zero_linear(cond_dim, 2 * hidden_size)
        self.norm_f = RMSNorm(hidden_size)


class RMSNorm(nn.Module):
    """x / rms(x) with a weight, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weight = self.weight.to(x.dtype)
            return F.rms_norm(x, weight.shape, weight, eps=1e-5)


class Block(nn.Module):
    """h + gate * mixer(norm(h) (1 + scale) + shift), adaLN-Zero.

    Args:
        hidden_size: D.
        cond_dim: C.
        dropout: Rate on the residual branch.
        scan: Kernel.
        n_blocks: Of the network, for the scale of the output at the start.
    """

    def __init__(
        self, hidden_size: int, cond_dim: int, dropout: float, scan: str, n_blocks: int
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.mixer = Bidirectional(hidden_size, scan, n_blocks)
        self.norm = RMSNorm(hidden_size)
        self.adaLN_modulation = zero_linear(cond_dim, 3 * hidden_size)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """(B, L, D) and (B, C) -> (B, L, D)."""
        shift, scale, gate = self.adaLN_modulation(c)[:, None].chunk(3, dim=-1)
        mixed = self.mixer(modulate(self.norm(h), shift, scale))
        return h + gate * F.dropout(mixed, self.dropout, self.training)


class Bidirectional(nn.Module):
    """forward(u) + flip(reverse(flip(u))), the projections being the same.

    As they are, both are applied once: the first commutes with the flip, the last is
    linear and the gate is before it.
    """

    def __init__(self, hidden_size: int, scan: str, n_blocks: int) -> None:
        super().__init__()
        self.mamba_fwd = Mamba(hidden_size, scan, n_blocks)
        self.mamba_rev = Mamba(hidden_size, scan, n_blocks, shares=self.mamba_fwd)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x, z = self.mamba_fwd.in_proj(u).chunk(2, dim=-1)
        y = self.mamba_fwd.states(x) + self.mamba_rev.states(x.flip(1)).flip(1)
        return self.mamba_fwd.out_proj(y.to(z.dtype) * F.silu(z))


class Mamba(nn.Module):
    """One direction: a convolution, then a selective scan, then a gate.

    Args:
        hidden_size: D.
        scan: Kernel.
        n_blocks: Of the network, for the scale of the output at the start.
        shares: Whose projections into and out of it this one has, too.
    """

    def __init__(
        self, hidden_size: int, scan: str, n_blocks: int, shares: Self | None = None
    ) -> None:
        super().__init__()
        self.scan = scan
        channels = EXPANSION * hidden_size  # E
        rank = math.ceil(hidden_size / 16)  # R
        rates = torch.arange(1, NUM_STATES + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        if shares is None:
            self.in_proj = nn.Linear(hidden_size, 2 * channels, bias=False)
        else:
            self.in_proj = shares.in_proj
        self.conv1d = nn.Conv1d(channels, channels, WINDOW, groups=channels)
        self.x_proj = nn.Linear(channels, rank + 2 * NUM_STATES, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            low, high = map(math.log, STEP_RANGE)
            step = self.dt_proj.bias.uniform_(low, high).exp_().clamp_(SMALLEST_STEP)
            step.add_(torch.log(-torch.expm1(-step)))  # softplus of it is the step
        if shares is None:
            self.out_proj = nn.Linear(channels, hidden_size, bias=False)
            with torch.no_grad():
                self.out_proj.weight /= math.sqrt(n_blocks)
        else:
            self.out_proj = shares.out_proj

    def states(self, x: Tensor) -> Tensor:
        """What the gate is put on, (B, L, E) -> (B, L, E), float32."""
        x = self.convolved(x)
        dt, B, C = self.x_proj(x).split(
            [self.dt_proj.in_features, NUM_STATES, NUM_STATES], dim=-1
        )
        dt = F.linear(dt, self.dt_proj.weight)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            bias, A_log, D = (
                tensor.to(wide) for tensor in (self.dt_proj.bias, self.A_log, self.D)
            )
            step = F.softplus(dt.to(wide) + bias)
            y = SCANS[self.scan](x, step, -A_log.exp(), B, C)
            return torch.addcmul(y, D, x.to(wide))

    def convolved(self, x: Tensor) -> Tensor:
        """silu of the convolution of each channel with what is before, (B, L, E)."""
        length = x.shape[1]
        x = F.pad(x.mT, (WINDOW - 1, 0))
        return F.silu(self.conv1d(x)[..., :length].mT)
