"""The selective scan: the recurrence itself, whatever the chunks, in bounded memory."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models.scan
from benchmarks.bench_scan import loop as recurrence
from benchmarks.measure import LiveTensors
from models.scan import SCANS, STEPS, Chunk, selective_scan
from utils import ConfigError

CHUNKS = [
    None,
    Chunk(1, 1),
    Chunk(1, 4),
    Chunk(3, 1),
    Chunk(3, 2),
    Chunk(4, 3),
    Chunk(99, 1),
    Chunk(99, 99),
]
NAMES = ("x", "dt", "A", "B", "C")


def inputs(batch, length, channels, states, *, scale=1.0, dtype=torch.float64):
    """Random ones; `scale` is of the decays."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    found = (
        normal(batch, length, channels),
        F.softplus(normal(batch, length, channels)),
        -scale * normal(channels, states).exp(),
        normal(batch, length, states),
        normal(batch, length, states),
    )
    return [tensor.to(dtype).requires_grad_() for tensor in found]


def results(scan, tensors, **kwargs):
    """Outputs, and gradients of a random probe of them."""
    y = scan(*tensors, **kwargs)
    probe = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    grads = torch.autograd.grad((y * probe).sum(), tensors)
    return [y.detach(), *grads]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("length", [1, 2, 7, 12, 13])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_recurrence(chunk, length, batch):
    """Outputs and all gradients."""
    tensors = inputs(batch, length, 4, 3)
    expected = results(recurrence, tensors)
    found = results(selective_scan, tensors, chunk=chunk)
    for name, ours, theirs in zip(("y", *NAMES), found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("chunk", [Chunk(2, 2), Chunk(5, 1)])
def test_gradients_are_those_of_finite_differences(chunk):
    assert torch.autograd.gradcheck(
        lambda *tensors: selective_scan(*tensors, chunk=chunk), inputs(2, 7, 2, 3)
    )


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e2, 1e6])
def test_strong_and_weak_decays(scale):
    """In float32, beside the recurrence in float64: no overflow, no loss of digits."""
    wide = inputs(2, 70, 3, 4, scale=scale)
    narrow = [x.detach().float().requires_grad_() for x in wide]
    expected = results(recurrence, wide)
    for chunk in (Chunk(8, 4), Chunk(16, 1), None):
        for ours, theirs in zip(
            results(selective_scan, narrow, chunk=chunk), expected, strict=True
        ):
            limit = 1e-5 * float(theirs.abs().max()) + 1e-30
            assert float((ours - theirs).abs().max()) < limit


def test_states_that_never_decay():
    """A rate of 0 sums up everything; a step of 0 keeps everything."""
    x = torch.ones(1, 40, 1)
    zero, one = torch.zeros(1, 1), torch.ones(1, 40, 1)
    y = selective_scan(x, torch.ones_like(x), zero, one, one, Chunk(4, 3))
    torch.testing.assert_close(y[0, :, 0], torch.arange(1.0, 41))
    dt = torch.ones_like(x)
    dt[:, 1:] = 0
    y = selective_scan(x, dt, zero - 5, one, one, Chunk(4, 3))
    torch.testing.assert_close(y, torch.ones_like(x))


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_it_looks_back_only(changed):
    x, *others = inputs(1, 12, 2, 2)
    other = x.detach().clone()
    other[:, changed] += 1
    change = selective_scan(other, *others, Chunk(3, 2)) - selective_scan(
        x, *others, Chunk(3, 2)
    )
    differs = change.abs().amax(dim=(0, 2)) > 0
    assert not differs[:changed].any()
    assert differs[changed:].all()


def test_no_rows_and_no_channels():
    x, dt, A, B, C = inputs(2, 5, 3, 2)
    assert selective_scan(x[:0], dt[:0], A, B[:0], C[:0]).shape == (0, 5, 3)
    assert selective_scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0]).shape == (2, 0, 3)


