"""For notebooks and for modules of the user's own: compose a config and train, load a
checkpoint and sample, score and evaluate with it, enter a class under a name.

    import duo

    model = duo.load("last.ckpt")
    model.sample(4, steps=64)

In an installation the other packages lie in a folder of their own, which this one puts
on Python's path (see cli/entry.py); nothing else happens when it is imported.
"""

import sys
from pathlib import Path

_AROUND = (
    Path(__file__).resolve().parents[1]
)  # a clone, or where packages are installed
_INSTALLED = _AROUND / "discrete_diffusion"
_CODE = str(_INSTALLED if _INSTALLED.is_dir() else _AROUND)
if _CODE not in sys.path:
    sys.path.insert(0, _CODE)

from cli.plugins import (  # noqa: E402
    algorithm,
    backbone,
    dataset,
    metric,
    sampler,
    schedule,
)
from duo.notebook import Trained, compose, load, train  # noqa: E402
from utils import ConfigError  # noqa: E402

__all__ = [
    "ConfigError",
    "Trained",
    "algorithm",
    "backbone",
    "compose",
    "dataset",
    "load",
    "metric",
    "sampler",
    "schedule",
    "train",
]
