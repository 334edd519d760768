"""Samplers: prior -> step -> sample. A model supplies probabilities, a sampler draws.

Steps are exact and lean: which positions may change is drawn first, from the schedule
alone; the network runs only for sequences that have one, its head and the draw of a
token only at these positions, a chunk of them at a time. No (B, L, K) tensor exists.

What a sampler asks of a diffusion model: `prior_sample`, `noise`, `hidden`,
`logits_for_loss`, `denoised`, `undecided`, and the reverse step, lean
(`change_bound`, `changed`) and as probabilities (`posterior`, `marginal`; `log_score`
for `Analytic`). All draws take a generator, so a seed replays a sample.

Shapes: B batch, L length, K vocabulary, D hidden size, n tokens of a chunk. Signal
levels are (B, 1) or (B, L).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from chain import Chain, Samples, Step, Tokens
from draws import exponential_race, inverse_cdf, nucleus
from models.attention import KVCache
from prompts import Given
from psi import PsiSchedule
from utils import ConfigError, choose, require, wide_dtype

TIME_EPS = 1e-5  # last time of the grid; noise removal goes from there to 0


class Sampler:
    """Skeleton of every sampler: a plan of steps from t = 1 down, then noise removal.

    With `sampling.use_float64` (the default) draws are exact. Without, probabilities
    and noise are float32 and every position that may change takes part in every draw,
    as in published samples: the cut-off of the noise then makes rare tokens rarer.

    Args:
        config: `config.sampling`.
        compat: `algo.compat`.

    Raises:
        ConfigError: If the settings make no sense.
    """

    removal_of_true = "greedy"  # what noise_removal=True meant in MDLM's configs

    def __init__(self, config: DictConfig, compat: str = "paper") -> None:
        self.num_steps: int = config.steps
        self.p_nucleus: float = config.p_nucleus
        self.use_float64: bool = config.use_float64
        self.draw = inverse_cdf if self.use_float64 else exponential_race
        self.is_lean = self.use_float64
        removals = self.removals()
        old = {True: removals.get(self.removal_of_true), False: removals.get("none")}
        known = {**removals, **{name: x for name, x in old.items() if x is not None}}
        require(config.noise_removal, known, "sampling.noise_removal")
        self.remove_noise = known[config.noise_removal]

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        """Whether models of this class offer what the sampler asks for."""
        return not algorithm.is_autoregressive

    def length(self, num_tokens: int) -> int:
        """Tokens of a sample of a model of `num_tokens`."""
        return num_tokens

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        num_samples: int,
        *,
        num_steps: int | None = None,
        given: Given | None = None,
        generator: torch.Generator | None = None,
        show_progress: bool = False,
    ) -> Samples:
        """Draws samples.

        Args:
            model: On its device, in evaluation mode.
            num_samples: B.
            num_steps: Steps from t = 1 to t = 1e-5; None takes `sampling.steps`.
            given: Tokens that samples hold unchanged, (B, L).
            generator: On the model's device; None uses torch's global one.
            show_progress: Whether to show a bar over the steps.
        """
        if given is None:
            given = Given.nothing(num_samples, model.num_tokens, model.device)
        given = model.with_bos(given.to(model.device))
        remembers = self.remembers(model)
        chain = Chain(model, ~given.known, generator, remembers, show_progress)
        xt = given.put(model.prior_sample(num_samples, generator))
        x0 = self.run(chain, xt, self.num_steps if num_steps is None else num_steps)
        return Samples(x0, chain.evaluations)

    def remembers(self, model: Any) -> bool:
        """Whether the network's output is kept for sequences that do not change."""
        return False

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        """From the prior to clean tokens, (B, L) -> (B, L)."""
        plan = [step.to(xt) for step in self.plan(chain.model.noise, num_steps)]
        for step in chain.progress(plan):
            xt = self.step(chain, xt, step)
        return self.remove_noise(chain, xt, plan[-1].alpha_s)

    def plan(self, noise: Any, num_steps: int) -> list[Step]:
        """The steps, on the host."""
        alphas = noise(self.time_grid(noise, num_steps)).alpha_t
        return [Step(alpha_t, alpha_s) for alpha_t, alpha_s in pairwise(alphas)]

    def time_grid(self, noise: Any, num_steps: int) -> Tensor:
        """Times from 1 down, (num_steps + 1,) float64."""
        return torch.linspace(1, TIME_EPS, num_steps + 1, dtype=torch.float64)

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        """Draws x_s given x_t, (B, L) -> (B, L)."""
        raise NotImplementedError

    # ---- the end: from the last time of the grid to clean tokens

    def removals(self) -> dict[str, Callable[[Chain, Tensor, Tensor], Tensor]]:
        """Choices of `sampling.noise_removal`: from x_t and alpha_t to tokens."""
        return {
            "ancestral": self.remove_by_draw,
            "greedy": self.remove_greedily,
            "none": lambda chain, xt, alpha_t: xt,
        }

    def remove_by_draw(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """One ancestral step to alpha_s = 1."""
        return self.reverse(chain, xt, alpha_t, torch.ones_like(alpha_t), chain.free)

    def remove_greedily(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """The denoiser's most likely tokens: the greedy tail of DUO."""
        where = chain.free & chain.model.undecided(xt)

        def most_likely(tokens: Tokens) -> Tensor:
            return self.x_theta(chain.model, tokens).argmax(dim=-1)

        return chain.replace(xt, alpha_t, where, most_likely)

    # ---- what steps are made of

    def reverse(
        self, chain: Chain, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor, where: Tensor
    ) -> Tensor:
        """Draws from q(x_s | x_t, x_theta) at some positions, (B, L) -> (B, L).

        Args:
            chain: Model and generator.
            xt: Noisy ids, (B, L).
            alpha_t: (B, 1).
            alpha_s: (B, 1) or (B, L).
            where: Positions to draw, (B, L) bool; the others stay.
        """
        model = chain.model
        if self.is_dense(model):
            where = where & model.undecided(xt)
            probs = model.posterior
            return self.reverse_dense(chain, xt, alpha_t, alpha_s, where, probs)
        bound = model.change_bound(xt, alpha_t=alpha_t, alpha_s=alpha_s)
        changes = where & (chain.uniform(xt.shape) < bound)

        def changed(tokens: Tokens) -> Tensor:
            return model.changed(
                self.x_theta(model, tokens),
                xt=tokens.xt,
                alpha_t=tokens.alpha_t,
                alpha_s=tokens.pick(alpha_s),
                draw=self.draw,
                generator=chain.generator,
            )

        return chain.replace(xt, alpha_t, changes, changed)

    def reverse_dense(
        self,
        chain: Chain,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        where: Tensor,
        probs: Callable[..., Tensor],
    ) -> Tensor:
        """`reverse` as published: every position draws from a whole row.

        Args:
            probs: From x_theta (n, K) and xt, alpha_t, alpha_s, (n,) each, to the
                probabilities of x_s, (n, K).
        """

        def drawn(tokens: Tokens) -> Tensor:
            x_theta = self.x_theta(chain.model, tokens)
            levels = {"alpha_t": tokens.alpha_t, "alpha_s": tokens.pick(alpha_s)}
            q_xs = probs(x_theta, xt=tokens.xt, **levels)
            return self.draw(q_xs.to(x_theta.dtype), chain.generator)

        return chain.replace(xt, alpha_t, where, drawn)

    def is_dense(self, model: Any) -> bool:
        """Whether positions draw from whole rows of the posterior."""
        return not self.is_lean or model.draws_whole_rows

    def x_theta(self, model: Any, tokens: Tokens) -> Tensor:
        """Probabilities of clean tokens, nucleus applied, (n, K)."""
        logits = self.widen(tokens.logits)
        log_x_theta = model.denoised(logits, xt=tokens.xt, sigma=tokens.sigma)
        return nucleus(log_x_theta.exp(), self.p_nucleus)

    def widen(self, logits: Tensor) -> Tensor:
        """float64 where asked for and where the device has it, else float32."""
        return logits.to(self.draw_dtype(logits.device))

    def draw_dtype(self, device: torch.device) -> torch.dtype:
        """Type of the probabilities and of the noise of categorical draws."""
        return wide_dtype(device) if self.use_float64 else torch.float32


class Ancestral(Sampler):
    """Draws x_s from q(x_s | x_t, x_theta).

    Reference: D3PM (arXiv:2107.03006), section 3; MDLM (arXiv:2406.07524) for
    absorbing and UDLM (arXiv:2412.10193) for uniform states.
    """

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        return self.reverse(chain, xt, step.alpha_t, step.alpha_s, chain.free)


class AncestralCache(Ancestral):
    """`Ancestral` that keeps the network's output of a sequence until it changes.

    A lean step evaluates the network only for what changes, so there is little left
    to keep; it is the float32 draws of `use_float64=False` that gain. A network that
    knows the time is evaluated anew at every step.

    Reference: MDLM (arXiv:2406.07524), the cached sampler.
    """

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        return super().fits(algorithm) and algorithm.has_mask

    def remembers(self, model: Any) -> bool:
        return not model.time_conditioning


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
        self.schedule = PsiSchedule(config.psi, rescales_twice=compat == "reference")

    def time_grid(self, noise: Any, num_steps: int) -> Tensor:
        return self.schedule.times(noise, num_steps, TIME_EPS)

    def plan(self, noise: Any, num_steps: int) -> list[Step]:
        alphas = noise(self.time_grid(noise, num_steps)).alpha_t
        # The last kappa would belong to a step from the last time.
        pairs = zip(pairwise(alphas), self.schedule.kappas(alphas)[:-1], strict=True)
        return [Step(*levels, kappa) for levels, kappa in pairs]

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        if step.kappa == 1:
            return super().step(chain, xt, step)
        if self.is_dense(chain.model):
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

        def mixture(x_theta: Tensor, *, alpha_s: Tensor, **levels: Tensor) -> Tensor:
            clean = torch.ones_like(alpha_s)
            x0 = model.posterior(x_theta, alpha_s=clean, **levels)
            posterior = model.posterior(x_theta, alpha_s=alpha_s, **levels)
            return kappa * posterior + (1 - kappa) * model.marginal(x0, alpha_s)

        return self.reverse_dense(chain, xt, alpha_t, alpha_s, chain.free, mixture)


class FirstHitting(Sampler):
    """One token at a time, at the times at which masks are revealed.

    Each mask is revealed when 1 - alpha falls below its own U(0, 1 - alpha_1), so the
    order of the times is drawn first and the network runs once per token: the limit of
    `Ancestral` in many steps, exactly. `sampling.steps` does not apply.

    Reference: Masked diffusion models are secretly time-agnostic (arXiv:2409.02908),
    the first-hitting sampler.
    """

    removal_of_true = "ancestral"

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        return super().fits(algorithm) and algorithm.has_mask

    def removals(self) -> dict[str, Callable[[Chain, Tensor, Tensor], Tensor]]:
        return {"ancestral": lambda chain, xt, alpha_t: xt}  # no noise is left

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        model = chain.model
        masked = chain.free & model.undecided(xt)
        num_masked = masked.sum(dim=-1)
        alpha_1 = model.noise(torch.ones((), dtype=torch.float64)).alpha_t
        mass = (1 - float(alpha_1)) * chain.uniform(xt.shape)  # 1 - alpha at reveal
        order = mass.masked_fill(~masked, -1).argsort(dim=-1, descending=True)
        for index in chain.progress(range(int(num_masked.max()))):
            position = order[:, index : index + 1]
            where = torch.zeros_like(masked).scatter(-1, position, True)
            where &= (index < num_masked)[:, None]
            alpha_t = 1 - mass.gather(-1, position)
            xt = self.reverse(chain, xt, alpha_t, torch.ones_like(alpha_t), where)
        return xt


class Analytic(Sampler):
    """Tweedie tau-leaping from scores s(y) = p_t(y) / p_t(x_t), absorbing state.

        p(x_s = y) ~ staggered(y) * transition(y),  d = sigma_t - sigma_s
        staggered(y)  = e^d s(y) + [y = m] (1 - e^d) sum_z s(z)
        transition(y) = e^-d [y = x_t] + (1 - e^-d) [x_t = m]

    So tokens stay, and with S = sum_{y != m} s(y) a mask is revealed with probability
    min(1, (e^d - 1) S), as y with probability s(y) / S.

    Reference: SEDD (arXiv:2310.16834), analytic sampling.
    """

    removal_of_true = "ancestral"

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        return super().fits(algorithm) and algorithm.has_score

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        alpha_t, alpha_s, _ = step
        return self._step(chain, xt, alpha_t, torch.expm1(torch.log(alpha_s / alpha_t)))

    def remove_by_draw(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """To sigma = 0, where no mask is left."""
        return self._step(chain, xt, alpha_t, torch.full_like(alpha_t, torch.inf))

    def _step(
        self, chain: Chain, xt: Tensor, alpha_t: Tensor, expm1_d: Tensor
    ) -> Tensor:
        """Reveals at the rate e^d - 1, (B, 1); infinity reveals every mask."""
        model = chain.model

        def drawn(tokens: Tokens) -> Tensor:
            log_score = self.log_scores(model, tokens)  # (n, K)
            log_total = log_score.logsumexp(dim=-1)
            rate = tokens.pick(expm1_d).to(log_total.dtype)
            reveal = (rate.log() + log_total).exp().clamp(max=1)  # (n,)
            probs = nucleus(log_score.softmax(dim=-1), self.p_nucleus)
            if not self.is_lean:
                probs = probs * reveal[:, None]
                probs[:, model.mask_index] = 1 - reveal
                return self.draw(probs, chain.generator)
            reveals = chain.uniform(reveal.shape) < reveal
            x = tokens.xt.clone()
            x[reveals] = self.draw(probs[reveals], chain.generator)
            return x

        where = chain.free & (xt == model.mask_index)  # whatever `undecided` says
        return chain.replace(xt, alpha_t, where, drawn)

    def log_scores(self, model: Any, tokens: Tokens) -> Tensor:
        """log s(y) at masks, -inf for y = m, (n, K)."""
        log_score = model.log_score(
            self.widen(tokens.logits), alpha_t=tokens.alpha_t, sigma=tokens.sigma
        )
        log_score[:, model.mask_index] = -torch.inf
        return log_score


class AutoRegressive(Sampler):
    """Token by token from bos, with a cache of keys and values.

    `sampling.steps` and noise removal do not apply.
    """

    @classmethod
    def fits(cls, algorithm: type) -> bool:
        return algorithm.is_autoregressive

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        model, length = chain.model, xt.shape[1]
        x = xt.clone()
        given = (~chain.free).all(dim=0).long().cumprod(dim=0).sum()
        start = int(given)  # what every sequence begins with goes in at once
        cache, new = KVCache(length), x[:, :start]
        for position in chain.progress(range(start, length)):
            hidden = model.hidden(new, cache)[:, -1]  # (B, D)
            drawn = [self._draw(chain, rows) for rows in hidden.split(chain.chunk)]
            free = chain.free[:, position]
            x[:, position] = torch.where(free, torch.cat(drawn), x[:, position])
            new = x[:, position : position + 1]
        chain.evaluations += length - start
        return x

    def _draw(self, chain: Chain, hidden: Tensor) -> Tensor:
        """Next tokens, (n, D) -> (n,)."""
        logits = self.widen(chain.model.logits_for_loss(hidden))
        probs = chain.model.process_logits(logits).exp()
        return self.draw(nucleus(probs, self.p_nucleus), chain.generator)


class SemiAutoRegressive:
    """Windows from left to right: each keeps the last L - S tokens of the one before
    and draws S new ones, K = `sampling.num_strides` times after the first window.

    Nothing that was drawn is drawn again; samples have L + K S tokens.

    Args:
        sampler: Draws a window, given its left part.
        stride: S, with 0 < S < L.
        num_strides: K.

    Reference: MDLM (arXiv:2406.07524), semi-autoregressive generation; SSD-LM.
    """

    def __init__(self, sampler: Sampler, stride: int, num_strides: int) -> None:
        self.sampler = sampler
        self.stride = stride
        self.num_strides = num_strides

    def length(self, num_tokens: int) -> int:
        return num_tokens + self.num_strides * self.stride

    def draw_dtype(self, device: torch.device) -> torch.dtype:
        return self.sampler.draw_dtype(device)

    def __call__(
        self,
        model: Any,
        num_samples: int,
        *,
        given: Given | None = None,
        **options: Any,
    ) -> Samples:
        """Draws samples; arguments as for `Sampler`, `given` of (B, L + K S)."""
        L, S = model.num_tokens, self.stride
        if given is None:
            length = self.length(L)
            given = Given.nothing(num_samples, length, model.device)
        given = given.to(model.device)
        tokens, evaluations = given.tokens.clone(), 0
        known = given.known.clone()
        for start in range(0, self.num_strides * S + 1, S):
            window = Given(tokens, known).window(start, L)
            samples = self.sampler(model, num_samples, given=window, **options)
            tokens[:, start : start + L] = samples.tokens
            known[:, start : start + L] = True
            evaluations = evaluations + samples.evaluations
        return Samples(tokens, evaluations)


# By `sampling.predictor`; of several classes under a name, the one that fits counts.
SAMPLERS: dict[str, tuple[type[Sampler], ...]] = {
    "ancestral": (Ancestral, AutoRegressive),
    "ancestral_cache": (AncestralCache,),
    "analytic": (Analytic,),
    "first_hitting": (FirstHitting,),
    "psi": (Psi,),
}
# Names in MDLM's configs.
ALIASES = {"ddpm": "ancestral", "ddpm_cache": "ancestral_cache"}


def sampler_class(predictor: str, algorithm: type) -> type[Sampler]:
    """The sampler that `sampling.predictor` means for an algorithm.

    Raises:
        ConfigError: If there is none; the choices are those that fit.
    """
    fitting = {
        name: sampler
        for name, samplers in SAMPLERS.items()
        for sampler in samplers
        if sampler.fits(algorithm)
    }
    if ALIASES.get(predictor) in fitting:
        return fitting[ALIASES[predictor]]
    return choose(fitting, predictor, "sampling.predictor", algorithm.__name__)


def build_sampler(config: DictConfig, algorithm: type) -> Sampler | SemiAutoRegressive:
    """The sampler that `sampling` describes for an algorithm.

    Raises:
        ConfigError: If the settings make no sense, or not for this algorithm.
    """
    sampling = config.sampling
    kind = sampler_class(sampling.predictor, algorithm)
    sampler = kind(sampling, config.algo.compat)
    if not sampling.semi_ar:
        return sampler
    if algorithm.is_autoregressive:
        raise ConfigError(
            "sampling.semi_ar=True is for diffusion models, not "
            f"algo={config.algo.name}; the only value is False."
        )
    if sampling.noise_removal in ("none", False):
        raise ConfigError(
            f"sampling.noise_removal={sampling.noise_removal!r} would leave noise in "
            "the windows of sampling.semi_ar=True; choose ancestral or greedy."
        )
    if not 0 < sampling.stride_length < config.model.length:
        raise ConfigError(
            f"sampling.stride_length={sampling.stride_length} is not above 0 and below "
            f"model.length={config.model.length}."
        )
    return SemiAutoRegressive(sampler, sampling.stride_length, sampling.num_strides)
