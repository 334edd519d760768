"""The extractor of `eval.fid_features`: read from its file, and known by its hash.

A file of weights is read as data. TorchScript is a program, which torch runs; it is
loaded because the user has named the file, and from nowhere else.
"""

import re
import zipfile
from typing import NamedTuple

import torch
from torch import nn

from checkpoints.reading import read_weights
from evaluation.parts import digest_of
from metrics.inception import KEY, Inception, Scripted
from utils import ConfigError, first_line, open_file

SCRIPT = re.compile(r"[^/]+/(code/.+|constants\.pkl)")  # records that only scripts have


class Named(NamedTuple):
    """An extractor, and what a result says of it."""

    network: nn.Module  # see `metrics.inception.Extractor`
    path: str
    sha256: str
    kind: str  # TorchScript | Inception


def read_extractor(path: str) -> Named:
    """The extractor in a file, on the CPU, ready to evaluate.

    Args:
        path: Local or fsspec path of a TorchScript file or of a state dict of FID's
            Inception network.

    Raises:
        ConfigError: If it is neither.
    """
    if not is_script(path):
        network: nn.Module = Inception.of_weights(read_weights(path, KEY))
        return Named(network, path, digest_of(path), "Inception")
    try:
        with open_file(path) as file:
            script = torch.jit.load(file, map_location="cpu")
    except Exception as error:  # torch raises many kinds
        raise ConfigError(
            f"{KEY}={path!r} cannot be read: {first_line(error)}"
        ) from None
    network = Scripted(script).eval().requires_grad_(False)
    return Named(network, path, digest_of(path), "TorchScript")


def is_script(path: str) -> bool:
    """Whether a file is of TorchScript."""
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return any(SCRIPT.fullmatch(name) for name in archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError):
            return False
