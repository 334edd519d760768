"""Closed-form stand-ins for the operator, of DUO's second chapter (arXiv:2602.21185).

`Series` is a Taylor series in s = exp(-gamma / 2); the others are functions of t fitted
by least squares to the operator itself.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.polynomial import Polynomial
from scipy.optimize import curve_fit
from scipy.special import gammaln, log_ndtr
from torch import Tensor

from integral.transform import GammaRange, Operator, Spectral
from models.noise import NoiseLevel
from utils import ConfigError, whole_file

Coefficients = Sequence[float] | np.ndarray

SERIES_TOLERANCE = 1e-6  # of alpha
_NUM_POINTS = 1001  # of t in [0, 1] to which curves are fitted


class Series(Operator):
    """alpha from a Taylor series in s.

        m_n = 1/n! int z^n phi(z) Phi(z)^(K-1) dz,  i_n the same with z^(n+1)
        P = sum_n m_n s^n e^(-s^2/2)
        dP/ds = sum_n i_n s^n e^(-s^2/2) - s P

    Args:
        vocab_size: K.
        gammas: Range of gamma.
        num_terms: Terms of the series.

    Raises:
        ConfigError: If so few terms miss alpha by more than 1e-6 somewhere.
    """

    def __init__(self, vocab_size: int, gammas: GammaRange, num_terms: int) -> None:
        super().__init__(vocab_size, gammas)
        if num_terms < 1:
            raise ConfigError(f"algo.curriculum.n_series_terms={num_terms} is below 1.")
        self.m, self.i = series_coefficients(vocab_size, num_terms)
        t = torch.linspace(0, 1, 65, dtype=torch.float64)
        exact = Spectral(vocab_size, gammas)(t).alpha_t
        error = float((self.level(t).alpha_t - exact).abs().max())
        if not error <= SERIES_TOLERANCE:
            raise ConfigError(
                f"algo.curriculum.n_series_terms={num_terms} is too few from gamma "
                f"{gammas.low} on: alpha is off by {error:.1e}. Give more terms, or "
                "choose algo.curriculum.mode=efficient_cached."
            )

    def level(self, t: Tensor) -> NoiseLevel:
        K = self.vocab_size
        s = torch.exp(-self.gammas.gamma(t) / 2)
        n = torch.arange(len(self.m), dtype=t.dtype, device=t.device)
        log_powers = n * s.log()[..., None] - s[..., None] ** 2 / 2  # (..., N)

        def total(coefficients: np.ndarray) -> Tensor:  # s^n alone would overflow
            c = torch.from_numpy(coefficients)
            sign, log_size = (x.to(log_powers) for x in (c.sign(), c.abs().log()))
            return (sign * torch.exp(log_powers + log_size)).sum(dim=-1)

        P = total(self.m)
        dP_ds = total(self.i) - s * P
        ds_dt = -s / 2 * (self.gammas.high - self.gammas.low)
        return NoiseLevel((P - 1 / K) * K / (K - 1), dP_ds * ds_dt * K / (K - 1))


def series_coefficients(
    vocab_size: int, num_terms: int
) -> tuple[np.ndarray, np.ndarray]:
    """m_n and i_n of `Series`, by a trapezoid rule, (N,) each."""
    step, reach = 1 / 32, 10 + 2 * math.sqrt(num_terms)  # z^n phi(z) peaks at sqrt(n)
    z = np.arange(-reach, reach, step) + step / 2  # 0, of which there is no log, is out
    log_density = (vocab_size - 1) * log_ndtr(z) - z**2 / 2
    n = np.arange(num_terms)[:, None]
    size = np.exp(n * np.log(np.abs(z)) - gammaln(n + 1) + log_density)
    term = np.where(n % 2 == 1, np.sign(z), 1.0) * size * step / math.sqrt(2 * math.pi)
    return term.sum(axis=1), (z * term).sum(axis=1)


class Fitted(Operator):
    """A curve with few coefficients, fitted to the operator over t in [0, 1].

    A subclass gives `name`, `size`, `fit` and `level`.

    Args:
        vocab_size: K.
        gammas: Range of gamma.
        cache_dir: Folder in which to keep the coefficients, under a name that says all
            that they depend on; None fits anew, which takes milliseconds.
        coefficients: To use instead of a fit.
    """

    name: str
    size: int  # number of coefficients

    def __init__(
        self,
        vocab_size: int,
        gammas: GammaRange,
        cache_dir: str | None = None,
        coefficients: np.ndarray | None = None,
    ) -> None:
        super().__init__(vocab_size, gammas)
        if coefficients is None:
            coefficients = cached(self._path(cache_dir), self.fitted, self.size)
        self.coefficients = [float(c) for c in coefficients]

    def fitted(self) -> np.ndarray:
        """Coefficients by least squares to the exact curve."""
        t = torch.linspace(0, 1, _NUM_POINTS, dtype=torch.float64)
        alpha = Spectral(self.vocab_size, self.gammas)(t).alpha_t
        return np.asarray(self.fit(t.numpy(), alpha.numpy()))

    def _path(self, cache_dir: str | None) -> Path | None:
        if cache_dir is None:
            return None
        low, high = self.gammas
        return Path(cache_dir) / f"{self.name}_K{self.vocab_size}_{low}_{high}.txt"

    def fit(self, t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Sigmoid(Fitted):
    """alpha = a sig(b t + c) + d with sig(x) = (tanh x + 1) / 2."""

    name, size = "sigmoid", 4
    slope = 2.0  # sig' = slope sig (1 - sig)

    def level(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(*sigmoid_curve(t, self.coefficients[:4], self.slope))

    def fit(self, t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return least_squares(lambda t, p: sigmoid_curve(t, p)[0], t, alpha, _STARTS)


class EdgeCorrected(Sigmoid):
    """`Sigmoid` plus g (t - 1/2) (1 - 4 sig(e t + f) (1 - sig(e t + f)))."""

    name, size = "sigmoid-edge-corrected", 7

    def level(self, t: Tensor) -> NoiseLevel:
        alpha, dalpha = sigmoid_curve(t, self.coefficients[:4], self.slope)
        edge, dedge = edge_curve(t, self.coefficients[4:], self.slope)
        return NoiseLevel(alpha + edge, dalpha + dedge)

    def fit(self, t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        starts = self.starts(super().fit(t, alpha))

        def curve(t: Tensor, p: Coefficients) -> Tensor:
            return sigmoid_curve(t, p[:4])[0] + edge_curve(t, p[4:])[0]

        return least_squares(curve, t, alpha, starts)

    def starts(self, plain: np.ndarray) -> list[tuple[float, ...]]:
        """Where the fit starts, given the coefficients of a plain sigmoid."""
        wide = [(*_WIDE, 0.5, 0.0, 0.5), (*_WIDE, 2.0, 0.0, 0.5)]
        return [*wide, (*plain, 1.0, 0.0, -0.5)]


class PublishedSigmoid(Sigmoid):
    """`Sigmoid` of published runs: `algo.compat=reference`.

    NOTE(compat): the published code takes sig (1 - sig) for sig', without the 2, so its
    dalpha_t is half of the curve's.
    """

    name, slope = "sigmoid_published", 1.0


class PublishedEdgeCorrected(EdgeCorrected):
    """`EdgeCorrected` of published runs: `algo.compat=reference`.

    NOTE(compat): besides the slope of `PublishedSigmoid`, published coefficients of
    large vocabularies are a local optimum with a steep gate, 20 times as far from the
    operator; the fit starts where it finds that one.
    """

    name, slope = "sigmoid-edge-corrected_published", 1.0

    def starts(self, plain: np.ndarray) -> list[tuple[float, ...]]:
        return [(*plain, 20.0, -10.0, 0.0)]


class Polynomials(Fitted):
    """alpha = sum_n a_n t^n.

    Args:
        degree: Of the polynomial.
        vocab_size, gammas, cache_dir, coefficients: As for `Fitted`.
    """

    def __init__(
        self,
        degree: int,
        vocab_size: int,
        gammas: GammaRange,
        cache_dir: str | None = None,
        coefficients: np.ndarray | None = None,
    ) -> None:
        self.degree = degree
        self.name, self.size = f"poly{degree}", degree + 1
        super().__init__(vocab_size, gammas, cache_dir, coefficients)

    def level(self, t: Tensor) -> NoiseLevel:
        alpha = dalpha = torch.zeros_like(t)
        for a in reversed(self.coefficients):  # Horner
            alpha, dalpha = alpha * t + a, dalpha * t + alpha
        return NoiseLevel(alpha, dalpha)

    def fit(self, t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return Polynomial.fit(t, alpha, self.degree).convert().coef


# Where fits start: two plain sigmoids, and one so wide that the correction does most.
_STARTS = [(0.9, -2.8, 0.9, 0.1), (-0.4, 2.3, -1.7, 0.1)]
_WIDE = (3.0, -0.8, 0.4, -1.3)


def sigmoid_curve(
    t: Tensor, p: Coefficients, slope: float = 2.0
) -> tuple[Tensor, Tensor]:
    """a sig(b t + c) + d and its derivative, sig' = slope sig (1 - sig)."""
    a, b, c, d = p
    s = _sig(b * t + c)
    return a * s + d, slope * a * b * s * (1 - s)


