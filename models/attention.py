"""One attention function over interchangeable kernels.

Shapes: B batch, L length, H heads, D head dimension.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kernel: str) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        q, k, v: Queries, keys, values, (B, L, H, D).
        causal: Whether a position sees only itself and what is left of it.
        kernel: A key of KERNELS.

    Returns:
        (B, L, H, D).
    """
    return KERNELS[kernel](q, k, v, causal)


class KVCache:
    """Keys and values of the tokens so far, in every layer of a causal model.

    Args:
        capacity: Most tokens that there will be.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens so far
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

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


@functools.cache
def flash_is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


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
