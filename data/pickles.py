"""Reads pickles as data, by rules of its own: nothing that a file names is called.

Python's unpickler, and torch's, hand out functions and call them with what the file
says. This one builds numbers, texts, lists, dicts, sets and tuples itself; what else a
file names is built by a table of the caller's. What a file can cost is bounded by its
size: it has at most so many objects, a key of a dict is a plain value, so that nothing
is compared or hashed through and through, and what copies something pays for it.
"""

import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any, NamedTuple

MAX_STEPS = 1_000_000  # of a pickle; that of a large tokenizer has some 600,000
MAX_VALUES = 200_000  # that are gone through, one that is there twice counted twice
MAX_DEPTH = 100  # of lists in lists
MAX_BITS = 128  # of a whole number


class Named(NamedTuple):
    """What stands in the place of a function or class that a file names."""

    name: str  # module and name
    make: Callable[..., Any]  # called with what the file would call it with


class _Mark:
    """Where the arguments of an instruction begin."""


_MARK = _Mark()
# Instructions whose argument is the value itself.
_VALUES = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_NOTHING = {"PROTO", "FRAME"}
_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(
    file: IO[bytes],
    find: Callable[[str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of one pickle.

    Args:
        file: At its beginning; afterwards at its end.
        find: Gives what a name "module.name" stands for, mostly a `Named`.
        persistent: Gives what a persistent id stands for, if there may be any.

    Raises:
        Exception: If it is damaged, too large, or asks for anything else; a broken file
            may raise any kind.
    """
    return _Machine(find, persistent).run(file)


class Budget:
    """What may still be copied, in items or bytes.

    Args:
        amount: Of all copies together.
    """

    def __init__(self, amount: int) -> None:
        self._left = amount

    def spend(self, amount: int) -> None:
        """Raises a ValueError if it is too much."""
        self._left -= amount
        if self._left < 0:
            raise ValueError("it asks for more memory than it has bytes")


def check_extent(value: Any) -> None:
    """Refuses lists, tuples and dicts that hold themselves or the same one too often.

    Args:
        value: From `read_pickle`.

    Raises:
        ValueError: If whoever goes through it would not come to an end soon.
    """
    budget = Budget(MAX_VALUES)
    rest: list[tuple[Any, int]] = [(value, 0)]
    while rest:
        node, depth = rest.pop()
        budget.spend(1)
        inner: Iterable[Any] = ()
        if isinstance(node, dict):
            inner = node.values()
        elif isinstance(node, (list, tuple, set, frozenset)):
            inner = node
        if inner and depth == MAX_DEPTH:
            raise ValueError(f"it nests lists more than {MAX_DEPTH} deep")
        rest += [(x, depth + 1) for x in inner]


def _key(value: Any) -> Any:
    """A key of a dict or set, whose hash takes no time."""
    parts = value if type(value) is tuple else (value,)
    plain = (str, int, float, bytes, Named, type(None))
    if not all(isinstance(x, plain) for x in parts):
        raise ValueError(f"a key of it is a {type(value).__name__}")
    return value


class _Machine:
    """Follows the instructions of one pickle."""

    def __init__(
        self,
        find: Callable[[str], Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self._find = find
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        push, rare = self._stack.append, _RARE
        arg: Any
        for step, (code, arg, _) in enumerate(pickletools.genops(file)):
            name = code.name
            if step > MAX_STEPS:
                raise ValueError(f"it has more than {MAX_STEPS} objects")
            if name in _VALUES:
                if type(arg) is int and arg.bit_length() > MAX_BITS:
                    raise ValueError(f"it has a number of {arg.bit_length()} bits")
                push(arg)
            elif name in _PUT:
                self._memo[int(arg)] = self._top()
            elif name in _GET:
                push(self._memo[int(arg)])
            elif name in _NEW:
                push(_NEW[name]())
            elif name in _SIZES:
                size = _SIZES[name]
                push(tuple([self._pop() for _ in range(size)][::-1]))
            elif name in rare:
                rare[name](self, arg)
            elif name not in _NOTHING and name != "STOP":
                raise ValueError(f"it has the instruction {name}")
        return self._pop()

    # ---- the stack

    def _top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a value of it is missing")
        return value

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _pop_to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # an IndexError if there is none
            at -= 1
            if at < 0:
                raise ValueError("a mark of it is missing")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    # ---- instructions

    def mark(self, arg: Any) -> None:
        self._stack.append(_MARK)

    def pop(self, arg: Any) -> None:
        self._stack.pop()

    def pop_mark(self, arg: Any) -> None:
        self._pop_to_mark()

    def dup(self, arg: Any) -> None:
        self._stack.append(self._top())

    def memoize(self, arg: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def tuple(self, arg: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def list(self, arg: Any) -> None:
        self._stack.append(self._pop_to_mark())

    def dict(self, arg: Any) -> None:
        values = self._pop_to_mark()
        self._stack.append({})
        self._set(values)

    def frozenset(self, arg: Any) -> None:
        self._stack.append(frozenset(map(_key, self._pop_to_mark())))

    def append(self, arg: Any) -> None:
        self._append([self._pop()])

    def appends(self, arg: Any) -> None:
        self._append(self._pop_to_mark())

    def _append(self, values: Any) -> None:
        self._of_type(list).extend(values)

    def additems(self, arg: Any) -> None:
        values = self._pop_to_mark()
        self._of_type(set).update(map(_key, values))

    def setitem(self, arg: Any) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def setitems(self, arg: Any) -> None:
        self._set(self._pop_to_mark())

    def _set(self, values: Any) -> None:
        target = self._of_type(dict)
        keys = map(_key, values[::2])
        target.update(zip(keys, values[1::2], strict=True))

    def _of_type(self, kind: type) -> Any:
        value = self._top()
        if not isinstance(value, kind):
            what = f"{kind.__name__} where it has a {type(value).__name__}"
            raise ValueError(f"it asks for a {what}")
        return value

    # ---- what it names

    def global_(self, arg: Any) -> None:
        module, name = arg.split(" ", 1)
        self._stack.append(self._find(f"{module}.{name}"))

    def stack_global(self, arg: Any) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name of it is none")
        self._stack.append(self._find(f"{module}.{name}"))

    def reduce(self, arg: Any) -> None:
        args = self._pop()
        self._call(self._pop(), args)

    def inst(self, arg: Any) -> None:
        args = tuple(self._pop_to_mark())
        self.global_(arg)
        self._call(self._pop(), args)

    def obj(self, arg: Any) -> None:
        named, *args = self._pop_to_mark()
        self._call(named, tuple(args))

    def _call(self, named: Any, args: Any) -> None:
        if not isinstance(named, Named) or type(args) is not tuple:
            raise ValueError("it calls what is no name")
        self._stack.append(named.make(*args))

    def build(self, arg: Any) -> None:
        state = self._pop()
        target = self._top()
        if hasattr(target, "__setstate__"):
            target.__setstate__(state)
        elif not isinstance(target, (dict, set)):  # whose attributes nobody reads
            raise ValueError(f"it has a state for a {type(target).__name__}")

    def persid(self, arg: Any) -> None:
        if self._persistent is None:
            raise ValueError("it refers to what is not in it")
        self._stack.append(self._persistent(arg))

    def binpersid(self, arg: Any) -> None:
        self.persid(self._pop())


_RARE: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.tuple,
    "LIST": _Machine.list,
    "DICT": _Machine.dict,
    "FROZENSET": _Machine.frozenset,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.additems,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,  # the class stands where the function does
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "BUILD": _Machine.build,
    "PERSID": _Machine.persid,
    "BINPERSID": _Machine.binpersid,
}