def edge_curve(t: Tensor, p: Coefficients, slope: float = 2.0) -> tuple[Tensor, Tensor]:
    """The correction of `EdgeCorrected` and its derivative."""
    e, f, g = p
    s = _sig(e * t + f)
    gate = 1 - 4 * s * (1 - s)
    dgate = -4 * slope * e * s * (1 - s) * (1 - 2 * s)
    return g * (t - 0.5) * gate, g * gate + g * (t - 0.5) * dgate


def _sig(x: Tensor) -> Tensor:
    return (torch.tanh(x) + 1) / 2


def least_squares(
    curve: Callable[[Tensor, Coefficients], Tensor],
    t: np.ndarray,
    alpha: np.ndarray,
    starts: Sequence[tuple[float, ...]],
) -> np.ndarray:
    """The best of the fits from several starting points."""

    def values(t: np.ndarray, *p: float) -> np.ndarray:
        return curve(torch.from_numpy(t), p).numpy()

    def error(p: np.ndarray) -> float:
        return float(np.square(values(t, *p) - alpha).sum())

    fits = []
    for start in starts:
        try:
            fits.append(curve_fit(values, t, alpha, p0=start, maxfev=4000)[0])
        except RuntimeError:  # this start does not converge
            fits.append(np.asarray(start))
    return min(fits, key=error)


def cached(
    path: Path | None, compute: Callable[[], np.ndarray], size: int
) -> np.ndarray:
    """Numbers from a text file, written there if it is new.

    Raises:
        ConfigError: If the file does not hold `size` numbers, or cannot be written.
    """
    if path is None:
        return compute()
    try:
        if not path.exists():
            with whole_file(str(path)) as file:
                np.savetxt(file, compute(), footer="end")
        text = path.read_text()
        values = np.array([float(x) for x in text.removesuffix("# end\n").split()])
        is_whole = text.endswith("# end\n") and len(values) == size
        if not (is_whole and np.isfinite(values).all()):
            raise ValueError(f"it does not hold {size} numbers")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"algo.curriculum.cache_dir={str(path.parent)!r}: {path.name}: {error}; "
            "remove it, or give null."
        ) from None
    return values
