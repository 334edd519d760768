"""The selective scan of Mamba in plain PyTorch: chunk by chunk, parallel within one.

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t,    y_t = sum over states of C_t h_t

A sequence is cut into chunks, a chunk into blocks of a few steps. All blocks of a chunk
take the same step together: first from nothing, which gives the state that each adds,
then from the state that the blocks before it leave. So the loops are short and their
tensors large; and every decay is a number in [0, 1] that only multiplies, so nothing
overflows, however strong it is. Backward keeps the states between blocks, N / T numbers
for each of the input, and computes those within a chunk again: what has N numbers for
each of the input exists for a chunk only.

Shapes: B batch, L length, E channels, N states; T steps of a block, K blocks of a
chunk, M = B K. States lie as (M, N, E), so that the innermost loops run over channels.
States are float32, or float64 for such inputs.

Reference: Mamba (arXiv:2312.00752).
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils import ConfigError

# Numbers of all states of a step: so many that a step is work rather than overhead, so
# few that they stay in the cache of a CPU.
WIDTH = {"cpu": 2**17, "cuda": 2**22, "mps": 2**20}
STEPS = 32


class Chunk(NamedTuple):
    """How a sequence is cut; no result depends on it beyond rounding."""

    steps: int  # T, of a block
    blocks: int  # K, of a chunk

    @classmethod
    def of(cls, length: int, state_size: int, device: str) -> "Chunk":
        """What suits a device.

        Args:
            length: L.
            state_size: B N E.
            device: Its type.
        """
        steps = min(STEPS, length)
        fitting = WIDTH.get(device, WIDTH["cpu"]) // state_size
        return cls(steps, max(1, min(fitting, math.ceil(length / steps))))


@torch.compiler.disable  # would unroll the loops
def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: Chunk | None = None
) -> Tensor:
    """y of the recurrence above, (B, L, E), from h = 0.

    Args:
        x: Input, (B, L, E).
        dt: Step sizes, not negative, (B, L, E).
        A: Rates, not positive, (E, N).
        B, C: What goes into the states and comes out of them, (B, L, N).
        chunk: How the sequence is cut; None decides by the device.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if not x.numel():
        return torch.zeros_like(x)
    if chunk is None:
        batch, length, _ = x.shape
        chunk = Chunk.of(length, batch * A.numel(), x.device.type)
    return _Scan.apply(x, dt, A, B, C, chunk)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: Chunk
    ) -> Tensor:
        rates = A.T.contiguous()
        state = x.new_zeros(len(x), *rates.shape)  # (B, N, E)
        y, starts = x.new_empty(x.shape), []
        with torch.autocast(x.device.type, enabled=False):
            for where in _places(x.shape[1], chunk):
                piece = _Piece(len(x), rates, *_cut((x, dt, B, C), where, chunk))
                start = piece.starts(state)
                out, state = piece.outputs(start)
                _put(out, y, where)
                starts.append(start)
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        ctx.chunk = chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, *starts = ctx.saved_tensors
        rates = A.T.contiguous()
        grads = [torch.empty_like(tensor) for tensor in (x, dt, B, C)]
        d_rates = torch.zeros_like(rates)
        d_state = x.new_zeros(len(x), *rates.shape)
        with torch.autocast(x.device.type, enabled=False):
            places = _places(x.shape[1], ctx.chunk)
            for where, start in zip(places[::-1], starts[::-1], strict=True):
                *inputs, d_out = _cut((x, dt, B, C, d_y), where, ctx.chunk)
                piece = _Piece(len(x), rates, *inputs)
                d_state, found = piece.gradients(start, d_state, d_out, d_rates)
                for grad, new in zip(grads, found, strict=True):
                    _put(new, grad, where)
        d_x, d_dt, d_B, d_C = grads
        return d_x, d_dt, d_rates.T, d_B, d_C, None


