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
