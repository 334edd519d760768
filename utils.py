"""What three or more files need: user errors, table look-up, config resolvers,
files behind fsspec, and the learning-rate schedules and callbacks that configs name.

Nothing here knows about algorithms or data. Importing it has no side effects;
`main.py` calls `register_resolvers` once.
"""

import ast
import ctypes
import difflib
import functools
import glob
import json
import math
import operator
import os
import posixpath
import random
import re
import runpy
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import fsspec
import lightning
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

T = TypeVar("T")


# What asks a run to end: Slurm before it takes a job back or its time is over, Ctrl-C.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    if hasattr(signal, name)
)


class ConfigError(ValueError):
    """A mistake in what the user asked for; its text is one line that helps.

    `main.py` prints the text without a traceback and exits with status 2.
    """


class RunStopped(RuntimeError):
    """A run that ends early through no mistake in its config: a full disk, a signal.

    `main.py` prints the text without a traceback and exits with `status`.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def choose(table: Mapping[str, T], name: Any, key: str, where: str = "") -> T:
    """Looks `name` up in a registry.

    Args:
        table: Registry of choices.
        name: The value the user gave.
        key: Config key that held it, for the message.
        where: What else narrows the choices, such as "algo=mdlm".

    Raises:
        ConfigError: If `name` is not in `table`; the line names key, value, choices.
    """
    require(name, table, key, where)
    return table[name]


def require(value: Any, choices: Iterable[str], key: str, where: str = "") -> None:
    """Refuses a value outside its choices; see `choose`."""
    if value not in choices:
        raise ConfigError(unknown_value(key, value, choices, where))


def unknown_value(key: str, value: Any, choices: Iterable[str], where: str = "") -> str:
    """The one line for a value outside its choices, with the nearest as a hint."""
    choices = sorted(map(str, choices))
    context = f" ({where})" if where else ""
    return (
        f"Unknown {key}={value!r}{context}.{did_you_mean(value, choices)} "
        f"Choose from: {', '.join(choices)}."
    )


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """' Did you mean ...?' if a choice is close to `value`, else nothing."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_line(text: str) -> str:
    """Text with its line breaks and runs of blanks made into single blanks."""
    return " ".join(text.split())


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on stderr."""
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.exit(status)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def seed_all(seed: int) -> None:
    """Sets the global random states of torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


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


# ---------------------------------------------------------------- resolvers

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def arithmetic(expression: str | float) -> int | float:
    """Evaluates +, -, *, /, //, % and parentheses over numbers, and nothing else.

    Raises:
        ConfigError: If the expression holds anything but arithmetic.
    """

    def value(node: ast.AST) -> int | float:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(number) if type(number) in (int, float):
                return number
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](value(left), value(right))
            case ast.UnaryOp(op, operand) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](value(operand))
        raise ConfigError(f"${{eval:{expression}}} is not arithmetic over numbers.")

    try:
        return value(ast.parse(str(expression).strip(), mode="eval"))
    except (SyntaxError, ZeroDivisionError) as error:
        raise ConfigError(f"${{eval:{expression}}}: {error}.") from None


