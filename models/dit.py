"""The transformer backbone: a DiT with adaptive layer norm, or a causal transformer.

One family: `causal=True` drops the noise conditioning and masks the future. A
backbone is a `trunk` (everything up to the hidden states) and a `head` (one linear
map onto the vocabulary), callable apart, so that losses and samplers can ask for
hidden states without paying for (B, L, K) logits.

Shapes: B batch, L length, K vocabulary, D hidden size, C conditioning size,
H heads. Parameter names are those of the released checkpoints.

Precision: embedding, noise embedding, rotary tables, layer norms and the residual
stream are float32 under autocast; matrix products follow autocast.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from omegaconf import DictConfig
from torch import Tensor, nn

from models.attention import KERNELS, KVCache, attend, flash_is_installed
from models.blocks import MASKS
from models.conditioning import ClassEmbedding
from models.network import Network
from models.registry import SoftInput
from utils import ConfigError, choose

# New keys and values (B, l, H, D / H) -> those of all tokens so far.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DIT(Network):
    """Diffusion transformer.

    Args:
        vocab_size: K, a mask entry included where there is one.
        hidden_size: D; a multiple of 2 n_heads.
        cond_dim: C; unused when causal.
        n_blocks: Number of transformer blocks.
        n_heads: H.
        dropout: Rate on both residual branches.
        causal: Left-to-right attention and no noise conditioning.
        attention: Kernel, a key of `models.attention.KERNELS`.
        length: Longest sequence expected; longer ones work, too.
        num_classes: Of labels; None for a network without classes.
        checkpointing: Whether backward computes the inside of each block again
            instead of keeping it: less memory for about a third more work.

    Reference: DiT (arXiv:2212.09748), adaLN-Zero; used for text by SEDD
    (arXiv:2310.16834), MDLM (arXiv:2406.07524) and DUO (arXiv:2506.10892).
    """

    takes_soft_inputs = True
    can_be_causal = True
    takes_blocks = True
    half_parts = True

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        cond_dim: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
        causal: bool = False,
        attention: str = "auto",
        length: int = 0,
        checkpointing: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if causal and num_classes is not None:
            raise ValueError("a causal transformer takes no labels")
        choose(KERNELS, attention, "model.attention")
        if attention == "flash" and not flash_is_installed():
            raise ConfigError(
                "model.attention='flash' needs the flash-attn package, which is not "
                "installed; choose auto or sdpa."
            )
        if hidden_size % (2 * n_heads):
            raise ConfigError(
                f"model.hidden_size={hidden_size} is not a multiple of "
                f"2 x model.n_heads={n_heads}."
            )
        self.causal = causal
        self.attention = attention
        self.checkpointing = checkpointing
        self.vocab_embed = Embedding(vocab_size, hidden_size)
        if not causal:
            self.sigma_map = NoiseEmbedding(cond_dim)
        self.num_classes = num_classes
        if num_classes is not None:
            self.cond_map = ClassEmbedding(num_classes, cond_dim, std=0.02)
        self.rotary_emb = Rotary(hidden_size // n_heads, length)
        block_cond_dim = None if causal else cond_dim
        self.blocks = nn.ModuleList(
            Block(hidden_size, n_heads, block_cond_dim, dropout, causal, attention)
            for _ in range(n_blocks)
        )
        self.output_layer = OutputLayer(hidden_size, vocab_size, block_cond_dim)

    @classmethod
    def from_config(cls, config: DictConfig, vocab_size: int) -> Self:
        """Builds the backbone that `config.model` and `config.algo` describe."""
        model = config.model
        return cls(
            vocab_size=vocab_size,
            hidden_size=model.hidden_size,
            cond_dim=model.cond_dim,
            n_blocks=model.n_blocks,
            n_heads=model.n_heads,
            dropout=model.dropout,
            causal=config.algo.causal_attention,
            attention=model.attention,
            length=model.length,
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
        """Hidden states that `head` maps to logits.

        Args:
            x: Token ids (B, L); or (B, L, K) floats whose softmax mixes the embedding
                rows; or an object that mixes them itself.
            sigma: Noise level -log(alpha_t) of each sequence, (B,); None when causal.
            cache: Tokens before x. When causal, x is one token, or the first ones,
                and the cache then holds x, too. Else x is a block, whose tokens see
                each other and the cache; or several, each with those before it. The
                cache's `keep` then says whether it holds them.
            labels: Class of each sequence, (B,), `num_classes` being none; or None.

        Returns:
            (B, L, D), final norm and modulation included.
        """
        device = self.vocab_embed.embedding.device.type
        with torch.autocast(device, enabled=False):
            h = self.vocab_embed(x)  # (B, L, D)
            c = None if self.causal else F.silu(self.condition(sigma, labels))  # (B, C)
            start = 0 if cache is None else cache.length
            rotary = self.rotary_emb(start + h.shape[1])  # 2 x (L, D / H)
        mask = None if cache is None else cache.mask(h.shape[1], h.device)
        for layer, block in enumerate(self.blocks):
            if cache is not None:  # not compiled: its shapes change with every token
                past = functools.partial(cache.extend, layer)
                rows = tuple(table[start:] for table in rotary)
                h = block.forward(h, c, rows, past, mask)
            else:
                h = self.run_block(block, h, c, rotary)
        if cache is not None and self.causal:
            cache.keep(h.shape[1])
        return self.output_layer.modulated_norm(h, c)

    def blockwise(
        self,
        x: Tensor | SoftInput,
        x0: Tensor,
        sigma: Tensor,
        block_size: int | Tensor,
        labels: Tensor | None = None,
        *,
        sigma_0: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of noisy blocks, each given the clean blocks before it.

        Both are seen at once, as `models.blocks` says: 2 L positions, of which the
        second L have the position embeddings of the first. `trunk`, with blocks of all
        L tokens.

        Args:
            x: Noisy tokens, as for `trunk`.
            x0: Clean ids, (B, L).
            sigma: What is told of the noise: of each token (B, L), of each block
                (B, ceil(L / L')) where all rows have the same L', or of a row (B, 1).
            block_size: L', the tokens of a block; or of each row, (B,).
            labels: As for `trunk`.
            sigma_0: What is told of the noise of clean tokens, (B,); None: sigma
                (B, 1), as to a network that does not know the time.

        Returns:
            (B, L, D) of the noisy tokens, final norm and modulation included.
        """
        L, device = x0.shape[1], x0.device
        if isinstance(block_size, int) and block_size >= L:
            return self.trunk(x, sigma[:, 0], labels=labels)
        sizes = block_size
        if isinstance(sizes, int):
            sizes = torch.full((1,), sizes, device=device)
        head_dim = self.rotary_emb.cos.shape[-1]
        with torch.autocast(device.type, enabled=False):
            h = torch.cat([self.vocab_embed(x), self.vocab_embed(x0)], dim=1)
            c = self._condition_of_both(sigma, sigma_0, block_size, labels, L)
            rotary = tuple(table.repeat(2, 1) for table in self.rotary_emb(L))
        mask = MASKS[self.attention](L, sizes, head_dim)
        for block in self.blocks:
            h = self.run_block(block, h, c, rotary, None, mask)
        return self.output_layer.modulated_norm(
            h[:, :L], c if c.ndim == 2 else c[:, :L]
        )

    def _condition_of_both(
        self,
        sigma: Tensor,
        sigma_0: Tensor | None,
        block_size: int | Tensor,
        labels: Tensor | None,
        length: int,
    ) -> Tensor:
        """Conditioning of noisy and clean tokens, (B, 2 L, C), or of rows, (B, C)."""
        if sigma_0 is None:
            return F.silu(self.condition(sigma[:, 0], labels))
        levels = torch.cat([sigma, sigma_0[:, None]], dim=1)  # (B, M + 1)
        num_levels = levels.shape[1]
        if labels is not None:
            labels = labels.repeat_interleave(num_levels)
        c = F.silu(self.condition(levels.flatten(), labels))
        c = c.unflatten(0, (-1, num_levels))  # (B, M + 1, C)
        widths = {1: length, length: 1}  # tokens of a level
        width = widths.get(num_levels - 1, block_size)
        which = torch.arange(length, device=c.device) // width
        clean = torch.full_like(which, num_levels - 1)
        return c.index_select(1, torch.cat([which, clean]))

    def condition(self, sigma: Tensor | None, labels: Tensor | None) -> Tensor:
        """The embedding of noise levels (B,) and of classes (B,), (B, C)."""
        return self.with_classes(self.sigma_map(sigma), labels)

    # Not an attribute, which would give the weights a second name in checkpoints.
    @property
    def output_embedding(self) -> nn.Linear:  # type: ignore[override]
        """The head's weight (K, D) and bias (K,)."""
        return self.output_layer.linear

    @property
    def input_embedding(self) -> nn.Parameter:  # type: ignore[override]
        """The rows of the tokens, (K, D)."""
        return self.vocab_embed.embedding

    def trunk_flops(self, length: int) -> float:
        """FLOP of the trunk's matrix products, forward, for a token of a row.

            n_blocks (24 D^2 + 4 L D)

        The weights of a block are 12 D^2 numbers. Attention is counted as if all saw
        all; left to right it could do with half.
        """
        D = self.input_embedding.shape[1]
        return len(self.blocks) * (24 * D**2 + 4 * length * D)

    def parts(self) -> list[nn.Module]:
        return list(self.blocks)

    def compile_blocks(self) -> None:
        """Compiles each block in place; parameter names stay as they are."""
        for block in self.blocks:
            block.compile()


