"""What the benchmarks measure with: time, peak memory, arithmetic, the machine."""

import platform
import re
import resource
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
# Dense bfloat16 arithmetic that the makers state, TFLOP/s.
NOMINAL_PEAK = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    steps: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 1,
) -> dict[str, float]:
    """Median seconds of each step; they take turns, so that noise hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + rounds):
        for name, step in steps.items():
            elapsed = seconds(step, device)
            if index >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Peak memory of a step in MB.

    `step` is what its tensors take at most, beyond those that were there before it.
    `peak` counts everything: on CUDA all tensors, elsewhere the resident memory of the
    process, interpreter and libraries included (on Linux during this step, on others
    the largest so far).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return {"peak": peak / 2**20, "step": (peak - rest) / 2**20}
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        step()
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    else:
        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with LiveTensors() as tensors:
        step()
    return {"peak": peak, "step": tensors.peak / 2**20}


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations make, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        inputs = {_storage(x) for x in tree_leaves((args, kwargs))}
        for storage in map(_storage, tree_leaves(results)):
            if storage is None or storage in inputs or storage in self.known:
                continue  # no tensor, or the memory of another one
            size = storage.nbytes()
            self.known.add(storage)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)
        return results

    def _free(self, size: int) -> None:
        self.now -= size


def _storage(x: object) -> torch.UntypedStorage | None:
    return x.untyped_storage() if isinstance(x, torch.Tensor) else None


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """TFLOP/s that the device can do, and where the number is from.

    Args:
        device: Where steps run.
        precision: As `trainer.precision`, bf16 or 32.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, tflops in NOMINAL_PEAK.items():
            if model in name and dtype == torch.bfloat16:
                return tflops, f"stated for {model}"
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = min(seconds(lambda: a @ a, device) for _ in range(5))
    return 2 * size**3 / best / 1e12, f"measured, {size} x {size} product"


def environment(device: torch.device) -> dict[str, str]:
    """The machine, the versions and the commit that numbers belong to."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") + _uncommitted(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def _uncommitted() -> str:
    return " and changes" if _git("status", "--porcelain", "--", "*.py") else ""


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or ("unknown" if args[0] == "rev-parse" else "")