def uses_cuda(accelerator: str = "auto") -> bool:
    """Whether `trainer.accelerator` means CUDA on this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def num_cpus() -> int:
    """CPU cores this process may use (fewer than the machine's under Slurm)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user_cache_dir() -> str:
    """Default of `data.cache_dir`; the environment variable DUO_CACHE_DIR wins."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(root) / "duo")


def register_resolvers() -> None:
    """Registers the OmegaConf resolvers that the configs use (idempotent)."""
    resolvers = {
        "cwd": os.getcwd,
        "device_count": lambda accelerator="auto": (
            torch.cuda.device_count() if uses_cuda(accelerator) else 1
        ),
        "default_precision": lambda accelerator="auto": (
            "bf16" if uses_cuda(accelerator) else "32"
        ),
        # Worker processes only pay off beside a GPU; on a CPU they take its cores.
        "default_num_workers": lambda accelerator="auto": (
            num_cpus() if uses_cuda(accelerator) else 0
        ),
        "num_cpus": num_cpus,
        "user_cache_dir": user_cache_dir,
        "eval": arithmetic,
        "div_up": lambda x, y: math.ceil(x / y),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


# ---------------------------------------------------------------- files

# Keys that name files or folders to read, some of them instead of a hub id.
INPUTS = (
    "algo.curriculum.integral_cache_path",
    "checkpointing.resume_ckpt_path",
    "data.path",
    "data.source",
    "data.valid_path",
    "data.valid_source",
    "data.tokenizer_name_or_path",
    "eval.checkpoint_path",
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.mauve_references",
    "sampling.prompt_file",
    "training.finetune_path",
)


def find_inputs(config: DictConfig, folder: str) -> None:
    """Makes relative paths to inputs absolute where they lead to something.

    A run works in a folder of its own; its command was given in another one.

    Args:
        config: The run's config; changed in place.
        folder: Where the command was given.
    """

    def found(value: Any) -> Any:
        if not isinstance(value, str) or not value or "://" in value:
            return value
        path = os.path.join(folder, value)  # value itself where that is absolute
        return path if glob.glob(path, recursive=True) else value

    for key in INPUTS:
        value = OmegaConf.select(config, key)
        is_list = isinstance(value, ListConfig)
        absolute = [found(x) for x in value] if is_list else found(value)
        if absolute != value:
            OmegaConf.update(config, key, absolute)


def hydra_quoted(text: str) -> str:
    """A value for Hydra's command line, whatever is in it.

    Backslashes count only in front of a quote, the last one included.
    """
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'") + "'"


def local_folder(path: str) -> str:
    """The folder itself where it is on this machine, else the user's cache."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return inner if isinstance(filesystem, LocalFileSystem) else user_cache_dir()


def path_exists(path: str) -> bool:
    """Whether a local or fsspec path (s3://, gs://, memory://) exists."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return filesystem.exists(inner)


def hub_options(name_or_path: str) -> dict[str, bool]:
    """Arguments for `from_pretrained`: local files only, if the hub is out of reach.

    Without it an unreachable hub is tried for a minute before anything is said.
    """
    return {"local_files_only": os.path.isdir(name_or_path) or not hub_answers()}


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached from here."""
    from huggingface_hub.constants import ENDPOINT

    return answers(ENDPOINT)


@functools.cache
def answers(url: str) -> bool:
    """Whether anything answers there; with HF_HUB_OFFLINE=1 nothing is asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer all the same
    except OSError:
        return False
    return True


PARTIAL = ".partial"  # how the names of half-written files end


@contextmanager
def whole_file(path: str, mode: str = "wb") -> Iterator[Any]:
    """A local or fsspec path to write to, which gets all of it or nothing.

    Processes that write at once do so to files of their own; the last one stays. On a
    local disk the file outlives a loss of power, too.
    """
    filesystem, inner = fsspec.core.url_to_fs(path)
    filesystem.makedirs(posixpath.dirname(inner), exist_ok=True)
    partial = f"{inner}.{os.getpid()}{PARTIAL}"
    try:
        with filesystem.open(partial, mode) as file:
            yield file
            if isinstance(filesystem, LocalFileSystem):
                file.flush()
                os.fsync(file.fileno())
        filesystem.mv(partial, inner)
    except BaseException:
        with suppress(Exception):  # what went wrong is said by the other one
            filesystem.rm(partial)
        raise


def write_json(path: str, data: Any) -> None:
    """Writes JSON to a local or fsspec path, all of it or nothing."""
    with whole_file(path, "w") as file:
        json.dump(data, file, indent=1)


def copy_file(source: str, target: str) -> None:
    """Copies between local or fsspec paths, all of it or nothing."""
    with fsspec.open(source, "rb") as old, whole_file(target) as new:
        shutil.copyfileobj(old, new)


class KeyReport(NamedTuple):
    """How a state dict fits a module."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def raise_if_any(self, where: str) -> None:
        """Refuses a partial fit, which would silently evaluate random weights."""
        parts = [
            f"{len(names)} {kind} (e.g. {names[0]})"
            for kind, names in self._asdict().items()
            if names
        ]
        if parts:
            raise ConfigError(
                f"{where} does not fit this model: {', '.join(parts)}. "
                "Check algo, model, model.length and data.tokenizer_name_or_path."
            )


def key_report(module: nn.Module, state: Mapping[str, torch.Tensor]) -> KeyReport:
    """Compares names and shapes of `state` with those of `module`."""
    own = module.state_dict()
    return KeyReport(
        missing=sorted(own.keys() - state.keys()),
        unexpected=sorted(state.keys() - own.keys()),
        reshaped=sorted(
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ),
    )


# ---------------------------------------------------------------- learning rate


class CosineDecayWarmupLRScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, half a cosine, then a floor; counted in optimiser updates.

    With W = warmup_t, D = t_initial, k the update and lr the base rate:

        k < W:          warmup_lr_init + k (lr - warmup_lr_init) / W
        W <= k < W + D: lr_min + (lr - lr_min) (1 + cos(pi (k - W) / D)) / 2
        otherwise:      lr_min

    Args:
        optimizer: Its `lr` is the peak.
        t_initial: Length D of the cosine, in updates.
        warmup_t: Length W of the warm-up, in updates.
        warmup_lr_init: Rate at update 0.
        lr_min: Floor.
        t_in_epochs: Must be False: the trainer steps once per update.
        warmup_prefix: True starts the cosine after the warm-up; False lets the
            warm-up replace the cosine's beginning.
        last_epoch: Update to resume after.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        t_initial: float,
        warmup_t: float = 0,
        warmup_lr_init: float = 0.0,
        lr_min: float = 0.0,
        t_in_epochs: bool = False,
        warmup_prefix: bool = True,
        last_epoch: int = -1,
    ) -> None:
        if t_in_epochs:
            raise ConfigError(
                "lr_scheduler.t_in_epochs=True: the schedule counts updates; "
                "choose False."
            )
        self.t_initial = t_initial
        self.warmup_t = warmup_t
        self.warmup_lr_init = warmup_lr_init
        self.lr_min = lr_min
        self.warmup_prefix = warmup_prefix
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        return [self._rate(lr, self.last_epoch) for lr in self.base_lrs]

    def _rate(self, lr: float, k: int) -> float:
        if k < self.warmup_t:
            return self.warmup_lr_init + k * (lr - self.warmup_lr_init) / self.warmup_t
        if self.warmup_prefix:
            k = k - self.warmup_t
        if k >= self.t_initial:
            return self.lr_min
        cosine = math.cos(math.pi * k / self.t_initial)
        return self.lr_min + 0.5 * (lr - self.lr_min) * (1 + cosine)