class Embedding(nn.Module):
    """Embedding rows, averaged where the input is not a plain id."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x: Tensor | SoftInput) -> Tensor:
        return embedded(x, self.embedding)


def embedded(x: Tensor | SoftInput, embedding: Tensor) -> Tensor:
    """Rows of (K, D) for ids (B, L), or the averages that x means, (B, L, D)."""
    if not isinstance(x, Tensor):
        return x.embed(embedding)
    if x.is_floating_point():
        return x.to(embedding.dtype).softmax(dim=-1) @ embedding
    return F.embedding(x, embedding)


class NoiseEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (B,) -> (B, C)."""

    num_features = 256
    max_period = 10_000

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.num_features, cond_dim),
            nn.SiLU(),
            nn.Linear(cond_dim, cond_dim),
        )

    def forward(self, sigma: Tensor) -> Tensor:
        first = cast(nn.Linear, self.mlp[0])  # a Sequential does not know its parts
        dtype = first.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return self.mlp(self.features(sigma, wide).to(dtype))

    @classmethod
    def features(cls, sigma: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """cos and sin of sigma at geometrically spaced frequencies, (B, 256)."""
        half = cls.num_features // 2
        exponent = torch.arange(half, dtype=dtype, device=sigma.device) / half
        frequency = torch.exp(-math.log(cls.max_period) * exponent)
        angle = sigma.to(dtype)[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Rotary(nn.Module):
    """Tables of the rotary position embedding over the whole head dimension.

    Reference: RoFormer (arXiv:2104.09864), in the half-split layout.
    """

    inv_freq: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int = 0, base: float = 10_000.0) -> None:
        super().__init__()
        # On the host, also of a network on `meta`, whose tensors have no numbers.
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        exponent = steps / head_dim
        self.frequency = tuple((1.0 / base**exponent).tolist())
        self.register_buffer("inv_freq", torch.tensor(self.frequency))  # in checkpoints
        self._tabulate(length)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (L, head_dim)."""
        # Casts of the module, which sharding makes too, round its buffers.
        is_rounded = self.cos.dtype in (torch.float16, torch.bfloat16)
        if is_rounded or len(self.cos) < length:
            self._tabulate(length)
        return self.cos[:length], self.sin[:length]

    @torch.inference_mode(False)  # training uses them, too
    def _tabulate(self, length: int) -> None:
        device = self.inv_freq.device
        position = torch.arange(length, dtype=torch.float32, device=device)
        frequency = torch.tensor(self.frequency, device=device)
        angle = torch.outer(position, frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys by their position, (B, L, H, head_dim)."""
    cos, sin = (table[:, None, :] for table in rotary)  # (L, 1, head_dim)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weight = self.weight.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, eps=1e-5)


def per_token(x: Tensor) -> Tensor:
    """(B, E) or (B, L, E) -> (B, 1, E) or (B, L, E), which goes with (B, L, E)."""
    return x[:, None] if x.ndim == 2 else x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Pre-norm attention and MLP; with conditioning, adaLN-Zero around both.

    Args:
        hidden_size: D.
        n_heads: H.
        cond_dim: C, or None for no conditioning.
        dropout: Rate on both residual branches.
        causal: Whether attention is causal.
        attention: Attention kernel.
    """

    def __init__(
        self,
        hidden_size: int,
        n_heads: int,
        cond_dim: int | None,
        dropout: float,
        causal: bool,
        attention: str,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.causal = causal
        self.attention = attention
        self.norm1 = LayerNorm(hidden_size)
        self.attn_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attn_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        if cond_dim is not None:
            self.adaLN_modulation = zero_linear(cond_dim, 6 * hidden_size)

    def forward(
        self,
        h: Tensor,
        c: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        extend: Extend | None = None,
        mask: Any = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D).

        Args:
            h: (B, L, D).
            c: Conditioning of rows (B, C), or of tokens (B, L, C).
            rotary: cos and sin of the positions, (L, D / H) each.
            extend: Puts earlier keys and values in front.
            mask: What each position attends to, as for `attend`; None: all.
        """
        if c is None:
            h = h + self._drop(self._attention(self.norm1(h), rotary, extend))
            return h + self._drop(self.mlp(self.norm2(h)))
        modulation = per_token(self.adaLN_modulation(c)).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = modulate(self.norm1(h), shift_attn, scale_attn)
        h = h + gate_attn * self._drop(self._attention(x, rotary, extend, mask))
        x = modulate(self.norm2(h), shift_mlp, scale_mlp)
        return h + gate_mlp * self._drop(self.mlp(x))

    def _attention(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        extend: Extend | None = None,
        mask: Any = None,
    ) -> Tensor:
        qkv = self.attn_qkv(x)
        q, k, v = rearrange(
            qkv, "b l (three h d) -> three b l h d", three=3, h=self.n_heads
        )
        q, k = rotate(q, rotary), rotate(k, rotary)
        if extend is not None:
            k, v = extend(k, v)
        causal = self.causal and q.shape[1] > 1  # the last token sees all
        out = attend(q, k, v, causal=causal, kernel=self.attention, mask=mask)
        return self.attn_out(out.flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class OutputLayer(nn.Module):
    """Final norm with modulation, and the linear map onto the vocabulary."""

    def __init__(self, hidden_size: int, vocab_size: int, cond_dim: int | None) -> None:
        super().__init__()
        self.norm_final = LayerNorm(hidden_size)
        self.linear = zero_linear(hidden_size, vocab_size)
        if cond_dim is not None:
            self.adaLN_modulation = zero_linear(cond_dim, 2 * hidden_size)

    def modulated_norm(self, h: Tensor, c: Tensor | None) -> Tensor:
        h = self.norm_final(h)
        if c is None:
            return h
        shift, scale = per_token(self.adaLN_modulation(c)).chunk(2, dim=-1)
        return modulate(h, shift, scale)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear map that starts at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
