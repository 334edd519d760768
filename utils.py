"""What three or more files need: user errors, table look-up, config resolvers,
and files behind fsspec.

Nothing here knows about algorithms or data. Importing it has no side effects;
`main.py` calls `register_resolvers` once.
"""

import ast
import difflib
import functools
import glob
import importlib
import json
import math
import operator
import os
import posixpath
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from omegaconf import OmegaConf

T = TypeVar("T")

CHANNELS = 3  # of images: red, green, blue
CONFIGS = Path(__file__).resolve().parent / "configs"
# By group and name: what plug-ins add to these files (`cli/plugins.py`).
ADDED: dict[str, dict[str, dict[str, Any]]] = {}

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

    `main.py` prints the text without a traceback and exits with `status`. Where the
    same run can go on it prints the command, too.
    """

    def __init__(
        self, message: str, status: int = 1, can_go_on: bool | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        was_signal = status > 128
        self.can_go_on = was_signal if can_go_on is None else can_go_on


class NotFinite(RunStopped):
    """Numbers that would be NaN or infinite, which nobody should go on with."""


class SignalReceived(SystemExit):
    """A signal that asks the process to end, where it stands; see `cli/signals.py`.

    No handler of errors takes it for one. Uncaught it ends the process with the status
    that a shell gives to one that the signal has killed.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def stopped_by(error: KeyboardInterrupt | SystemExit, kept: str) -> RunStopped:
    """What a signal ends a run with, in one line that says what is left of its work."""
    status = error.code if isinstance(error, SystemExit) else None
    if type(status) is not int or status <= 128:  # Ctrl-C, of which Lightning makes 1
        status = 128 + signal.SIGINT
    return RunStopped(f"stopped by {signal.Signals(status - 128).name}; {kept}", status)


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


def require(value: Any, choices: Iterable[object], key: str, where: str = "") -> None:
    """Refuses a value outside its choices; see `choose`."""
    if value not in choices:
        raise ConfigError(unknown_value(key, value, choices, where))


def unknown_value(
    key: str, value: Any, choices: Iterable[object], where: str = ""
) -> str:
    """The one line for a value outside its choices, with the nearest as a hint."""
    names = sorted({"null" if x is None else str(x) for x in choices})
    context = f" ({where})" if where else ""
    return (
        f"Unknown {key}={value!r}{context}.{did_you_mean(value, names)} "
        f"Choose from: {', '.join(names)}."
    )


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """' Did you mean ...?' if a choice is close to `value`, else nothing."""
    names, word = {x.lower(): x for x in choices}, str(value).lower()
    close = difflib.get_close_matches(word, names, n=1)
    close = close or [x for x in names if len(word) > 2 and word in x]
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def choices_of(group: str) -> list[str]:
    """Names that a group of the config may be given, those of plug-ins among them."""
    names = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
    return sorted(x for x in names | ADDED.get(group, {}).keys() if x[0] != "_")


def imported(path: str) -> Any:
    """What a dotted path such as "models.dit.DIT" names, imported now."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def one_line(text: str) -> str:
    """Text with its line breaks and runs of blanks made into single blanks."""
    return " ".join(text.split())


# Of what no screen shows, that which does nothing but join or part letters.
_JOINERS = "\u200c\u200d"
# Controls (the escape of terminals among them), marks of direction and others without a
# form, halves of surrogate pairs, and two ends of lines.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: object, keep: str = "\n\t") -> str:
    """Text as it may be printed: what a screen would obey is escaped, as in \\x1b.

    All that comes from a model, a file, data or a command line is printed through this.

    Args:
        text: Anything that has a text.
        keep: Control characters that stay.
    """
    return "".join(
        x.encode("unicode_escape").decode()
        if unicodedata.category(x) in _UNSEEN and x not in keep + _JOINERS
        else x
        for x in str(text)
    )


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on stderr; a signal's status is no error."""
    kind = "" if status > 128 else "error: "
    sys.stderr.write(f"{kind}{printable(one_line(message))}\n")
    sys.exit(status)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------- resolvers

