"""Noise schedules: alpha_t = P(a token is still clean at time t), and its derivative.

t = 0 is clean, t = 1 the prior. Computed in the dtype of t; the trainer passes
float64 times, because 1 - alpha_t near t = 0 has no digits left in float32.
"""

import inspect
import math
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from utils import ConfigError, require


class NoiseLevel(NamedTuple):
    """Signal level at a time, in the shape of t."""

    alpha_t: Tensor
    dalpha_t: Tensor  # d alpha_t / dt, <= 0


class Noise(nn.Module):
    """A schedule: `forward` gives alpha_t and its derivative, `inverse` the time.

    Args:
        eps: Keeps alpha_1 above 0, so that sigma = -log(alpha_t) stays finite.
    """

    has_log_uniform = False  # whether `log_uniform` is defined

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, t: Tensor) -> NoiseLevel:
        raise NotImplementedError

    def inverse(self, alpha_t: Tensor) -> Tensor:
        """The exact time at which the signal level is alpha_t."""
        raise NotImplementedError

    def log_uniform(self) -> "LogUniform":
        """The same levels in the order of a time in which log(1 - alpha) is linear."""
        raise NotImplementedError


class LogLinear(Noise):
    """alpha_t = 1 - (1 - eps) t, so the total noise -log(alpha_t) is log-linear.

    Reference: MDLM (arXiv:2406.07524), log-linear schedule.
    """

    has_log_uniform = True

    def forward(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(
            alpha_t=1 - (1 - self.eps) * t,
            dalpha_t=torch.full_like(t, -(1 - self.eps)),
        )

    def inverse(self, alpha_t: Tensor) -> Tensor:
        # NOTE(compat): the reference returns 1 - alpha_t, which is (1 - eps) t.
        return (1 - alpha_t) / (1 - self.eps)

    def log_uniform(self) -> "LogUniform":
        # NOTE(compat): from sigma = eps on, as published; sigma_0 = 0 has no logarithm.
        return LogUniform(self.eps, -math.log(self.eps))


class Cosine(Noise):
    """alpha_t = 1 - cos(pi/2 (1 - s)) with s = (1 - eps) t.

    NOTE(compat): the reference's derivative lacks the chain-rule factor (1 - eps);
    losses under this schedule are therefore 0.1 % smaller here at eps = 1e-3.
    """

    def forward(self, t: Tensor) -> NoiseLevel:
        angle = math.pi / 2 * (1 - (1 - self.eps) * t)
        return NoiseLevel(
            alpha_t=1 - torch.cos(angle),
            dalpha_t=-(1 - self.eps) * math.pi / 2 * torch.sin(angle),
        )

    def inverse(self, alpha_t: Tensor) -> Tensor:
        # NOTE(compat): the reference returns s instead of t = s / (1 - eps).
        return (1 - 2 / math.pi * torch.acos(1 - alpha_t)) / (1 - self.eps)


class CosineMDLM(Noise):
    """alpha_t = eps + (1 - eps) cos(pi t / 2); `cosine` in the code of MDLM."""

    def forward(self, t: Tensor) -> NoiseLevel:
        angle = math.pi / 2 * t
        return NoiseLevel(
            alpha_t=self.eps + (1 - self.eps) * torch.cos(angle),
            dalpha_t=-(1 - self.eps) * math.pi / 2 * torch.sin(angle),
        )

    def inverse(self, alpha_t: Tensor) -> Tensor:
        cosine = (alpha_t - self.eps) / (1 - self.eps)
        return 2 / math.pi * torch.acos(cosine.clamp(0, 1))


class CosineSqr(Noise):
    """alpha_t = eps + (1 - eps) cos(pi t / 2)^2; `cosinesqr` in the code of MDLM."""

    def forward(self, t: Tensor) -> NoiseLevel:
        angle = math.pi / 2 * t
        return NoiseLevel(
            alpha_t=self.eps + (1 - self.eps) * torch.cos(angle) ** 2,
            dalpha_t=-(1 - self.eps) * math.pi / 2 * torch.sin(2 * angle),
        )

    def inverse(self, alpha_t: Tensor) -> Tensor:
        # The tangent keeps its digits at both ends, where the arc cosine has half.
        sine, cosine = (
            x.clamp(min=0).sqrt() for x in (1 - alpha_t, alpha_t - self.eps)
        )
        return 2 / math.pi * torch.atan2(sine, cosine)


class SigmaRange(Noise):
    """A schedule whose total noise sigma = -log(alpha) rises from one level to another.

    NOTE(compat): at t = 0 a token is noise with the probability 1 - e^-sigma_min, and
    at t = 1 clean with e^-sigma_max; the published losses leave both ends out.

    Args:
        sigma_min, sigma_max: Total noise at t = 0 and at t = 1, above 0.
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        super().__init__(eps=math.exp(-sigma_max))
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def _sigma(self, alpha_t: Tensor) -> Tensor:
        """Total noise of a level; that of t = 0 where the level is above it."""
        return (-torch.log(alpha_t)).clamp(min=self.sigma_min)


class Linear(SigmaRange):
    """sigma_t = sigma_min + t (sigma_max - sigma_min)."""

    has_log_uniform = True

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 7.0) -> None:
        super().__init__(sigma_min, sigma_max)

    def forward(self, t: Tensor) -> NoiseLevel:
        rate = self.sigma_max - self.sigma_min
        alpha_t = torch.exp(-(self.sigma_min + t * rate))
        return NoiseLevel(alpha_t=alpha_t, dalpha_t=-rate * alpha_t)

    def inverse(self, alpha_t: Tensor) -> Tensor:
        rate = self.sigma_max - self.sigma_min
        return (self._sigma(alpha_t) - self.sigma_min) / rate

    def log_uniform(self) -> "LogUniform":
        return LogUniform(self.sigma_min, self.sigma_max)


class Geometric(SigmaRange):
    """sigma_t = sigma_min^(1 - t) sigma_max^t.

    Reference: SEDD (arXiv:2310.16834), geometric noise.
    """

    def __init__(self, sigma_min: float = 1e-4, sigma_max: float = 20.0) -> None:
        super().__init__(sigma_min, sigma_max)

    def forward(self, t: Tensor) -> NoiseLevel:
        rate = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(t * rate)
        alpha_t = torch.exp(-sigma)
        return NoiseLevel(alpha_t=alpha_t, dalpha_t=-rate * sigma * alpha_t)

    def inverse(self, alpha_t: Tensor) -> Tensor:
        rate = math.log(self.sigma_max / self.sigma_min)
        return torch.log(self._sigma(alpha_t) / self.sigma_min) / rate


class LogUniform(Noise):
    """1 - alpha_t = exp(f_0 + t (f_1 - f_0)) with f(sigma) = log(1 - e^-sigma).

    Times of another schedule that are drawn in proportion to the weight of the masked
    cross entropy, -dalpha_t / (1 - alpha_t) = df / dt, have these levels at uniform
    numbers t; the weight that is left is the constant f_1 - f_0.

    Args:
        sigma_min, sigma_max: Total noise at t = 0 and at t = 1, above 0.
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        super().__init__(eps=math.exp(-sigma_max))
        self.f_0, self.f_1 = (
            math.log(-math.expm1(-sigma)) for sigma in (sigma_min, sigma_max)
        )

    def forward(self, t: Tensor) -> NoiseLevel:
        rate = self.f_1 - self.f_0
        is_noise = torch.exp(self.f_0 + t * rate)
        return NoiseLevel(alpha_t=1 - is_noise, dalpha_t=-rate * is_noise)

    def inverse(self, alpha_t: Tensor) -> Tensor:
        """The time of a level; 0 or 1 where it is beyond them."""
        t = (torch.log(1 - alpha_t) - self.f_0) / (self.f_1 - self.f_0)
        return t.clamp(0, 1)


SCHEDULES: dict[str, type[Noise]] = {
    "log-linear": LogLinear,
    "cosine": Cosine,
    "cosine-mdlm": CosineMDLM,
    "cosinesqr": CosineSqr,
    "linear": Linear,
    "geometric": Geometric,
}


def settings_of(schedule: type[Noise]) -> list[str]:
    """Names of a schedule's settings, such as eps: keys of `noise`."""
    return list(inspect.signature(schedule).parameters)


def build_noise(settings: DictConfig) -> Noise:
    """The schedule of a config's `noise`.

    Raises:
        ConfigError: If there is no such schedule, or a setting of it is missing.
    """
    name = settings["type"]
    require(name, SCHEDULES, "noise.type")
    keys = settings_of(SCHEDULES[name])
    if missing := [key for key in keys if settings.get(key) is None]:
        raise ConfigError(
            f"noise.type={name!r} needs noise.{missing[0]}: choose noise={name}, which "
            "sets it."
        )
    values = {key: settings[key] for key in keys}
    low, high = values.get("sigma_min"), values.get("sigma_max")
    if low is not None and high is not None and low >= high:
        raise ConfigError(
            f"noise.sigma_min={low!r} is not below noise.sigma_max={high!r}: noise "
            "rises with time; give a smaller sigma_min."
        )
    return SCHEDULES[name](**values)
