"""Tables of the operator in files: ours (.npz) and the published ones (.pkl).

A table holds P and dP/dgamma on equally spaced gammas. Nothing needs one; they are for
comparison with older runs. Reading a file never executes code from it.
"""

import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from data import pickled_arrays
from integral.transform import GammaRange, Operator, Spectral
from models.noise import NoiseLevel
from utils import ConfigError, one_line, open_file, path_exists, whole_file

_FIELDS = ("vocab_size", "gamma_min", "gamma_max", "num_points", "pt", "grad_pt")
_DIFFERENCE = 1e-3  # step in gamma of the published derivative


class Table(NamedTuple):
    """P and dP/dgamma at `num_points` gammas from gamma_min to gamma_max."""

    vocab_size: int
    gamma_min: float
    gamma_max: float
    num_points: int
    pt: np.ndarray  # (num_points,)
    grad_pt: np.ndarray  # (num_points,)

    @property
    def gammas(self) -> GammaRange:
        return GammaRange(self.gamma_min, self.gamma_max)

    def grid(self) -> np.ndarray:
        return np.linspace(self.gamma_min, self.gamma_max, self.num_points)


def build_table(
    vocab_size: int,
    gammas: GammaRange,
    num_points: int,
    rows: slice = slice(None),
) -> Table:
    """A table to 1e-12; of `rows` of its points only, if given."""
    t = torch.linspace(0, 1, num_points, dtype=torch.float64)[rows]
    pt, dpt_dt = Spectral(vocab_size, gammas).probability(t)
    grad_pt = dpt_dt / (gammas.high - gammas.low)
    return Table(vocab_size, *gammas, num_points, pt.numpy(), grad_pt.numpy())


def write_table(path: Path, table: Table) -> None:
    """Writes .npz, all of it or nothing."""
    with whole_file(str(path)) as file:
        np.savez(file, **table._asdict())


def read_table(path: str, key: str) -> Table:
    """Reads a table of ours or of the published code.

    Args:
        path: Local or fsspec path.
        key: Config key that held the path, for messages.

    Raises:
        ConfigError: If there is no such file, or it is no table.
    """
    where = f"{key}={path!r}"
    try:
        is_there = path_exists(path)
    except (ValueError, ImportError) as error:  # a protocol that is not known here
        raise ConfigError(f"{where}: {error}") from None
    if not is_there:
        raise ConfigError(
            f"{where}: there is no such file. null needs none: the operator is then "
            "computed to machine precision."
        )
    try:
        with open_file(path) as file:
            return _checked(_read(file))
    except Exception as error:  # a broken file may raise anything
        reason = one_line(str(error)) or type(error).__name__
        raise ConfigError(f"{where} is no table of the operator: {reason}") from None


def _read(file: Any) -> dict[str, Any]:
    if zipfile.is_zipfile(file):
        size = file.seek(0, io.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            if sum(info.file_size for info in archive.infolist()) > 2 * size:
                raise ValueError("its arrays are larger than the file")
        file.seek(0)
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in _FIELDS if name in content.files}
    file.seek(0)
    return pickled_arrays.load(file)


def _checked(content: Any) -> Table:
    if not isinstance(content, dict) or not set(_FIELDS) <= content.keys():
        raise ValueError(f"it does not hold {', '.join(_FIELDS)}")
    sizes = (int(content[name]) for name in ("vocab_size", "num_points"))
    vocab_size, num_points = sizes
    low, high = (float(content[name]) for name in ("gamma_min", "gamma_max"))
    pt, grad_pt = (np.array(content[name], np.float64) for name in _FIELDS[4:])
    if not pt.shape == grad_pt.shape == (num_points,) or num_points < 2:
        raise ValueError(f"its arrays do not hold num_points={num_points} values")
    if vocab_size < 2 or not -np.inf < low < high < np.inf:
        raise ValueError(f"vocab_size={vocab_size}, gamma from {low} to {high}")
    if not (np.isfinite(pt).all() and np.isfinite(grad_pt).all()):
        raise ValueError("it holds values that are not finite")
    return Table(vocab_size, low, high, num_points, pt, grad_pt)


class Interpolated(Operator):
    """A cubic through a table's values and slopes; gamma must lie in the table.

    Args:
        table: Of the model's vocabulary size.
        gammas: Range of gamma that the run uses.
        key: Config key that named the table, for messages.

    Raises:
        ConfigError: If the table is too narrow.
    """

    def __init__(self, table: Table, gammas: GammaRange, key: str) -> None:
        super().__init__(table.vocab_size, gammas)
        outside = gammas.low < table.gamma_min or gammas.high > table.gamma_max
        if outside:
            raise ConfigError(
                f"{key}: the table reaches from gamma {table.gamma_min} to "
                f"{table.gamma_max}, not from {gammas.low} to {gammas.high}."
            )
        self.P = CubicHermiteSpline(table.grid(), table.pt, table.grad_pt)
        self.dP = self.P.derivative()

    def level(self, t: Tensor) -> NoiseLevel:
        K = self.vocab_size
        gamma = self.gammas.gamma(t).detach().double().cpu().numpy()
        P, dP = (torch.from_numpy(f(gamma)).to(t) for f in (self.P, self.dP))
        dgamma = self.gammas.high - self.gammas.low
        return NoiseLevel((K * P - 1) / (K - 1), K / (K - 1) * dP * dgamma)


class Nearest(Operator):
    """The published look-up: the nearest entry, and a difference for the derivative.

    NOTE(compat): gamma in float32, clipped to the table; dalpha_t is
    (alpha(gamma + 0.001) - alpha(gamma)) / 0.001 times the range of gamma. K is the
    table's own, whatever the model's.
    """

    def __init__(self, table: Table, gammas: GammaRange) -> None:
        super().__init__(table.vocab_size, gammas)
        self.table = table
        self.pt = torch.from_numpy(table.pt)

    def level(self, t: Tensor) -> NoiseLevel:
        gamma = self.gammas.gamma(t.float())
        alpha = self._alpha(gamma)
        slope = (self._alpha(gamma + _DIFFERENCE) - alpha) / _DIFFERENCE
        dalpha = slope * (self.gammas.high - self.gammas.low)
        return NoiseLevel(alpha.to(t.device), dalpha.to(t.device))

    def _alpha(self, gamma: Tensor) -> Tensor:
        table, K = self.table, self.vocab_size
        gamma = gamma.cpu().clamp(table.gamma_min, table.gamma_max)
        place = (gamma - table.gamma_min) / (table.gamma_max - table.gamma_min)
        index = ((table.num_points - 1) * place).round().long()
        return (K * self.pt[index] - 1) / (K - 1)
