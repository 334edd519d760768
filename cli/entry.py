"""The console scripts of the installed package.

An installation holds the tree of a clone below one folder, `discrete_diffusion`, so
that modules with names such as `utils` and `data` are not scattered over the user's
environment. The scripts put that folder first on the path and run the same files as
`python main.py` does in a clone. Plug-ins that say `from algo import MDLM`, processes
that start further ones, and paths beside the code therefore work as they do there.
"""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]


def discrete_diffusion() -> None:
    """Does what `python main.py` does."""
    sys.path.insert(0, str(FOLDER))
    # This name reaches Lightning, which starts its further processes with it.
    sys.argv[0] = str(FOLDER / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


def harness() -> None:
    """Does what `python -m evaluation.harness` does."""
    _run_module("evaluation.harness")


def operator() -> None:
    """Does what `python -m integral` does."""
    _run_module("integral")


def _run_module(name: str) -> None:
    sys.path.insert(0, str(FOLDER))
    runpy.run_module(name, run_name="__main__", alter_sys=True)