class LRHalveScheduler:
    """Factor for `LambdaLR`: linear warm-up, then halved every n_halve_steps.

    Args:
        warmup_steps: Updates until the factor reaches 1.
        n_halve_steps: Updates between halvings, counted from the warm-up's end.
    """

    def __init__(self, warmup_steps: int, n_halve_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.n_halve_steps = n_halve_steps

    def __call__(self, current_step: int) -> float:
        if current_step < self.warmup_steps:
            return current_step / self.warmup_steps
        return 0.5 ** ((current_step - self.warmup_steps) // self.n_halve_steps)


# ---------------------------------------------------------------- callbacks


class GradientInspectionCallback(lightning.Callback):
    """Logs the norms of the largest parameter gradients, before clipping.

    Args:
        num_grads_log: How many parameters to log at each logging step.
    """

    def __init__(self, num_grads_log: int = 10) -> None:
        self.num_grads_log = num_grads_log

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return
        named = [
            (name, parameter.grad)
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        ]
        norms = torch.stack([grad.norm() for _, grad in named])
        top = norms.topk(min(self.num_grads_log, len(named)))
        for norm, index in zip(top.values, top.indices.tolist(), strict=True):
            pl_module.log(f"grad_norm/{named[index][0]}", norm)


# ---------------------------------------------------------------- command line

if __name__ == "__main__":  # python utils.py --vocab_size=N: see integral/__main__.py
    runpy.run_module("integral", run_name="__main__")
