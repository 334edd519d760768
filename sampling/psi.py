"""Times and mixing weights of the psi sampler: what `sampling.psi.*` means.

A run of N steps has N + 1 times in three phases, high, middle and low noise, of
round(high_frac (N + 1)), round(middle_frac (N + 1)) and the remaining number of times.
`time_profile` places the times, and each phase has a mode that gives every step its
kappa: 1 is the posterior alone, 0 the forward-noised prediction alone.

Reference: Psi-samplers, DUO chapter II (arXiv:2602.21185); the ReMDM rates are of
arXiv:2503.00307.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.noise import Noise
from sampling.predictors import Ancestral
from sampling.reverse_process import Chain, Step
from sampling.sampler import TIME_EPS, Posterior
from utils import ConfigError, choose

PHASES = ("high", "middle", "low")
_NUMBER = r"\d*\.?\d+(?:e[+-]?\d+)?"


class KappaRule(NamedTuple):
    """A phase's mode, taken apart: "max-capped-0.01" is ("max-capped", 0.01), and
    "pure-pc" is ("pure-pc", 0)."""

    kind: str
    eta: float  # the mode's number; where it has none, kappa itself

    @property
    def follows_schedule(self) -> bool:
        """Whether kappa depends on the signal levels: the last of a phase is then 1."""
        return self.kind in REMDM_SIGMA

    @classmethod
    def parse(cls, mode: str, key: str) -> "KappaRule":
        """Takes a mode apart.

        Raises:
            ConfigError: If it is none, or its number is out of range.
        """
        found = re.fullmatch(rf"([a-z-]+?)(?:-({_NUMBER}))?", str(mode))
        kind, number = found.groups() if found else (mode, None)
        kappa = choose(MODES, kind, key)
        if number is None and kappa is not None:
            eta = kappa
        elif number is not None and kappa is None:
            eta = float(number)
        else:
            form = f"{kind}-ETA, such as {kind}-0.01" if kappa is None else kind
            raise ConfigError(f"{key}={mode!r}: write {form}.")
        if kind == "constant" and eta > 1:
            raise ConfigError(f"{key}={mode!r}: kappa is at most 1.")
        return cls(kind, eta)


# (eta, (1 - alpha_s) / alpha_t) -> sigma_t
SigmaRule = Callable[[float, Tensor], Tensor]
# ReMDM's remasking rate sigma_t, by kind.
REMDM_SIGMA: dict[str, SigmaRule] = {
    "constant-remdm": lambda eta, limit: torch.full_like(limit, eta),
    "max-capped": lambda eta, limit: limit.clamp(max=eta),
    "max-rescale": lambda eta, limit: eta * limit.clamp(max=1),
}
# The kappa of every kind of mode; None is for those that take a number.
MODES: dict[str, float | None] = {
    "pure-posterior": 1.0,
    "pure-pc": 0.0,
    **dict.fromkeys(("constant", *REMDM_SIGMA), None),
}


class PsiSchedule:
    """Times and kappas of a run.

    Args:
        config: `config.sampling.psi`.

    Raises:
        ConfigError: If a profile, a mode or a fraction makes no sense.
    """

    remdm_sigma: ClassVar[dict[str, SigmaRule]] = REMDM_SIGMA

    def __init__(self, config: DictConfig) -> None:
        profile = re.fullmatch(
            rf"linear(?:-constant-linear-({_NUMBER})(-inv)?)?", str(config.time_profile)
        )
        if profile is None:
            raise ConfigError(
                f"sampling.psi.time_profile={config.time_profile!r}: write linear, "
                "linear-constant-linear-T (T a time) or linear-constant-linear-A-inv "
                "(A a signal level)."
            )
        level, inverse = profile.groups()
        self.plateau = float(level) if level else None
        self.plateau_is_alpha = inverse is not None
        if self.plateau is not None and not 0 < self.plateau < 1:
            raise ConfigError(
                f"sampling.psi.time_profile={config.time_profile!r}: the number is "
                "between 0 and 1."
            )
        self.high_frac, self.middle_frac = config.high_frac, config.middle_frac
        if self.high_frac + self.middle_frac > 1:
            raise ConfigError(
                f"sampling.psi.high_frac={self.high_frac} and middle_frac="
                f"{self.middle_frac} add up to more than 1."
            )
        self.rules = [
            KappaRule.parse(config[f"{phase}_mode"], f"sampling.psi.{phase}_mode")
            for phase in PHASES
        ]

    def phase_sizes(self, num_steps: int) -> tuple[int, int, int]:
        """How many of the num_steps + 1 times each phase has."""
        num_times = num_steps + 1
        high = round(self.high_frac * num_times)
        middle = min(round(self.middle_frac * num_times), num_times - high)
        return high, middle, num_times - high - middle

    def times(self, noise: Noise, num_steps: int, time_eps: float) -> Tensor:
        """Times from 1 down to time_eps, (num_steps + 1,) float64.

        With a plateau they fall from 1 to it, stay, and fall to time_eps; without a
        high phase they begin at it.
        """
        if self.plateau is None:
            return torch.linspace(1, time_eps, num_steps + 1, dtype=torch.float64)
        plateau = torch.tensor(self.plateau, dtype=torch.float64)
        if self.plateau_is_alpha:
            plateau = noise.inverse(plateau)
        high, middle, low = self.phase_sizes(num_steps)
        return torch.cat(
            [
                torch.linspace(1, float(plateau), high, dtype=torch.float64),
                plateau.expand(middle),
                torch.linspace(float(plateau), time_eps, low, dtype=torch.float64),
            ]
        )

    def kappas(self, alphas: Tensor) -> list[float]:
        """The weight of the posterior in the step from each time.

        Args:
            alphas: Signal levels of the times, (num_steps + 1,) float64.
        """
        phases = alphas.split(self.phase_sizes(len(alphas) - 1))
        pairs = zip(self.rules, phases, strict=True)
        return [kappa for rule, phase in pairs for kappa in self._phase(rule, phase)]

    def _phase(self, rule: KappaRule, alphas: Tensor) -> list[float]:
        if not rule.follows_schedule:
            return [rule.eta] * len(alphas)
        kappas = []
        for alpha_t, alpha_s in pairwise(alphas):
            sigma_t = self.remdm_sigma[rule.kind](rule.eta, (1 - alpha_s) / alpha_t)
            kappas.append(float((1 - sigma_t / (1 - alpha_s)).clamp(0, 1)))
        return kappas + [1.0] * (len(alphas) > 0)


class PublishedPsiSchedule(PsiSchedule):
    """The schedule of the published psi samples: `algo.compat=reference`.

    NOTE(compat): "max-rescale-ETA" means ETA min(ETA, (1 - alpha_s) / alpha_t) in the
    code that made them, instead of ETA min(1, (1 - alpha_s) / alpha_t), as ReMDM
    defines it.
    """

    remdm_sigma: ClassVar[dict[str, SigmaRule]] = {
        **REMDM_SIGMA,
        "max-rescale": lambda eta, limit: eta * limit.clamp(max=min(eta, 1)),
    }


# By `algo.compat`.
PSI_SCHEDULES = {"paper": PsiSchedule, "reference": PublishedPsiSchedule}


class Psi(Ancestral):
    """Predictor-corrector: with weight kappa the posterior, else a prediction of x_0
    noised again up to s.

        kappa q(x_s | x_t, x_theta)
          + (1 - kappa) sum_x0 q(x_s | x_0) q(x_0 | x_t, x_theta)

    Reference: Psi-samplers, DUO chapter II (arXiv:2602.21185); `psi.PsiSchedule` has
    times and kappas.
    """

    def __init__(self, config: DictConfig, compat: str = "paper") -> None:
        super().__init__(config, compat)
        self.schedule = PSI_SCHEDULES[compat](config.psi)

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        PsiSchedule(config.psi)  # no more than what the settings mean

    def time_grid(self, noise: Noise, num_steps: int) -> Tensor:
        return self.schedule.times(noise, num_steps, TIME_EPS)

    def plan(self, noise: Noise, num_steps: int) -> list[Step]:
        alphas = noise(self.time_grid(noise, num_steps)).alpha_t
        # The last kappa would belong to a step from the last time.
        pairs = zip(pairwise(alphas), self.schedule.kappas(alphas)[:-1], strict=True)
        return [Step(*levels, kappa) for levels, kappa in pairs]

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        if step.kappa == 1:
            return super().step(chain, xt, step)
        if self.is_dense(chain):
            return self._dense_step(chain, xt, step)
        corrects = chain.free & (chain.uniform(xt.shape) >= step.kappa)
        is_noise = corrects & (chain.uniform(xt.shape) < 1 - step.alpha_s)
        # A prediction that is noised away need not be made.
        alpha_s = torch.where(corrects, 1.0, step.alpha_s)  # (B, L)
        xs = self.reverse(chain, xt, step.alpha_t, alpha_s, chain.free & ~is_noise)
        noise = chain.model.noise_tokens(xt.shape, chain.generator)
        return torch.where(is_noise, noise, xs)

    def _dense_step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        model, (alpha_t, alpha_s, kappa) = chain.model, step

        def mixture(posterior: Posterior, alpha_s: Tensor) -> Tensor:
            x0 = posterior(torch.ones_like(alpha_s))
            noised = model.marginal(x0, alpha_s)
            return kappa * posterior(alpha_s) + (1 - kappa) * noised

        return self.reverse_dense(chain, xt, alpha_t, alpha_s, chain.free, mixture)
