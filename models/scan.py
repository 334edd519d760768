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
STEPS = 16


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
        room = _room(state, x.shape[1], chunk)
        with torch.autocast(x.device.type, enabled=False):
            for where in _places(x.shape[1], chunk):
                inputs = _cut((x, dt, B, C), where, chunk)
                piece = _Piece(len(x), rates, room, *inputs)
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
        room, more = (_room(d_state, x.shape[1], ctx.chunk) for _ in range(2))
        with torch.autocast(x.device.type, enabled=False):
            places = _places(x.shape[1], ctx.chunk)
            for where, start in zip(places[::-1], starts[::-1], strict=True):
                *inputs, d_out = _cut((x, dt, B, C, d_y), where, ctx.chunk)
                piece = _Piece(len(x), rates, room, *inputs)
                d_state, found = piece.gradients(start, d_state, d_out, d_rates, more)
                for grad, new in zip(grads, found, strict=True):
                    _put(new, grad, where)
        d_x, d_dt, d_B, d_C = grads
        return d_x, d_dt, d_rates.T, d_B, d_C, None


class _Piece:
    """A chunk of the sequence, its positions as steps of blocks.

    Args:
        batch: B.
        rates: A transposed, (N, E).
        room: Where the decays go, (>= T M N E,).
        x, dt: (T, M, E).
        B, C: (T, M, N).
    """

    def __init__(
        self,
        batch: int,
        rates: Tensor,
        room: Tensor,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
    ) -> None:
        self.x, self.dt, self.rates, self.batch = x, dt, rates, batch
        self.halvings = rates / math.log(2)  # per unit of dt: exp2 is faster than exp
        self.shape = (len(dt), dt.shape[1], *rates.shape)  # T, M, N, E
        self.blocks = range(dt.shape[1] // batch)
        # What follows is cut into steps.
        self.dt_ = dt[:, :, None].unbind()  # (M, 1, E)
        self.u = (dt * x)[:, :, None].unbind()  # (M, 1, E)
        self.B, self.C = B[..., None].unbind(), C[..., None].unbind()  # (M, N, 1)
        self.decay = _in(room, self.shape).unbind()  # (M, N, E)
        for step, decay in zip(self.dt_, self.decay, strict=True):
            torch.mul(step, self.halvings, out=decay).exp2_()

    def starts(self, state: Tensor) -> Tensor:
        """States before each block, (M, N, E), of that before the chunk, (B, N, E)."""
        if len(self.blocks) == 1:
            return state
        local = state.new_zeros(self.shape[1:])
        for decay, u, B in zip(self.decay, self.u, self.B, strict=True):
            local.mul_(decay).addcmul_(u, B)
        return self._handed_on(state, local, self.blocks)

    def outputs(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """y, (T, M, E), and the state after the chunk, (B, N, E)."""
        h, y = start.clone(), self.dt.new_empty(self.dt.shape)
        rows = (self.decay, self.u, self.B, self.C, y[:, :, None].unbind())
        for decay, u, B, C, out in zip(*rows, strict=True):
            h.mul_(decay).addcmul_(u, B)
            torch.bmm(C.mT, h, out=out)
        return y, self._by_block(h)[:, -1]

    def gradients(
        self,
        start: Tensor,
        d_state: Tensor,
        d_y: Tensor,
        d_rates: Tensor,
        room: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Those of the state before the chunk, (B, N, E), and of x, dt, B and C.

        Args:
            start: States before each block, (M, N, E).
            d_state: Gradient of the state after the chunk, (B, N, E).
            d_y: That of the outputs, (T, M, E).
            d_rates: That of the rates is added to this, (N, E).
            room: Where intermediate values go, (>= T M N E,).
        """
        d_u, d_dt = (self.dt.new_empty(self.dt.shape) for _ in range(2))
        d_B, d_C = (self.dt.new_empty(*self.shape[:3], 1) for _ in range(2))
        h, decayed = start.clone(), _in(room, self.shape).unbind()
        d_ys = d_y[:, :, None].unbind()
        rows = (self.decay, decayed, self.u, self.B, d_ys, d_C.unbind())
        for decay, kept, u, B, d_out, out in zip(*rows, strict=True):
            torch.mul(h, decay, out=kept)
            torch.addcmul(kept, u, B, out=h)
            torch.bmm(h, d_out.mT, out=out)
        d_h = self._starts_back(d_state, d_ys)
        of_rates = torch.zeros_like(d_h)  # (M, N, E)
        inputs = (self.decay, decayed, self.u, self.B, self.C, self.dt_, d_ys)
        outs = (d_u[:, :, None].unbind(), d_B.unbind(), d_dt.unbind())
        backwards = list(zip(*inputs, *outs, strict=True))[::-1]
        for decay, kept, u, B, C, dt, d_out, of_u, of_B, of_dt in backwards:
            d_h.addcmul_(d_out, C)
            torch.bmm(B.mT, d_h, out=of_u)
            torch.bmm(d_h, u.mT, out=of_B)
            of_exponent = kept.mul_(d_h)  # dt A
            of_rates.addcmul_(of_exponent, dt)
            torch.sum(of_exponent.mul_(self.rates), dim=1, out=of_dt)
            d_h.mul_(decay)
        d_rates += of_rates.sum(dim=0)
        d_dt.addcmul_(d_u, self.x)
        d_x = d_u.mul_(self.dt)
        grads = [d_x, d_dt, d_B.squeeze(-1), d_C.squeeze(-1)]
        return self._by_block(d_h)[:, 0], grads

    def _starts_back(self, d_state: Tensor, d_ys: tuple[Tensor, ...]) -> Tensor:
        """Gradients of the states after each block, but for its own, (M, N, E)."""
        if len(self.blocks) == 1:
            return d_state.clone()
        local = d_state.new_zeros(self.shape[1:])
        rows = list(zip(self.decay, self.C, d_ys, strict=True))
        for decay, C, d_out in rows[::-1]:
            local.addcmul_(d_out, C).mul_(decay)
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
        decay = (self.dt.sum(dim=0)[:, None] * self.halvings).exp2_()
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


def _room(state: Tensor, length: int, chunk: Chunk) -> Tensor:
    """Memory for states (B, N, E) of all steps of a chunk, in turn.

    Memory that is new costs a CPU more time than the arithmetic in it.
    """
    steps = min(length, chunk.steps * chunk.blocks) + chunk.blocks  # some are padding
    return state.new_empty(steps * state.numel())


def _in(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape at the beginning of `room`."""
    return room[: math.prod(shape)].view(shape)


def _cut(tensors: tuple[Tensor, ...], where: slice, chunk: Chunk) -> list[Tensor]:
    """A chunk of tensors (B, L, F), as (T, M, F).

    Blocks are filled up with zeros: steps of size 0 leave a state as it is.
    """
    size = where.stop - where.start
    blocks = min(chunk.blocks, math.ceil(size / chunk.steps))
    steps = math.ceil(size / blocks)
    padding = steps * blocks - size
    cut = [tensor[:, where] for tensor in tensors]
    if padding:
        cut = [F.pad(tensor, (0, 0, 0, padding)) for tensor in cut]
    return [rearrange(tensor, "b (k t) f -> t (b k) f", k=blocks) for tensor in cut]


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
