"""A stand-in for a GPU: a device that is not the host, on a machine without one.

Tensors on it say that they are on torch's `meta` device and hold their numbers on the
host, out of reach of code that does not ask for them as it would have to ask a GPU. So
code runs on it with real shapes and values. `StandIn` watches every operation and
complains, naming our line, of

- operands on two devices, and draws with the generator of another device;
- whatever a GPU could answer only after all that is queued on it (`Wait`).

What it cannot show: speed, memory, kernels, their rounding, autocast, inference mode,
and what code does only where `device.type == "cuda"`.
"""

import linecache
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]
# Where packages are: perhaps within ROOT, under any name.
INSTALLED = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
DEVICE = torch.device("meta")
HOST = torch.device("cpu")

# Operations that give values to the host, or results whose size depends on values.
ASKING = (
    "_local_scalar_dense",
    "_unique",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
COPYING = ("_to_copy", "copy_")
FROM_PYTHON = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Wait(NamedTuple):
    """A place at which the host waits for the device."""

    place: str  # file:function, relative to the repository
    line: int
    source: str
    why: str

    def __str__(self) -> str:
        file, function = self.place.split(":")
        return f"{file}:{self.line}, in {function}: {self.why}\n    {self.source}"


class OnDevice(Tensor):
    """A tensor on the device; `numbers` is the same on the host."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        x = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        x.numbers = numbers
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the device while `StandIn` is not entered")


class DeviceGenerator(torch.Generator):
    """A generator on the device; it draws what one of the host draws."""

    device = DEVICE

    def __new__(cls) -> "DeviceGenerator":
        return super().__new__(cls, HOST)


class StandIn:
    """The device, as long as it is entered; see the file's docstring."""

    def __init__(self) -> None:
        self.waits: list[Wait] | None = None  # None: they are not recorded
        self.allowed: frozenset[str] = frozenset()
        self._entered = ExitStack()

    def __enter__(self) -> "StandIn":
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for owner, name, value in self._replacements():
                patch.setattr(owner, name, value)
            stack.enter_context(_Calls(self))
            stack.enter_context(_Operations(self))
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    @contextmanager
    def watched(self, *allowed: str) -> Iterator[list[Wait]]:
        """Waits within it are errors but at some places, each a "file:function".

        Gives the list of those.
        """
        self.waits, self.allowed = [], frozenset(allowed)
        try:
            yield self.waits
        finally:
            self.waits = None

    def wait(self, why: str) -> None:
        """Notes that the host waits."""
        if self.waits is None:
            return
        found = Wait(*_place(), why)
        if found.place not in self.allowed:
            raise AssertionError(f"the host waits for the device at {found}")
        self.waits.append(found)

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        """What torch answers differently for a device that it knows."""
        autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
        generator, dtype = torch.Generator, torch.get_autocast_dtype
        optimizers = sys.modules[torch.optim.Optimizer.__module__]
        fused = optimizers._get_fused_kernels_supported_devices

        def known(device: str) -> str:
            return "cpu" if device == DEVICE.type else device

        def generator_on(device: Any = HOST) -> torch.Generator:
            is_here = torch.device(device) == DEVICE
            return DeviceGenerator() if is_here else generator(device)

        return [
            (torch, "Generator", generator_on),
            (torch, "autocast", lambda d, *a, **k: autocast(known(d), *a, **k)),
            (torch, "is_autocast_enabled", lambda d: is_enabled(known(d))),
            (torch, "get_autocast_dtype", lambda d: dtype(known(d))),
            (
                optimizers,
                "_get_fused_kernels_supported_devices",
                lambda: [*fused(), DEVICE.type],
            ),
        ]


class _Calls(TorchFunctionMode):
    """What operations cannot tell: whose generator it is; tensors made of numbers of
    Python, which torch copies to a device and waits."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        where = kwargs.get("device")
        if generator is not None:
            if where is None:
                where = args[0].device if isinstance(args[0], Tensor) else HOST
            if torch.device(where) != generator.device:
                raise AssertionError(
                    f"{func.__name__} on {torch.device(where)} draws with a generator "
                    f"on {generator.device}, at {_where()}"
                )
        if func is Tensor.tolist:  # not for subclasses
            return args[0].cpu().numpy().tolist()
        if func in FROM_PYTHON and where is not None and torch.device(where) == DEVICE:
            x = func(*args, **kwargs | {"device": HOST})
            return x.to(DEVICE)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Runs operations on the numbers that tensors of the device hold."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        ours = {id(x.numbers): x for x in tensors if isinstance(x, OnDevice)}
        target = kwargs.get("device")
        is_made = not tensors and target is not None and target == DEVICE
        name = func._schema.name.removeprefix("aten::")
        if name in COPYING:
            return self._copy(func, name, args, kwargs)
        if not ours and not is_made:
            return func(*args, **kwargs)
        self._check(func, name, tensors, args)
        if "device" in kwargs:
            kwargs["device"] = HOST
        results = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if name.startswith(ASKING) and not isinstance(results, (Tensor, tuple, list)):
            return results
        return tree_map(lambda x: _outside(x, ours), results)

    def _copy(self, func, name: str, args, kwargs) -> Tensor:
        """Between devices, or to another type."""
        if name == "copy_":
            target, source = args[0].device, args[1].device
            is_async = kwargs.get("non_blocking", len(args) > 2 and args[2])
        else:
            source = args[0].device
            target = kwargs.get("device") or source
            is_async = kwargs.get("non_blocking", False)
        if source != target and target == HOST:
            self.device.wait("numbers are copied to the host")
        elif source != target and not is_async:
            self.device.wait(
                "numbers of the host are copied, and the host waits until they are "
                "there; models.device.to_device does not"
            )
        if name == "copy_":
            func(*tree_map(_inside, args), **kwargs)
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = HOST
        x = func(_inside(args[0]), **kwargs)
        return OnDevice(x) if target == DEVICE else x

    def _check(self, func, name: str, tensors: Sequence[Tensor], args) -> None:
        strangers = [x for x in tensors if not isinstance(x, OnDevice)]
        if name in INDEXING and isinstance(args[0], OnDevice):
            if strangers:
                self.device.wait(f"{func} copies from the host and waits")
            elif any(x.dtype == torch.bool for x in _tensors(args[1])):
                self.device.wait(f"the size of {func} with a mask depends on values")
        elif any(x.dim() > 0 for x in strangers):  # single numbers meet any tensor
            places = [f"{tuple(x.shape)} on {x.device}" for x in tensors]
            raise AssertionError(
                f"{func} has operands on two devices, {', '.join(places)}, at "
                f"{_where()}"
            )
        if name.startswith(ASKING):
            self.device.wait(f"{func} needs the device's answer")


def _tensors(*nested: Any) -> list[Tensor]:
    return [x for x in tree_leaves(nested) if isinstance(x, Tensor)]


def _inside(x: Any) -> Any:
    return x.numbers if isinstance(x, OnDevice) else x


def _outside(x: Any, known: dict[int, OnDevice]) -> Any:
    """The tensor on the device that holds x: the one that was given, if it was."""
    if not isinstance(x, Tensor):
        return x
    return known[id(x)] if id(x) in known else OnDevice(x)


def _place() -> tuple[str, int, str]:
    """The innermost line of ours that is not of this file."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_installed = any(path.is_relative_to(folder) for folder in INSTALLED)
        is_ours = path.is_relative_to(ROOT) and not is_installed
        if is_ours and path != Path(__file__):
            function = frame.f_code.co_qualname.split(".<locals>")[0]
            line = linecache.getline(str(path), frame.f_lineno).strip()
            name = path.relative_to(ROOT).as_posix()
            return f"{name}:{function}", frame.f_lineno, line
        frame = frame.f_back
    return "torch:autograd", 0, ""


def _where() -> str:
    return str(Wait(*_place(), "this line"))
