"""The documentation strings of Python's own standard library, as documents."""

import ast
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path


def standard_library() -> list[Path]:
    """Source files of the standard library, without tests and what else came along."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    found = []
    for folder, below, files in os.walk(root):
        # A dash is in the names of site-packages and of config-* build folders.
        below[:] = [name for name in below if name not in skipped and "-" not in name]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def docstrings(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(module path, its docstrings joined), read from source without importing."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        texts = [text for node in nodes if (text := ast.get_docstring(node))]
        if texts:
            yield path.relative_to(root).as_posix(), "\n\n".join(texts)
