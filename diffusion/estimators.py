"""Ways to estimate the bound of masked diffusion: how the times of a batch are drawn.

In continuous time the negative ELBO of a token is

    int_0^1 w(t) E_{x_t} [-log p(x_0 | x_t), at a mask] dt

with w = -dalpha_t / (1 - alpha_t) = df / dt, f = log(1 - alpha_t). By default t is
uniform and each term has the weight w(t), which is large near t = 0. The two others
have terms of equal weights, because f is uniform between its ends f_0 and f_1
(`models.noise.LogUniform`):

    (f_1 - f_0) E_u E_{x_t} [-log p(x_0 | x_t), at a mask],   f = f_0 + u (f_1 - f_0)

`importance_sampling` takes this for times of the schedule, so that the network is told
sigma; `change_of_variables` takes u for the time itself, and the network is told u.
NOTE(compat): the code of MDLM has the weight -f_0 in the place of f_1 - f_0.
"""

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.noise import SCHEDULES, Noise, build_noise
from trainer_base import ESTIMATORS
from utils import ConfigError


def estimator_of(config: DictConfig) -> str | None:
    """Which of ESTIMATORS is chosen, None for uniform times."""
    return next((key for key in ESTIMATORS if config.training.get(key)), None)


def check_estimator(config: DictConfig, noise: Noise) -> None:
    """Refuses an estimator where it is not defined.

    Raises:
        ConfigError: With the key and what to choose.
    """
    chosen = estimator_of(config)
    if chosen is None:
        return
    if all(config.training.get(key) for key in ESTIMATORS):
        both = " and ".join(f"training.{key}=True" for key in ESTIMATORS)
        raise ConfigError(f"{both} exclude each other; choose one of them.")
    if config.algo.T > 0:
        raise ConfigError(
            f"training.{chosen}=True with algo.T={config.algo.T}: it is of continuous "
            f"time; choose algo.T=0, or training.{chosen}=False."
        )
    if not noise.has_log_uniform:
        names = sorted(name for name, x in SCHEDULES.items() if x.has_log_uniform)
        raise ConfigError(
            f"training.{chosen}=True is not defined for noise={config.noise.type}; "
            f"choose noise={' or noise='.join(names)}, or training.{chosen}=False."
        )


def times_of(u: Tensor, low: float, high: float, T: int) -> Tensor:
    """Times from low to high that belong to uniform numbers in [0, 1), any shape.

    With T > 0, they move up to the next multiple of 1/T.
    """
    t = (high - low) * u + low
    if T > 0:
        t = (t * T).floor() / T + 1 / T
    return t


def noised_share(config: DictConfig) -> float:
    """The mean of 1 - alpha_t over the times of training; at a bos that stays it is 0.

    Args:
        config: The run's config.
    """
    noise = build_noise(config.noise)
    levels = noise.log_uniform() if estimator_of(config) else noise
    low, high = config.training.get("time_range") or (0.0, 1.0)
    low = max(low, config.training.sampling_eps)
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    alpha_t = levels(times_of(u, low, high, config.algo.T)[:, None]).alpha_t
    noised = 1 - config.algo.ignore_bos / config.model.length  # of the positions
    return noised * float((1 - alpha_t).mean())
