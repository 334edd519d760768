"""One attention function over interchangeable kernels.

Shapes: B batch, L length, H heads, D head dimension.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    kernel: str,
    mask: Any = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q: Queries, (B, L, H, D).
        k, v: Keys and values, (B, S, H, D).
        causal: Whether a position sees only itself and what is left of it.
        kernel: A key of KERNELS.
        mask: Which keys each query sees, by torch's own kernels: (L, S) or (B, 1, L, S)
            bool, or a BlockMask of FlexAttention; None: all.

    Returns:
        (B, L, H, D).
    """
    if mask is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
        if isinstance(mask, Tensor):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = _flex(q.is_cuda)(q, k, v, block_mask=mask)
        return out.transpose(1, 2)
    return KERNELS[kernel](q, k, v, causal)


class KVCache:
    """Keys and values of the tokens so far, in every layer of a network that is causal
    by tokens, or by blocks of them.

    A causal network keeps what it is given. One by blocks does not, as a block is seen
    at many noise levels before it is clean: `keep` says that the last one was.

    Args:
        capacity: Most tokens that there will be, those of the last block included.
        block_size: L', where the network is causal by blocks.
    """

    def __init__(self, capacity: int, block_size: int | None = None) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.length = 0  # tokens so far
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, number: int) -> None:
        """The tokens that the network was last given, so many, are part of what it
        sees from now on."""
        self.length += number

    def select(self, rows: Tensor) -> None:
        """Only these sequences (b,) are left."""
        self._layers = {
            layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()
        }

    def of(self, rows: Tensor) -> "KVCache":
        """The tokens of some sequences (b,), for a pass that is not kept."""
        return _SomeRows(self, rows)

    def mask(self, number: int, device: torch.device) -> Tensor | None:
        """What so many new tokens see, (l, S) bool with S those so far and they; None:
        each of them all, as those of one block do.

        Of several blocks each sees the ones before it and itself.
        """
        size = self.block_size
        if size is None or number <= size:
            return None
        block = torch.arange(self.length + number, device=device) // size
        return block[self.length :, None] >= block

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens so far, (B, S, H, D)."""
        k, v = self._layers[layer]
        return k[:, : self.length], v[:, : self.length]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, those of the new ones (B, l, H, D) last."""
        if layer not in self._layers:
            B, _, H, D = k.shape
            shape = (B, self.capacity, H, D)
            self._layers[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[1]
        for stored, new in zip(self._layers[layer], (k, v), strict=True):
            stored[:, self.length : end] = new
        keys, values = self._layers[layer]
        return keys[:, :end], values[:, :end]


class _SomeRows(KVCache):
    """The tokens so far of some sequences (b,) of a cache."""

    def __init__(self, whole: KVCache, rows: Tensor) -> None:
        super().__init__(whole.capacity, whole.block_size)
        self.length = whole.length
        self._whole, self._rows = whole, rows

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (x[self._rows] for x in self._whole.past(layer))
        return torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)


@functools.cache
def flash_is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _flex(is_compiled: bool) -> Callable[..., Tensor]:
    """Without compiling, which other devices do, it forms all pairs."""
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = torch.compile(flex_attention) if is_compiled else flex_attention
    function: Callable[..., Tensor] = attention
    return function


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func  # optional package

    return flash_attn_func(q, k, v, causal=causal)


def _auto(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    half = q.dtype in (torch.float16, torch.bfloat16)
    usable = q.is_cuda and half and flash_is_installed()
    return (_flash if usable else _sdpa)(q, k, v, causal)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "auto": _auto,
    "flash": _flash,
    "sdpa": _sdpa,
}
