"""What the benchmarks measure with: time, peak memory, arithmetic, the machine."""

import ctypes
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

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
    """Memory in MB: `rest` before a step, `peak` during it, `step` the difference.

    On CUDA what tensors take; on Linux the process's resident memory, interpreter and
    libraries included; elsewhere the largest of the process so far, as `peak` alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    elif Path("/proc/self/clear_refs").exists():
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        rest = _resident("VmRSS")
        step()
        peak = _resident("VmHWM")
    else:
        step()
        peak = rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = {"rest": rest, "peak": peak, "step": peak - rest}
    return {name: value / 2**20 for name, value in names.items()}


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


def train_flops(model: torch.nn.Module, tokens: int, scored: int, length: int) -> float:
    """Arithmetic that a train step needs, forward and backward.

        6 (trunk parameters) tokens + 12 n_blocks D L tokens + 6 D K scored

    Only the tokens with a loss need the head; what a step does beyond this is waste.
    Embedding rows are looked up, not multiplied.
    """
    backbone = model.backbone
    head = backbone.output_embedding.weight
    blocks = sum(p.numel() for p in backbone.blocks.parameters() if p.dim() == 2)
    attention = 12 * len(backbone.blocks) * head.shape[1] * length
    return (6 * blocks + attention) * tokens + 6 * head.numel() * scored


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
