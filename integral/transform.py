"""The operator to machine precision: quadrature once, a Chebyshev series afterwards.

Gaussian diffusion of a one-hot vector, with gamma the negative log signal-to-noise
ratio, linear in t:

    gamma_t = gamma_min + t (gamma_max - gamma_min)
    w_t = gauss_alpha_t onehot(x_0) + gauss_sigma_t eps,
    gauss_alpha_t^2 = sigmoid(-gamma_t),  gauss_sigma_t^2 = sigmoid(gamma_t)

With s = gauss_alpha_t / gauss_sigma_t = exp(-gamma_t / 2),

    P(gamma) = P(argmax w_t = x_0) = int phi(z - s) Phi(z)^(K-1) dz
    alpha_t = (K P - 1) / (K - 1)

Reference: DUO (arXiv:2506.10892), the diffusion transformation operator.
"""

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.polynomial import chebyshev
from scipy.fft import dct
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

from models.noise import NoiseLevel

GAMMA_SLACK = 1e-6  # of the range: how far rounding may take gamma outside of it
SUGGESTED_ALPHA = (0.03, 0.97)  # signal levels at the ends of a suggested range

_STEP = 1 / 32  # of the trapezoid rule, which converges geometrically
_HALF_WIDTH = 10.0  # phi(10) is 8e-23
_MAX_TERMS = 2**12
_WIDEST = 1e3

Numbers = TypeVar("Numbers", Tensor, np.ndarray)


class GammaRange(NamedTuple):
    """Negative log signal-to-noise ratios at t = 0 and at t = 1."""

    low: float
    high: float

    def gamma(self, t: Numbers) -> Numbers:
        return self.low + t * (self.high - self.low)

    def time(self, gamma: Numbers) -> Numbers:
        return (gamma - self.low) / (self.high - self.low)


class Operator:
    """alpha_t and its time derivative as functions of t, in the shape of t.

    A subclass gives `level`. Computed in the dtype of t and on its device; float64 on
    the host is what the trainer passes.

    Args:
        vocab_size: K.
        gammas: Range of gamma.
    """

    def __init__(self, vocab_size: int, gammas: GammaRange) -> None:
        self.vocab_size = vocab_size
        self.gammas = gammas

    def __call__(self, t: Tensor) -> NoiseLevel:
        """
        Raises:
            ValueError: If any t is outside of [0, 1].
        """
        inside = (t >= -GAMMA_SLACK) & (t <= 1 + GAMMA_SLACK)
        if not bool(inside.all()):
            low, high = float(t.min()), float(t.max())
            raise ValueError(
                f"t from {low} to {high} leaves [0, 1]: the operator is built for "
                f"gamma from {self.gammas.low} to {self.gammas.high}"
            )
        return self.level(t)

    def level(self, t: Tensor) -> NoiseLevel:
        raise NotImplementedError

    def at(self, gamma: Tensor) -> NoiseLevel:
        """alpha at gamma, and its derivative with respect to t."""
        return self(self.gammas.time(gamma))


class Spectral(Operator):
    """The operator as a Chebyshev series, to about 1e-15; dalpha_t to about 1e-12.

    The number of terms doubles until the series has converged, so any vocabulary and
    any range will do; building it takes milliseconds.

    Raises:
        ValueError: If no series of 4096 terms resolves the range.
    """

    def __init__(self, vocab_size: int, gammas: GammaRange) -> None:
        super().__init__(vocab_size, gammas)
        self.coefficients = _converged_series(vocab_size, gammas)
        derivative = 2 * chebyshev.chebder(self.coefficients)  # dx/dt = 2
        self._pairs = list(zip(self.coefficients, [*derivative, 0.0], strict=True))

    def level(self, t: Tensor) -> NoiseLevel:
        K = self.vocab_size
        P, dP = self.probability(t)
        return NoiseLevel((K * P - 1) / (K - 1), K / (K - 1) * dP)

    def probability(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """P at gamma_t and its derivative with respect to t."""
        return _clenshaw(2 * t - 1, self._pairs)


def quadrature(gamma: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """P and dP/dgamma by a dense trapezoid rule, float64, (N,) -> (N,) each.

    P = int phi(z - s) Phi(z)^(K-1) dz,  s = exp(-gamma / 2)
    dP/dgamma = int -(s / 2) (z - s) phi(z - s) Phi(z)^(K-1) dz
    """
    s = np.exp(-np.asarray(gamma, dtype=np.float64) / 2)[:, None]
    v = np.arange(-_HALF_WIDTH, _HALF_WIDTH + _STEP, _STEP)  # z - s
    log_weight = (vocab_size - 1) * log_ndtr(s + v) - v**2 / 2
    weight = np.exp(log_weight) * (_STEP / math.sqrt(2 * math.pi))
    return weight.sum(axis=1), (-s / 2 * v * weight).sum(axis=1)


def suggest_gammas(
    vocab_size: int, alphas: tuple[float, float] = SUGGESTED_ALPHA
) -> GammaRange:
    """The range over which alpha falls from alphas[1] to alphas[0].

    Reference: DUO trains its curriculum where alpha_t lies in about [0.05, 0.95].
    """

    def excess(gamma: float, alpha: float) -> float:
        P = quadrature(np.array([gamma]), vocab_size)[0][0]
        return (vocab_size * P - 1) / (vocab_size - 1) - alpha

    low, high = (brentq(excess, -20, 40, args=(alpha,)) for alpha in alphas[::-1])
    return GammaRange(low, high)


def gauss_levels(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """gauss_alpha and gauss_sigma of a Gaussian diffusion at gamma."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def _converged_series(vocab_size: int, gammas: GammaRange) -> np.ndarray:
    """Chebyshev coefficients of P over the range mapped to [-1, 1].

    Those of the interpolant at the N roots x_k = cos(pi (k + 1/2) / N) of T_N are a
    cosine transform of its values there.
    """
    if not gammas.high - gammas.low < _WIDEST:  # its nodes could all miss the step
        raise ValueError(f"from {gammas.low} to {gammas.high} is too wide a range")
    N = 64
    while N <= _MAX_TERMS:
        x = np.cos(np.pi * (np.arange(N) + 0.5) / N)
        P, _ = quadrature(gammas.gamma((x + 1) / 2), vocab_size)
        coefficients = dct(P, type=2) / N
        coefficients[0] /= 2
        if np.abs(coefficients[-8:]).max() < 2e-16 * N**0.5:
            return coefficients
        N *= 2
    raise ValueError(f"from {gammas.low} to {gammas.high} is too wide a range")


def _clenshaw(x: Tensor, pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """sum_n c_n T_n(x) of two series at once, by Clenshaw's recurrence."""
    table = torch.tensor(pairs, dtype=x.dtype, device=x.device)  # (N, 2)
    x = x[..., None]
    later = latest = torch.zeros_like(table[0]).expand(*x.shape[:-1], 2)
    for row in table[1:].flip(0):
        later, latest = 2 * x * later - latest + row, later
    first, second = (x * later - latest + table[0]).unbind(-1)
    return first, second
