"""Attention of block diffusion: noisy blocks and the clean ones before them, at once.

A row of L tokens is seen as 2 L positions, the noisy tokens and behind them the clean
ones. A block of noisy tokens attends to itself and to the clean blocks before it; a
clean block to itself and to those before it.

Shapes: B batch, L length, H heads, D head dimension.

Reference: BD3-LM (arXiv:2503.09573), section 3 and the figure of its attention mask.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST_HEAD = 16  # that the kernel of FlexAttention takes on CUDA


def sees(
    query: Tensor, key: Tensor, length: Tensor | int, size: Tensor | int
) -> Tensor:
    """Whether the position `query` attends to `key`, both in 0 .. 2 L - 1; bool.

    Args:
        query, key: Positions; up to L - 1 they are noisy, from L on clean.
        length: L.
        size: Tokens of a block. The last block may be shorter.
    """
    is_noisy, to_noisy = query < length, key < length
    block, other = query % length // size, key % length // size
    within = is_noisy & to_noisy & (block == other)
    before = is_noisy & ~to_noisy & (other < block)
    clean = ~is_noisy & ~to_noisy & (other <= block)
    return within | before | clean


def dense_mask(length: int, sizes: Tensor) -> Tensor:
    """`sees` of all pairs, (B, 1, 2 L, 2 L) bool.

    Args:
        length: L.
        sizes: Tokens of a block of each row, (B,); (1,) for all rows alike.
    """
    position = torch.arange(2 * length, device=sizes.device)
    size = sizes[:, None, None, None]
    return sees(position[:, None], position, length, size)


def flex_mask(length: int, sizes: Tensor) -> Any:
    """`sees` as a BlockMask of FlexAttention, which leaves out what nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = len(sizes) if len(sizes) > 1 else None  # None: alike

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key, length, sizes[0] if rows is None else sizes[b])

    whole = 2 * length
    return create_block_mask(mask_mod, rows, None, whole, whole, str(sizes.device))


def _auto(length: int, sizes: Tensor, head_dim: int) -> Any:
    has_flex = importlib.util.find_spec("triton") is not None
    if sizes.is_cuda and has_flex and head_dim >= SMALLEST_HEAD:
        return flex_mask(length, sizes)
    return dense_mask(length, sizes)


def _sdpa(length: int, sizes: Tensor, head_dim: int) -> Any:
    return dense_mask(length, sizes)


# By `model.attention`: length, sizes, head dimension -> what `attend` takes. The
# kernels of flash-attn have no such mask.
MASKS: dict[str, Callable[[int, Tensor, int], Any]] = {"auto": _auto, "sdpa": _sdpa}
