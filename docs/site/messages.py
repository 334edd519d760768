"""What the library's exceptions say, read from its source: nothing is imported.

A message is the text of an exception with a name in angle brackets where a value will
stand. Texts are followed through variables, constants and functions that return them,
so that a message that is put together elsewhere is found as well.
"""

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("cli", "data", "models", "diffusion", "distillation", "training", "checkpoints"),
    *("sampling", "metrics", "evaluation", "report", "integral", "duo"),
)
# What ends a command with one line and no traceback, and what is raised to Python.
OF_COMMANDS = ("ConfigError", "RunStopped", "NotFinite", "fail", "_refused", "_stopped")
OF_PYTHON = (
    *("ValueError", "RuntimeError", "TypeError", "IndexError", "AttributeError"),
    *("FileNotFoundError", "NotImplementedError"),
)
# Functions whose text is that of their first argument, and those that add a hint or the
# command that goes on, or nothing.
SAME = ("one_line", "printable", "str")
HINTS = ("did_you_mean", "key_hint", "_hint", "_again")
MOST = 6  # alternatives of one message


class Message(NamedTuple):
    """One text, and where it is made."""

    file: str
    line: int
    kind: str  # the name that is called: ConfigError, fail, ...
    text: str


class Place(NamedTuple):
    """Where an expression stands."""

    module: str  # a file of the repository
    function: ast.FunctionDef | None


def files() -> list[Path]:
    """Every source file of the library, in reading order."""
    inner = (sorted((ROOT / name).rglob("*.py")) for name in PACKAGES)
    return [*sorted(ROOT.glob("*.py")), *itertools.chain.from_iterable(inner)]


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    """The last name of what a call calls."""
    return ast.unparse(node.func).rsplit(".")[-1]


def calls(module: str) -> Iterator[tuple[ast.Call, Place]]:
    """Every call of a file, with the innermost function around it."""

    def walk(node: ast.AST, function: ast.FunctionDef | None) -> Iterator:
        if isinstance(node, ast.FunctionDef):
            function = node
        if isinstance(node, ast.Call):
            yield node, Place(module, function)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(parsed(module), None)


def messages(kinds: tuple[str, ...]) -> Iterator[Message]:
    """Every text that is given to one of the kinds; "" where none can be found."""
    for path in files():
        module = path.relative_to(ROOT).as_posix()
        found = ((x, place) for x, place in calls(module) if called(x) in kinds)
        for call, place in sorted(found, key=lambda pair: pair[0].lineno):
            texts = texts_of(call.args[0], place) if call.args else []
            for text in texts or [""]:
                said = " ".join(text.split())
                yield Message(module, call.lineno, called(call), said)


# ---------------------------------------------------------------- from source to text


def texts_of(node: ast.expr, place: Place, depth: int = 4) -> list[str]:
    """What an expression may say; [] if that is not written in the library."""
    if depth == 0:
        return []
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return joined([_part(x, place, depth) for x in parts])
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            sides = [texts_of(x, place, depth) or [_shown(x)] for x in (left, right)]
            return joined(sides)
        case ast.IfExp(body=first, orelse=second):
            return _all([first, second], place, depth)
        case ast.BoolOp(values=values):
            return _all(values, place, depth)
        case ast.NamedExpr(value=value):
            return texts_of(value, place, depth)
        case ast.Name(id=name):
            return _all(*_assigned(name, place), depth - 1)
        case ast.Call() if called(node) in SAME and node.args:
            return texts_of(node.args[0], place, depth)
        case ast.Call():
            names = _in_turn(called(node), place)
            found = (_all(*_returned(x, place), depth - 1) for x in names)
            return [text for texts in found for text in texts]
    return []


def joined(parts: list[list[str]]) -> list[str]:
    """Alternatives of a text from those of its parts, at most MOST."""
    product = itertools.islice(itertools.product(*parts), MOST)
    return ["".join(x) for x in product]


def _all(nodes: list[ast.expr], place: Place, depth: int) -> list[str]:
    return [text for x in nodes for text in texts_of(x, place, depth)]


def _part(node: ast.expr, place: Place, depth: int) -> list[str]:
    """A piece of an f-string: its own text, or the name of a value."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    value = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(value, ast.Call) and called(value) in HINTS:
        return [""]
    is_text = isinstance(value, ast.Name | ast.IfExp)
    found = texts_of(value, place, depth - 1) if is_text else []
    return found if 0 < len(found) <= 3 else [_shown(value)]


def _shown(node: ast.expr) -> str:
    """A value by the name that the source gives it, in angle brackets."""
    names = [x for x in ast.walk(node) if isinstance(x, ast.Name | ast.Attribute)]
    if isinstance(node, ast.Call):  # of what it is given, else of itself
        names = [x for a in node.args for x in ast.walk(a) if x in names] or names
    if not names:
        return "<...>"
    first = names[0]
    name = first.attr if isinstance(first, ast.Attribute) else first.id
    return f"<{name.strip('_').lower()}>"


def _assigned(name: str, place: Place) -> tuple[list[ast.expr], Place]:
    """What a variable is set to, in the function, in the module, or where that has it
    from."""
    for scope in (place.function, parsed(place.module)):
        if scope is None:
            continue
        if isinstance(scope, ast.FunctionDef):
            arguments = [*scope.args.args, *scope.args.kwonlyargs]
            if name in {x.arg for x in arguments}:
                return [], place
        found = []
        body = ast.walk(scope) if scope is place.function else scope.body
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else ()
            if isinstance(node, ast.AnnAssign | ast.NamedExpr):
                targets = [node.target]
            if any(isinstance(x, ast.Name) and x.id == name for x in targets):
                found += [node.value] if node.value else []
        if found:
            return found, place
    module = _origin(name, place.module)
    return _assigned(name, Place(module, None)) if module else ([], place)


def _in_turn(name: str, place: Place) -> list[str]:
    """The functions that a loop's variable is, or the name itself."""
    for node in ast.walk(place.function or parsed(place.module)):
        match node:
            case ast.For(target=ast.Name(id=loop), iter=ast.Tuple(elts=functions)):
                if loop == name:
                    return [x.id for x in functions if isinstance(x, ast.Name)]
    return [name]


def _returned(name: str, place: Place) -> tuple[list[ast.expr], Place]:
    """What a function of the library returns."""
    for node in ast.walk(parsed(place.module)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            returns = [x.value for x in ast.walk(node) if isinstance(x, ast.Return)]
            return [x for x in returns if x is not None], Place(place.module, node)
    module = _origin(name, place.module)
    return _returned(name, Place(module, None)) if module else ([], place)


def _origin(name: str, module: str) -> str | None:
    """The file of the library from which a module imports a name."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            path = node.module.replace(".", "/") + ".py"
            if name in {x.name for x in node.names} and (ROOT / path).exists():
                return path
    return None
