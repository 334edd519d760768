"""Samplers: prior -> step -> sample. A model supplies probabilities, a sampler draws.

Steps are exact and lean: which positions may change is drawn first, from the schedule
alone; the network runs only for sequences that have one, its head and the draw of a
token only at these positions, a chunk of them at a time. No (B, L, K) tensor exists.

`denoiser.py` says what a sampler asks of a model. It asks for the reverse step in two
forms, lean (`change_bound`, `changed`) and as probabilities (`posterior`, `marginal`).
All draws take a generator, so a seed replays a sample.

Shapes: B batch, L length, K vocabulary, D hidden size, n tokens of a chunk. Signal
levels are (B, 1) or (B, L).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.device import to_device, wide_dtype
from models.noise import Noise
from sampling.categorical import exponential_race, inverse_cdf, nucleus, tempered
from sampling.correctors import Corrector
from sampling.denoiser import Algorithm, Denoiser, Model
from sampling.guidance import guided_posterior
from sampling.prompts import Given
from sampling.recording import Recorder
from sampling.reverse_process import Chain, Samples, Step, Tokens
from sampling.trajectory import NOTHING
from utils import ConfigError, require

# From alpha_s (n,) to q(x_s | x_t), (n, K).
Posterior = Callable[[Tensor], Tensor]
TIME_EPS = 1e-5  # last time of the grid; noise removal goes from there to 0
# By `algo.compat`. NOTE(compat): the published greedy end tells the network no class.
GREEDY_SEES_LABELS = {"paper": True, "reference": False}


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

    # Methods by `sampling.noise_removal`: from x_t and alpha_t to clean tokens.
    removals: ClassVar[dict[str, str]] = {
        "ancestral": "remove_by_draw",
        "greedy": "remove_greedily",
        "none": "keep",
    }
    removal_of_true = "greedy"  # what noise_removal=True meant in MDLM's configs
    refines = False  # whether sampling.refine_steps has a meaning
    # Keys of `sampling` that this sampler alone reads, with the values they have if it
    # is another one.
    keys: ClassVar[dict[str, Any]] = {}
    corrector: Corrector | None = None  # between its steps
    starts_from_noise = True  # or from no tokens but those that are given

    def __init__(self, config: DictConfig, compat: str = "paper") -> None:
        self.num_steps: int = config.steps
        self.temperature: float = config.temperature
        self.p_nucleus: float = config.p_nucleus
        self.use_float64: bool = config.use_float64
        self.guid_weight: float | None = config.guid_weight
        self.greedy_sees_labels = GREEDY_SEES_LABELS[compat]
        self.draw = inverse_cdf if self.use_float64 else exponential_race
        self.is_lean = self.use_float64
        self.validate_config(config)
        method = self.known_removals()[config.noise_removal]
        self.remove_noise: Callable[[Chain, Tensor, Tensor], Tensor]
        self.remove_noise = getattr(self, method)

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        """Refuses settings of `config.sampling` that make no sense for this sampler."""
        known = cls.known_removals()
        require(config.noise_removal, known, "sampling.noise_removal")
        if config.refine_steps and not cls.refines:
            raise ConfigError(
                f"sampling.refine_steps={config.refine_steps} is for samples of one "
                f"step; with sampling.predictor={config.predictor} the only value is 0."
            )
        if config.refine_path and not config.refine_steps:
            raise ConfigError(
                f"sampling.refine_path={config.refine_path!r} has no effect with "
                "sampling.refine_steps=0."
            )

    @classmethod
    def known_removals(cls) -> dict[str | bool, str]:
        """Methods by value of `sampling.noise_removal`, MDLM's True and False too."""
        known: dict[str | bool, str] = dict(cls.removals.items())
        for old, name in ((True, cls.removal_of_true), (False, "none")):
            if name in cls.removals:
                known[old] = cls.removals[name]
        return known

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        """Whether models of this class offer what the sampler asks for."""
        return not algorithm.is_autoregressive and not algorithm.is_one_step

    def length(self, num_tokens: int) -> int:
        """Tokens of a sample of a model of `num_tokens`."""
        return num_tokens

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        num_samples: int,
        *,
        num_steps: int | None = None,
        given: Given | None = None,
        generator: torch.Generator | None = None,
        show_progress: bool = False,
        labels: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> Samples:
        """Draws samples.

        Args:
            model: On its device, in evaluation mode.
            num_samples: B.
            num_steps: Steps from t = 1 to t = 1e-5; None takes `sampling.steps`.
            given: Tokens that samples hold unchanged, (B, L).
            generator: On the model's device; None uses torch's global one.
            show_progress: Whether to show a bar over the steps.
            labels: The class of each sample, (B,), as far as `sampling.guid_weight`
                lets the network know it; only for models with classes.
            recorder: Told of every step; tokens do not depend on it.
        """
        if given is None:
            given = Given.nothing(num_samples, model.num_tokens, model.device)
        given = model.with_bos(given.to(model.device))
        denoiser = cast(Denoiser, model)  # as `fits` has made sure; not for AR
        remembers = self.remembers(denoiser)
        conditions = self.conditions(model, labels)
        told = remembers, show_progress, conditions, recorder
        chain = Chain(denoiser, ~given.known, generator, *told)
        xt = given.put(model.prior_sample(num_samples, generator))
        x0, evaluations = self.denoise(chain, xt, num_steps)
        return Samples(x0, evaluations)

    def denoise(
        self, chain: Chain, xt: Tensor, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clean tokens (B, L) from noise, and how often the network was evaluated for
        each sequence, (B,)."""
        recorder = chain.recorder
        if recorder is not None:
            first = xt if self.starts_from_noise else xt.where(~chain.free, NOTHING)
            recorder.begin(first, chain.free, partial(self.belief, chain.model))
        x0 = self.run(chain, xt, self.num_steps if num_steps is None else num_steps)
        chain.check_finite()
        if recorder is not None:
            recorder.end(x0)
        return x0, chain.evaluations

    def conditions(
        self, model: Model, labels: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """What the network is told of the classes of samples, once a step or twice.

        With a guidance weight of None or 0 nothing, with 1 the class, else both.

        Raises:
            ValueError: If labels are missing, or the model has no classes.
        """
        if model.num_classes is None:
            if labels is not None:
                raise ValueError("labels are for models with classes")
            return (None,)
        if labels is None:
            if self.guid_weight:
                raise ValueError("sampling.guid_weight needs labels")
            return (None,)
        labels = to_device(labels, model.device)
        none = torch.full_like(labels, model.num_classes)
        if not self.guid_weight:
            return (none,)
        return (labels,) if self.guid_weight == 1 else (labels, none)

    def remembers(self, model: Denoiser) -> bool:
        """Whether the network's output is kept for sequences that do not change."""
        return False

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        """From the prior to clean tokens, (B, L) -> (B, L)."""
        noise, corrector = chain.model.noise, self.corrector
        plan = [(step, step.to(xt)) for step in self.plan(noise, num_steps)]
        for on_host, step in chain.progress(plan):
            xt = self.step(chain, xt, step)
            if corrector is not None and corrector.is_due(noise, on_host.alpha_s):
                xt = corrector(self, chain, xt, step.alpha_s)
            chain.note(xt)
        return self.remove_noise(chain, xt, plan[-1][1].alpha_s)

    def plan(self, noise: Noise, num_steps: int) -> list[Step]:
        """The steps, on the host."""
        alphas = noise(self.time_grid(noise, num_steps)).alpha_t
        return [Step(alpha_t, alpha_s) for alpha_t, alpha_s in pairwise(alphas)]

    def time_grid(self, noise: Noise, num_steps: int) -> Tensor:
        """Times from 1 down, (num_steps + 1,) float64."""
        return torch.linspace(1, TIME_EPS, num_steps + 1, dtype=torch.float64)

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        """Draws x_s given x_t, (B, L) -> (B, L)."""
        raise NotImplementedError

    # ---- the end: from the last time of the grid to clean tokens

    def remove_by_draw(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """One ancestral step to alpha_s = 1."""
        return self.reverse(chain, xt, alpha_t, torch.ones_like(alpha_t), chain.free)

    def remove_greedily(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """The denoiser's most likely tokens: the greedy tail of DUO."""
        where = chain.free & chain.model.undecided(xt)
        if not self.greedy_sees_labels:
            chain.forget_labels()

        def most_likely(tokens: Tokens) -> Tensor:
            return self.guided(self.x_thetas(chain.model, tokens)).argmax(dim=-1)

        return chain.replace(xt, alpha_t, where, most_likely)

    def keep(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """x_t as it is, whatever noise is left in it."""
        return xt

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
        if self.is_dense(chain):
            where = where & model.undecided(xt)
            return self.reverse_dense(chain, xt, alpha_t, alpha_s, where)
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
        law: Callable[[Posterior, Tensor], Tensor] = lambda q, alpha_s: q(alpha_s),
    ) -> Tensor:
        """`reverse` as published: every position draws from a whole row.

        Args:
            law: From the posterior and alpha_s (n,) to the probabilities of x_s,
                (n, K); by default the posterior at alpha_s.
        """
        model = chain.model

        def drawn(tokens: Tokens) -> Tensor:
            x_thetas = self.x_thetas(model, tokens)
            levels = {"xt": tokens.xt, "alpha_t": tokens.alpha_t}

            def posterior(alpha_s: Tensor) -> Tensor:
                laws = [model.posterior(x, alpha_s=alpha_s, **levels) for x in x_thetas]
                return self.guided(laws)

            q_xs = law(posterior, tokens.pick(alpha_s))
            return self.draw(q_xs.to(x_thetas[0].dtype), chain.generator)

        return chain.replace(xt, alpha_t, where, drawn)

    def is_dense(self, chain: Chain) -> bool:
        """Whether positions draw from whole rows of the posterior.

        Guided ones do: how likely it is that a token changes is known from both laws
        only.
        """
        return not self.is_lean or chain.model.draws_whole_rows or chain.is_guided

    def guided(self, laws: Sequence[Tensor]) -> Tensor:
        """One law of each token, (n, K), of those with its class and without."""
        if len(laws) == 1:
            return laws[0]
        q_cond, q_uncond = laws
        return guided_posterior(q_cond, q_uncond, self.guid_weight)

    def x_thetas(self, model: Denoiser, tokens: Tokens) -> list[Tensor]:
        """`x_theta` under each condition."""
        return [self.x_theta(model, each) for each in tokens.each()]

    def x_theta(self, model: Denoiser, tokens: Tokens) -> Tensor:
        """Probabilities that clean tokens are drawn from: those of the model with the
        temperature, then the nucleus applied, (n, K)."""
        log_x_theta = tempered(self.log_x_theta(model, tokens), self.temperature)
        return nucleus(log_x_theta.exp(), self.p_nucleus)

    def belief(self, model: Denoiser, tokens: Tokens) -> Tensor:
        """The model's own probabilities of clean tokens, guided if they are, (n, K):
        by them positions are compared, at any temperature and nucleus."""
        return self.guided([self.log_x_theta(model, x).exp() for x in tokens.each()])

    def log_x_theta(self, model: Denoiser, tokens: Tokens) -> Tensor:
        """Log-probabilities of clean tokens as the model has them, (n, K)."""
        logits = self.widen(tokens.logits)
        return model.denoised(logits, xt=tokens.xt, sigma=tokens.sigma)

    def widen(self, logits: Tensor) -> Tensor:
        """float64 where asked for and where the device has it, else float32."""
        return logits.to(self.draw_dtype(logits.device))

    def draw_dtype(self, device: torch.device) -> torch.dtype:
        """Type of the probabilities and of the noise of categorical draws."""
        return wide_dtype(device) if self.use_float64 else torch.float32
