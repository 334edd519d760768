"""Questions about devices: which one, its widest float, how tensors get there."""

import ctypes
import os

import torch
from omegaconf import DictConfig

from utils import uses_cuda


def wide_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """float64, or float32 on Apple GPUs, which have no float64.

    Args:
        device: Where the numbers will live; None asks for the default accelerator.
    """
    if device is None:
        apple = torch.backends.mps.is_available() and not torch.cuda.is_available()
    else:
        apple = torch.device(device).type == "mps"
    return torch.float32 if apple else torch.float64


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on a device, without waiting for what that is still computing."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # copies from other memory wait
    return x.to(device, non_blocking=True)


def widened(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on a device in its widest float type."""
    return to_device(x.to(wide_dtype(device)), device)


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks of up to 32 MiB for the next tensor of that size.

    By default it returns them to the system, and each new tensor then pays for fresh
    pages, which costs more than the arithmetic on it. Elsewhere this does nothing.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at its maximum


def device_of(config: DictConfig) -> torch.device:
    """The device of `trainer.accelerator` for work outside of a trainer."""
    accelerator = config.trainer.accelerator
    if uses_cuda(accelerator):
        return torch.device("cuda")
    apple = accelerator in ("auto", "mps") and torch.backends.mps.is_available()
    return torch.device("mps" if apple else "cpu")