_ARITHMETIC: dict[type[ast.AST], Callable[..., int | float]] = {
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
            case ast.Constant(int() | float() as number) if not isinstance(
                number, bool
            ):
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
    import torch  # here, because it takes longer than all that needs no device

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


def device_count(accelerator: str = "auto") -> int:
    """GPUs of this machine, or 1 where the run is on a CPU."""
    import torch

    return torch.cuda.device_count() if uses_cuda(accelerator) else 1


def register_resolvers() -> None:
    """Registers the OmegaConf resolvers that the configs use (idempotent)."""
    resolvers: dict[str, Callable[..., Any]] = {
        "cwd": os.getcwd,
        "device_count": device_count,
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
        "by_mode": lambda mode, usual, others: others.get(mode, usual),
        "div_up": lambda x, y: math.ceil(x / y),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def hydra_quoted(text: str) -> str:
    """A value for Hydra's command line, whatever is in it.

    Backslashes count only in front of a quote, the last one included.
    """
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'") + "'"


# What fsspec reads: a protocol, perhaps behind others (zip://a::s3://b, cache::s3://b).
_STORED = re.compile(r"([\w.+-]+::)*[A-Za-z][\w.+-]*://")


def filesystem_of(path: str) -> tuple[Any, str]:
    """The file system of fsspec that a path is on, and its name there.

    A path without a protocol is on this machine, whatever is in it: "::" and what
    resembles a protocol further on are part of its name.
    """
    for protocol in ("file://", "local://"):
        path = path.removeprefix(protocol)
    if _STORED.match(path):
        return fsspec.core.url_to_fs(path)
    path = os.path.expanduser(path).removeprefix("./")
    inner = os.path.join(os.getcwd(), path).rstrip("/") or "/"
    return LocalFileSystem(), inner


def open_file(path: str, mode: str = "rb", **options: Any) -> Any:
    """Opens a local or fsspec path; options are those of fsspec's `open`."""
    filesystem, inner = filesystem_of(path)
    return filesystem.open(inner, mode, **options)


def is_local(path: str) -> bool:
    """Whether a path is on this machine."""
    return isinstance(filesystem_of(path)[0], LocalFileSystem)


def local_folder(path: str) -> str:
    """The folder itself where it is on this machine, else the user's cache."""
    return filesystem_of(path)[1] if is_local(path) else user_cache_dir()


def path_exists(path: str) -> bool:
    """Whether a local or fsspec path (s3://, gs://, memory://) exists."""
    filesystem, inner = filesystem_of(path)
    return filesystem.exists(inner)


def files_named(name: str) -> list[str]:
    """What a local name means: itself if it exists, else what it matches as a pattern.

    Folders of a pattern that exist as they are written are no patterns, so that
    wiki[en]/*.txt is of the folder wiki[en]; a folder `**` is any number of them.
    """
    if os.path.exists(name):
        return [name]
    folder, rest = os.path.dirname(name), os.path.basename(name)
    while folder and not os.path.isdir(folder):
        above = os.path.dirname(folder)
        rest = os.path.join(os.path.basename(folder), rest)
        folder = "" if above == folder else above
    pattern = os.path.join(glob.escape(folder), rest)
    return sorted(glob.glob(pattern, recursive=True))


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
    filesystem, inner = filesystem_of(path)
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


def flush(path: str) -> None:
    """Has the disk keep a local file, or the names in a folder, should the power go."""
    is_folder = os.path.isdir(path)
    with suppress(*([OSError] if is_folder else [])):  # not every system can do it
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_file(source: str, target: str) -> None:
    """Copies between local or fsspec paths, all of it or nothing."""
    with open_file(source) as old, whole_file(target) as new:
        shutil.copyfileobj(old, new)


# ---------------------------------------------------------------- processes


class Process(NamedTuple):
    """A process, told from others also after its pid has come back."""

    host: str
    pid: int
    started: str  # when, as the machine counts
    space: str  # of its pids: a boot of the machine, and a container on it

    @classmethod
    def this(cls) -> "Process":
        """The one that runs."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_of(pid) or "", _pid_space())

    def lives(self) -> bool | None:
        """Whether it still runs; None: from here that cannot be seen."""
        if self.space != _pid_space():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # another user's
        if not _sees_own_processes():
            return None
        return bool(self.started) and _start_of(self.pid) == self.started

    def is_of_this_machine(self) -> bool:
        """Whether its machine is this one, in this life of it; in any container."""
        return self.space.split()[:1] == _pid_space().split()[:1]


def _start_of(pid: int) -> str | None:
    """When a process began; None if there is none, or it only waits to be buried."""
    name = "self" if pid == os.getpid() else pid
    try:
        stat = Path(f"/proc/{name}/stat").read_text()
    except OSError:
        return None if sys.platform == "linux" else _start_by_ps(pid)
    state, *fields = stat.rpartition(")")[2].split()  # its name may hold blanks
    return None if state in "ZX" else fields[18]


def _start_by_ps(pid: int) -> str | None:
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _sees_own_processes() -> bool:
    """Whether /proc is that of this container and not of the machine around it."""
    return sys.platform != "linux" or os.readlink("/proc/self") == str(os.getpid())


# ---------------------------------------------------------------- older names

# Names that published configs and checkpoints look for here, and where they are now.
MOVED = {
    "CosineDecayWarmupLRScheduler": "training.schedules.CosineDecayWarmupLRScheduler",
    "LRHalveScheduler": "training.schedules.LRHalveScheduler",
    "GradientInspectionCallback": "training.gradients.GradientInspectionCallback",
}


def __getattr__(name: str) -> Any:
    """Classes that this module once held, under `utils.NAME`."""
    if name in MOVED:
        return imported(MOVED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------- command line

if __name__ == "__main__":  # python utils.py --vocab_size=N: see integral/__main__.py
    runpy.run_module("integral", run_name="__main__")