def test_states_are_float32_in_half_precision():
    """Under autocast and with inputs in half precision, also in backward."""
    tensors = [x.detach().bfloat16().requires_grad_() for x in inputs(1, 50, 3, 4)]
    wide = [x.detach().float().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = results(selective_scan, tensors)
        same = results(selective_scan, wide)
    assert found[0].dtype == torch.float32
    expected = results(selective_scan, wide)
    assert all(map(torch.equal, same, expected))
    assert torch.equal(found[0], expected[0])
    assert [x.dtype for x in found[1:]] == [torch.bfloat16] * 5


def test_it_is_differentiated_once():
    tensors = inputs(1, 4, 2, 2)
    (grad,) = torch.autograd.grad(
        selective_scan(*tensors).square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which an operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return out


@pytest.mark.parametrize("chunk", [Chunk(4, 2), Chunk(8, 1)])
def test_no_tensor_of_all_states(chunk):
    """Neither forward nor backward makes (B, L, E, N) numbers, for any L."""
    found = []
    for length in (64, 256):
        x, dt, A, B, C = inputs(1, length, 2, 16, dtype=torch.float32)
        with Largest() as largest:
            selective_scan(x, dt, A, B, C, chunk).sum().backward()
        found.append(largest.numel)
        assert largest.numel <= max(8 * 2 * 16, length * 16)
    # What is left that grows are B and C themselves, (B, L, N).
    assert found == [64 * 16, 256 * 16]


def test_memory_grows_by_less_than_the_states():
    """A forward and a backward pass, all tensors counted: what each further position
    takes is a part of its states, E N numbers."""
    channels, states, peaks = 16, 16, []
    for length in (256, 1024):
        tensors = inputs(1, length, channels, states, dtype=torch.float32)
        with LiveTensors() as live:
            selective_scan(*tensors, chunk=Chunk(8, 2)).sum().backward()
        peaks.append(live.peak)
    growth = (peaks[1] - peaks[0]) / (1024 - 256) / 4  # numbers of float32
    assert 0 < growth < 0.75 * channels * states


def test_what_is_kept_for_backward():
    """Beside the inputs N / T numbers for each of x."""
    length = 16 * STEPS
    tensors = inputs(1, length, 8, 4, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x), x)[1], lambda x: x
    ):
        y = selective_scan(*tensors)
    own = {x.untyped_storage().data_ptr() for x in (*tensors, y)}
    further = [x for x in kept if x.untyped_storage().data_ptr() not in own]
    assert sum(x.numel() for x in further) == length // STEPS * 8 * 4


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "another"])
@pytest.mark.parametrize("length", [1, 31, 33, 4096])
@pytest.mark.parametrize("state_size", [1, 100, 10**9])
def test_chunks_are_within_a_sequence(device, length, state_size):
    chunk = Chunk.of(length, state_size, device)
    assert 1 <= chunk.steps <= length
    assert 1 <= chunk.blocks <= -(-length // chunk.steps)
    if chunk.blocks > 1:
        width = models.scan.WIDTH.get(device, models.scan.WIDTH["cpu"])
        assert chunk.blocks * state_size <= width


# ---------------------------------------------------------------- kernels


def test_kernels_on_a_cpu():
    """`auto` is the scan here, also where mamba-ssm is installed."""
    tensors = inputs(1, 6, 2, 3)
    expected = selective_scan(*tensors)
    for name in ("auto", "torch"):
        assert torch.equal(SCANS[name](*tensors), expected)
    with pytest.raises(ConfigError, match="needs CUDA, and the network is on cpu"):
        SCANS["mamba_ssm"](*tensors)


def test_the_arguments_of_the_published_kernel(monkeypatch):
    """Its layout is (B, E, L); ours and its stand-in's results are the same."""
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")

    def stand_in(u, delta, A, B, C):
        assert all(x.is_contiguous() for x in (u, delta, B, C))
        assert all(x.dtype == torch.float32 for x in (u, delta, A, B, C))
        return recurrence(u.mT, delta.mT, A, B.mT, C.mT).mT

    interface.selective_scan_fn = stand_in
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    tensors = inputs(2, 6, 2, 3, dtype=torch.float32)
    expected = selective_scan(*tensors)
    torch.testing.assert_close(SCANS["mamba_ssm"](*tensors), expected)
    monkeypatch.setattr(models.scan, "mamba_ssm_is_installed", lambda: True)
    torch.testing.assert_close(SCANS["auto"](*tensors), expected)


def test_names_are_those_that_are_checked_without_torch():
    from models.registry import SCANS as NAMES_OF_SCANS

    assert tuple(SCANS) == NAMES_OF_SCANS