class _Piece:
    """A chunk of the sequence, its positions as steps of blocks.

    Args:
        batch: B.
        rates: A transposed, (N, E).
        x, dt: (T, M, E).
        B, C: (T, M, N).
    """

    def __init__(
        self, batch: int, rates: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
    ) -> None:
        self.x, self.dt, self.rates, self.batch = x, dt, rates, batch
        self.u = (dt * x)[:, :, None]  # (T, M, 1, E)
        self.B, self.C = B[..., None], C[..., None]  # (T, M, N, 1)
        self.decay = (dt[:, :, None] * rates).exp_()  # (T, M, N, E)
        self.steps = range(len(dt))
        self.blocks = range(dt.shape[1] // batch)

    def starts(self, state: Tensor) -> Tensor:
        """States before each block, (M, N, E), of that before the chunk, (B, N, E)."""
        if len(self.blocks) == 1:
            return state
        local = torch.zeros_like(self.decay[0])
        for t in self.steps:
            local.mul_(self.decay[t]).addcmul_(self.u[t], self.B[t])
        return self._handed_on(state, local, self.blocks)

    def outputs(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """y, (T, M, E), and the state after the chunk, (B, N, E)."""
        h, y = start.clone(), torch.empty_like(self.dt)
        for t in self.steps:
            h.mul_(self.decay[t]).addcmul_(self.u[t], self.B[t])
            torch.matmul(self.C[t].mT, h, out=y[t][:, None])
        return y, self._by_block(h)[:, -1]

    def gradients(
        self, start: Tensor, d_state: Tensor, d_y: Tensor, d_rates: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Those of the state before the chunk, (B, N, E), and of x, dt, B and C.

        Args:
            start: States before each block, (M, N, E).
            d_state: Gradient of the state after the chunk, (B, N, E).
            d_y: That of the outputs, (T, M, E).
            d_rates: That of the rates is added to this, (N, E).
        """
        d_u, d_dt = torch.empty_like(d_y), torch.empty_like(d_y)
        d_B, d_C = torch.empty_like(self.B), torch.empty_like(self.C)
        h, decayed = start.clone(), torch.empty_like(self.decay)
        for t in self.steps:
            torch.mul(h, self.decay[t], out=decayed[t])
            torch.addcmul(decayed[t], self.u[t], self.B[t], out=h)
            torch.matmul(h, d_y[t][..., None], out=d_C[t])
        d_h = self._starts_back(d_state, d_y)
        of_rates = torch.zeros_like(d_h)  # (M, N, E)
        for t in self.steps[::-1]:
            d_h.addcmul_(d_y[t][:, None], self.C[t])
            torch.matmul(self.B[t].mT, d_h, out=d_u[t][:, None])
            torch.matmul(d_h, self.u[t].mT, out=d_B[t])
            of_exponent = decayed[t].mul_(d_h)  # dt A
            of_rates.addcmul_(of_exponent, self.dt[t][:, None])
            torch.sum(of_exponent.mul_(self.rates), dim=1, out=d_dt[t])
            d_h.mul_(self.decay[t])
        d_rates += of_rates.sum(dim=0)
        d_dt.addcmul_(d_u, self.x)
        d_x = d_u.mul_(self.dt)
        grads = [d_x, d_dt, d_B.squeeze(-1), d_C.squeeze(-1)]
        return self._by_block(d_h)[:, 0], grads

    def _starts_back(self, d_state: Tensor, d_y: Tensor) -> Tensor:
        """Gradients of the states after each block, but for its own, (M, N, E)."""
        if len(self.blocks) == 1:
            return d_state.clone()
        local = torch.zeros_like(self.decay[0])
        for t in self.steps[::-1]:
            local.addcmul_(d_y[t][:, None], self.C[t]).mul_(self.decay[t])
        return self._handed_on(d_state, local, self.blocks[::-1])

    def _by_block(self, h: Tensor) -> Tensor:
        """(M, N, E) -> (B, K, N, E), a view."""
        return h.unflatten(0, (self.batch, -1))

    def _handed_on(self, state: Tensor, local: Tensor, order: range) -> Tensor:
        """What each block begins with, (M, N, E).

        Args:
            state: What the first one in order begins with, (B, N, E).
            local: What each makes of nothing, (M, N, E).
            order: Of the blocks.
        """
        decay = (self.dt.sum(dim=0)[:, None] * self.rates).exp_()
        decay, local = self._by_block(decay), self._by_block(local)
        begun = torch.empty_like(local)
        for k in order:
            begun[:, k] = state
            state = torch.addcmul(local[:, k], decay[:, k], state)
        return begun.flatten(0, 1)


def _places(length: int, chunk: Chunk) -> list[slice]:
    """Where the chunks of a sequence are."""
    width = chunk.steps * chunk.blocks
    starts = range(0, length, width)
    return [slice(start, min(start + width, length)) for start in starts]


def _cut(tensors: tuple[Tensor, ...], where: slice, chunk: Chunk) -> list[Tensor]:
    """A chunk of tensors (B, L, F), as (T, M, F).

    Blocks are filled up with zeros: steps of size 0 leave a state as it is.
    """
    size = where.stop - where.start
    blocks = min(chunk.blocks, math.ceil(size / chunk.steps))
    steps = math.ceil(size / blocks)
    padding = (0, 0, 0, steps * blocks - size)
    padded = (F.pad(tensor[:, where], padding) for tensor in tensors)
    form = "b (k t) f -> t (b k) f"
    return [rearrange(tensor, form, k=blocks).contiguous() for tensor in padded]


def _put(part: Tensor, whole: Tensor, where: slice) -> None:
    """Writes a chunk (T, M, F) to its place in (B, L, F)."""
    part = rearrange(part, "t (b k) f -> b (k t) f", b=len(whole))
    whole[:, where] = part[:, : where.stop - where.start]


# ---------------------------------------------------------------- kernels


@functools.cache
def mamba_ssm_is_installed() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


def _mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    if not x.is_cuda:
        raise ConfigError(
            f"model.scan='mamba_ssm' needs CUDA, and the network is on {x.device}; "
            "choose auto or torch."
        )
    from mamba_ssm.ops.selective_scan_interface import (  # optional package
        selective_scan_fn,
    )

    x, dt, B, C = (tensor.float().mT.contiguous() for tensor in (x, dt, B, C))
    return selective_scan_fn(x, dt, A.float(), B, C).mT


def _auto(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    usable = x.is_cuda and mamba_ssm_is_installed()
    return (_mamba_ssm if usable else selective_scan)(x, dt, A, B, C)


# By `model.scan`, as in `models.registry`; each takes what `selective_scan` takes.
SCANS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "auto": _auto,
    "torch": selective_scan,
    "mamba_ssm": _mamba_ssm,
}
