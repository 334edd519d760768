"""The network of `modeling_discrete_diffusion.py`: a transformer that is told the noise
level, or one that sees the past only.

Shapes: B batch, L length, l tokens in a cache, L' tokens of a block, K vocabulary, D
hidden size, H heads, C width of the conditioning.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache


class Embedding(nn.Embedding):
    """Token embedding; its weight is called `embedding` in checkpoints."""

    def __init__(self, vocab_size: int, hidden_dim: int) -> None:
        rows = torch.empty(vocab_size, hidden_dim)
        super().__init__(vocab_size, hidden_dim, _weight=rows)
        self.take(self._parameters.pop("weight"))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def take(self, weight: nn.Parameter) -> None:
        """Uses other rows, (K, D)."""
        self.embedding = weight
        self.num_embeddings = len(weight)

    @property
    def weight(self) -> Tensor:
        return self.embedding


class NoiseEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (B,) -> (B, C)."""

    num_features = 256

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.num_features, cond_dim),
            nn.SiLU(),
            nn.Linear(cond_dim, cond_dim),
        )

    def forward(self, sigma: Tensor) -> Tensor:
        half = self.num_features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angle = sigma.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Rotary(nn.Module):
    """Tables of the rotary position embedding, in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", self.frequency())  # in checkpoints

    def frequency(self, device: torch.device | None = None) -> Tensor:
        """Not `inv_freq`, which a cast of the model rounds, (head_dim / 2,)."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / 10_000.0 ** (steps / self.head_dim)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (L, 1, head_dim)."""
        device = self.inv_freq.device
        position = torch.arange(length, dtype=torch.float32, device=device)
        angle = torch.outer(position, self.frequency(device)).repeat(1, 2)[:, None]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys by their position, (B, L, H, head_dim)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        normed = F.layer_norm(x.float(), weight.shape, weight, eps=1e-5)
        return normed.to(self.weight.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Glance:
    """A cache as a pass sees it that is not kept: it does not grow.

    Args:
        whole: Keys and values of clean blocks.
        rows: Which of its sequences these are, (b,); None: all.
    """

    def __init__(self, whole: DynamicCache, rows: Tensor | None = None) -> None:
        self.whole, self.rows = whole, rows

    def get_seq_length(self) -> int:
        return self.whole.get_seq_length()

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, the new ones, (B, H, L, D / H), at the end."""
        if not self.get_seq_length():
            return k, v
        if hasattr(self.whole, "layers"):
            past = self.whole.layers[layer].keys, self.whole.layers[layer].values
        else:  # transformers before 4.54
            past = self.whole.key_cache[layer], self.whole.value_cache[layer]
        if self.rows is not None and len(self.rows) < len(past[0]):
            rows = self.rows.to(k.device)
            past = past[0][rows], past[1][rows]
        return torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)


class Block(nn.Module):
    """Pre-norm attention and MLP; with conditioning, adaLN-Zero around both."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        D = config.hidden_dim
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.causal = config.causal
        self.layer = layer
        self.norm1 = LayerNorm(D)
        self.attn_qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.norm2 = LayerNorm(D)
        self.mlp = nn.Sequential(
            nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D)
        )
        if not config.causal:
            self.adaLN_modulation = zero_linear(config.cond_dim, 6 * D)

    def forward(
        self,
        h: Tensor,
        c: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        allowed: Tensor | None = None,
        cache: DynamicCache | Glance | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        seen = rotary, allowed, cache
        if c is None:
            h = h + self._drop(self._attention(self.norm1(h), *seen))
            return h + self._drop(self.mlp(self.norm2(h)))
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = modulate(self.norm1(h), shift_attn, scale_attn)
        h = h + gate_attn * self._drop(self._attention(x, *seen))
        x = modulate(self.norm2(h), shift_mlp, scale_mlp)
        return h + gate_mlp * self._drop(self.mlp(x))

    def _attention(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        allowed: Tensor | None,
        cache: DynamicCache | Glance | None,
    ) -> Tensor:
        q, k, v = self.attn_qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D / H)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        # The last token sees all; where more is to be said, `allowed` says it.
        is_causal = self.causal and q.shape[2] > 1 and allowed is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=is_causal
        )
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class OutputLayer(nn.Module):
    """Final norm with modulation, and the linear map onto the vocabulary."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_dim)
        self.linear = zero_linear(config.hidden_dim, config.vocab_size)
        if not config.causal:
            self.adaLN_modulation = zero_linear(config.cond_dim, 2 * config.hidden_dim)

    def modulated_norm(self, h: Tensor, c: Tensor | None) -> Tensor:
        h = self.norm_final(h)
        if c is None:
            return h
        return modulate(h, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1))


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear map that starts at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Backbone(nn.Module):
    """Diffusion transformer; `causal` drops the conditioning and masks the future, and
    with `block_size` a token sees its block and those before it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.causal = config.causal
        self.block_size = config.block_size
        self.gradient_checkpointing = False  # `transformers` sets it
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = None if config.causal else NoiseEmbedding(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        blocks = (Block(config, layer) for layer in range(config.n_blocks))
        self.blocks = nn.ModuleList(blocks)
        self.output_layer = OutputLayer(config)

    def forward(
        self,
        h: Tensor,
        sigma: Tensor | None,
        mask: Tensor | None = None,
        cache: DynamicCache | Glance | None = None,
    ) -> list[Tensor]:
        """Hidden states, (B, L, D) each: embedding, blocks, and what the head sees.

        Args:
            h: Embeddings, (B, L, D).
            sigma: Noise level of each sequence, (B,); None if causal.
            mask: Which tokens there are, (B, l + L) bool; None: all.
            cache: Keys and values of the l tokens before; it grows by these, but for a
                `Glance`.
        """
        c = None if self.sigma_map is None else F.silu(self.sigma_map(sigma))
        start = 0 if cache is None else cache.get_seq_length()
        tables = self.rotary_emb(start + h.shape[1])
        rotary = tuple(table[start:] for table in tables)
        allowed = self._allowed(start, h, mask)
        states = [h]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and cache is None:
                call = self._gradient_checkpointing_func
                h = call(block.__call__, states[-1], c, rotary, allowed)
            else:
                h = block(states[-1], c, rotary, allowed, cache)
            states.append(h)
        return [*states, self.output_layer.modulated_norm(states[-1], c)]

    def _allowed(self, start: int, h: Tensor, mask: Tensor | None) -> Tensor | None:
        """Who sees whom, (B or 1, 1, L, l + L) bool; None where the kernel knows."""
        L, size = h.shape[1], self.block_size
        together = size or L  # tokens that see each other
        has_future = start and L > 1 if self.causal else together < L
        if mask is None and not has_future:
            return None
        key = torch.arange(start + L, device=h.device)
        query = key[start:, None]
        if self.causal:
            order = key[None]
        elif size is None:
            order = torch.zeros_like(key[None])
        else:  # of the blocks, in which padding does not count
            order = (key[None] if mask is None else mask.cumsum(dim=-1) - 1) // size
        allowed = order[:, None] <= order[:, start:, None]  # (B or 1, L, l + L)
        if mask is not None:  # a token that is not there sees itself: finite numbers
            allowed = (allowed & mask[:, None]) | (key == query)
        return allowed[:, None]
