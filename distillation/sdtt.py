"""Self-distillation through time: a student that takes, in one step, the many small
steps of its teacher.

Reference: SDTT (arXiv:2410.21035). The equations are in docs/distillation.md.

Shapes: B batch, L length, K vocabulary, D hidden size, M steps of the teacher, n tokens
of a chunk.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig
from torch import Tensor

from algo import MDLM
from checkpoints.checkpoint import Checkpoint
from diffusion.base import Latent, flat_positions, index_of, without_mask
from distillation.divergences import DIVERGENCES, without_column
from distillation.student import Student
from distillation.teacher import Teacher
from models.device import to_device, wide_dtype, widened
from models.ema import ExponentialMovingAverage
from models.head import Head, Loss, draw_chunk_size, logits_of
from sampling.categorical import at_quantile
from utils import ConfigError, require

# ---------------------------------------------------------------- the teacher's steps


def exact_grid(t: Tensor, step_size: float, num_steps: int) -> Tensor:
    """t - k step_size for k = 0 .. M - 1: where each step begins, (B,) -> (M, B)."""
    return torch.stack([t - k * step_size for k in range(num_steps)])


def endpoint_grid(t: Tensor, step_size: float, num_steps: int) -> Tensor:
    """M times from t to t - M step_size at even distances, (B,) -> (M, B)."""
    space = torch.linspace(1, 0, num_steps, dtype=t.dtype)[:, None]
    return t * space + (t - num_steps * step_size) * (1 - space)


def legacy_grid(t: Tensor, step_size: float, num_steps: int) -> Tensor:
    """`endpoint_grid` as published, (B,) -> (M, B).

    NOTE(compat): it takes 1 - t for 1 - space, so that times are not those of steps.
    """
    space = torch.linspace(1, 0, num_steps, dtype=t.dtype)[:, None]
    return t * space + (t - num_steps * step_size) * (1 - t)


TimeGrid = Callable[[Tensor, float, int], Tensor]
TIME_GRIDS: dict[str, TimeGrid] = {
    "exact": exact_grid,
    "endpoint": endpoint_grid,
    "legacy": legacy_grid,
}


def ancestral_rate(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """Probability that a mask is revealed between two levels, by the posterior."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


def analytic_rate(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """The same from scores: (e^d - 1) S with d = sigma_t - sigma_s and the total score
    S = alpha_t / (1 - alpha_t), as for SUBS; equal to `ancestral_rate`."""
    return torch.expm1(alpha_s.log() - alpha_t.log()) * alpha_t / (1 - alpha_t)


REVEAL_RATES = {"ancestral": ancestral_rate, "analytic": analytic_rate}


class TeacherStep(NamedTuple):
    """A step of the teacher, but for the tokens that it reveals."""

    alpha_t: Tensor  # where it begins, (B, 1) on the host
    alpha_s: Tensor  # where it ends
    sigma: Tensor  # -log(alpha_t), (B, 1)
    positions: Tensor  # of what it reveals in the flattened batch, (n,)
    u: Tensor  # uniform numbers that draw these tokens, (n,)


class GrowingSteps:
    """Step size of the teacher and round, by step.

        r = step // grow_dt_every,  D_r = (1 - sampling_eps) / N num_distill_steps^r

    with N = orig_num_sampling_steps. The last round is the one before the teacher would
    take, from noise to data, fewer than min_num_sampling_steps of round(1 / D_r) steps,
    or more than all time at once; with num_distill_steps=1 there is none.
    """

    def __init__(self, config: DictConfig) -> None:
        algo = config.algo
        self.length: int = algo.grow_dt_every
        self.first = (1 - config.training.sampling_eps) / algo.orig_num_sampling_steps
        self.factor: int = algo.num_distill_steps
        self.last = self._last(algo.min_num_sampling_steps)

    def number(self, step: int) -> int:
        """r, from 0."""
        return step // self.length

    def start(self, number: int) -> int:
        """The first step of a round."""
        return number * self.length

    def step_size(self, number: int) -> float:
        """D_r of a round."""
        return self.first * float(self.factor) ** number

    def num_steps(self, number: int) -> int:
        """How many such steps lead from noise to data."""
        return round(1 / self.step_size(number))

    def is_over(self, step: int) -> bool:
        """Whether there is no round for a step."""
        return self.last is not None and self.number(step) > self.last

    def _last(self, least: int) -> int | None:
        if self.factor == 1:
            return None
        number = 0
        while self.num_steps(number + 1) >= least and self.step_size(number + 1) <= 1:
            number += 1
        return number


# ---------------------------------------------------------------- the algorithm


class SDTT(Student, MDLM):
    """The student's belief at x_t is drawn to what its teacher believes of each masked
    token when it reveals it, while it takes M steps of size D from x_t.

        x^0 = x_t,  x^(k+1) ~ one ancestral step of the teacher at x^k, from tau_k
        loss = D(p_student(. | x_t), p_teacher(. | x^k)) of each masked token,
               k the step that reveals it, or else the last one

    Their mean over masked tokens is minimised. Which tokens a step reveals does not
    depend on the network: it is drawn before. What is kept of the teacher is its hidden
    state of each token at that step, whose logits are formed where they are compared,
    a chunk of tokens at a time.

    The teacher is the student as it is at the start of a round of `algo.grow_dt_every`
    steps; D is M times as large in the next round. Each round's teacher is also a
    checkpoint, checkpoints/round_N.ckpt.
    """

    has_estimators = False
    loss_types = ("elbo",)
    rounds: GrowingSteps
    is_discrete_time = False
    counts_vary = True  # of masked tokens

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        algo = config.algo
        self.rounds = GrowingSteps(config)
        self.teacher = Teacher(self.backbone, config, is_wide=False)
        self.num_distill_steps: int = algo.num_distill_steps
        self.time_grid = TIME_GRIDS[algo.teacher_time_grid]
        self.reveal_rate = REVEAL_RATES[algo.sampling_mode]
        self.divergence = DIVERGENCES[algo.distill_mode]

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        algo = config.algo
        if algo.get("loss_type") in DIVERGENCES:
            raise ConfigError(
                f"algo.loss_type={algo.loss_type}: the divergence of algo={algo.name} "
                "is algo.distill_mode."
            )
        super().validate_config(config)
        require(algo.distill_mode, DIVERGENCES, "algo.distill_mode")
        require(algo.teacher_time_grid, TIME_GRIDS, "algo.teacher_time_grid")
        require(algo.sampling_mode, REVEAL_RATES, "algo.sampling_mode")
        if algo.orig_num_sampling_steps < algo.min_num_sampling_steps:
            raise ConfigError(
                f"algo.orig_num_sampling_steps={algo.orig_num_sampling_steps} is below "
                f"algo.min_num_sampling_steps={algo.min_num_sampling_steps}: there "
                "would be no round."
            )
        if algo.use_ema_on_growth and config.training.ema == 0:
            raise ConfigError("algo.use_ema_on_growth=True needs training.ema above 0.")

    @classmethod
    def as_published(cls) -> type["SDTT"]:
        return SDTTAsPublished if cls is SDTT else cls

    # ---- loss

    def distillation_loss(self, batch: Mapping[str, Tensor], batch_idx: int) -> Loss:
        x0 = batch["input_ids"]
        t = self.sample_t(len(x0), batch_idx)
        z, steps = self.plan(x0, t, batch_idx)
        valid_tokens = self.valid_tokens(batch["attention_mask"])
        masked = (z.xt == self.mask_index) & (valid_tokens > 0)
        nll = self.head_loss(
            self.hidden(z.xt, self.sigma(z.alpha_t)),
            self.divergence_of_logits,
            Loss.weights(masked, self.loss_precision().logits),
            others=[self.targets(z.xt, steps)],
            scored=z.scored,
        )
        return Loss.reduce(nll, masked)

    def uniforms_in_training(self, purpose: str, rows: range) -> Tensor:
        """One draw for all times of a global batch: u_i = (v + i / n) mod 1."""
        n = self.config.loader.global_batch_size
        v = self.row_stream(purpose, range(1)).uniform()
        return (v + index_of(rows) / n) % 1

    def divergence_of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of masked tokens, without the mask's own entry: (n, K) each -> (n,)."""
        mask = self.mask_index
        pair = (without_column(x, mask) for x in (student, teacher))
        return self.divergence(*pair)

    # ---- targets

    @property
    def step_size(self) -> float:
        """D, that of the teacher's round."""
        return self.rounds.step_size(self.teacher.round or 0)

    def teacher_times(self, t: Tensor) -> Tensor:
        """Where each of the teacher's steps begins, (B,) -> (M, B) on the host."""
        times = self.time_grid(t, self.step_size, self.num_distill_steps)
        return times.clamp(min=self.sampling_eps)

    def plan(
        self, x0: Tensor, t: Tensor, batch_idx: int = 0
    ) -> tuple[Latent, list[TeacherStep]]:
        """What the student sees, and what the teacher's steps reveal of it.

        All is drawn on the host, as in `corrupt`.
        """
        z = self.corrupt(x0, t, batch_idx)
        if z.is_noised is None:
            raise RuntimeError("corrupt() does not tell which tokens it has masked")
        is_masked, steps = z.is_noised, []
        shape = self.num_distill_steps, 2, *x0.shape
        draws = self.teacher_draws(shape, batch_idx)
        for time, (u, v) in zip(self.teacher_times(t)[..., None], draws, strict=True):
            alpha_t = self.noise(time).alpha_t
            alpha_s = self.noise((time - self.step_size).clamp(min=0)).alpha_t
            is_revealed = is_masked & (u < self.reveal_rate(alpha_t, alpha_s))
            is_masked = is_masked & ~is_revealed
            positions = flat_positions(is_revealed)
            steps.append(
                TeacherStep(
                    alpha_t,
                    alpha_s,
                    self.sigma(widened(alpha_t, x0.device)),
                    to_device(positions, x0.device),
                    widened(v.flatten()[positions], x0.device),
                )
            )
        return z, steps

    def teacher_draws(self, shape: tuple[int, ...], batch_idx: int) -> Tensor:
        """U(0, 1), (M, 2, B, L) on the host: when a token is revealed, and as what."""
        M, two, B, L = shape
        stream = self.row_stream("teacher", self.row_indices(B, batch_idx))
        return stream.uniform(M, two, L).permute(1, 2, 0, 3)

    @torch.no_grad()
    def targets(self, xt: Tensor, steps: list[TeacherStep]) -> Head:
        """The teacher's hidden state of each masked token at the step that reveals it.

        Args:
            xt: Noisy ids, (B, L).
            steps: From `plan`. What the last one reveals changes nothing.

        Returns:
            Hidden states (B, L, D) with the teacher's head. Those of tokens that are
            not masked in x_t mean nothing.
        """
        product = self.loss_precision().product
        x, found = xt, None
        is_known = torch.zeros_like(xt, dtype=torch.bool)
        for k, step in enumerate(steps):
            head = self.teacher.head(x, self.condition(step.sigma)).to(product)
            hidden = head.hidden
            if found is not None:
                hidden = torch.where(is_known[..., None], found.hidden, hidden)
            found = head._replace(hidden=hidden)
            if k + 1 < len(steps):
                revealed = self.reveal(x, head, step)
                is_known |= revealed != x
                x = revealed
        if found is None:
            raise RuntimeError("the teacher takes no step")
        return found

    def reveal(self, x: Tensor, head: Head, step: TeacherStep) -> Tensor:
        """The ids after a step of the teacher, (B, L) -> (B, L).

        Args:
            x: Before it.
            head: The teacher's at x, with hidden states (B, L, D).
            step: Which of them it reveals.
        """
        hidden, tokens = head.hidden.flatten(0, 1), []
        chunk = draw_chunk_size(self.vocab_size, x.device.type)
        parts = (y.split(chunk) for y in (step.positions, step.u))
        for positions, u in zip(*parts, strict=True):
            part = head._replace(hidden=hidden.index_select(0, positions))
            logits = logits_of(part, self.loss_precision()).to(wide_dtype(x.device))
            log_p = self.denoised(logits, xt=positions, sigma=u)
            tokens.append(at_quantile(log_p.exp(), u))
        flat = x.flatten().index_copy(0, step.positions, torch.cat(tokens))
        return flat.view_as(x)

    # ---- rounds

    def is_done(self) -> bool:
        return self.rounds.is_over(self.global_step)

    def load_weights(self, checkpoint: Checkpoint, key: str) -> None:
        """Training starts from a checkpoint's EMA weights if `algo.start_from_ema`
        says so and it has them, and with an EMA of its own in any case."""
        super().load_weights(checkpoint, key)
        if self.config.mode != "train":
            return
        if self.config.algo.start_from_ema and checkpoint.ema is not None:
            if found := checkpoint.not_finite(["EMA"]):
                raise ConfigError(
                    f"{key}={self.config.training.finetune_path!r}: {found}; "
                    "algo.start_from_ema=False takes the raw weights."
                )
            start = ExponentialMovingAverage(self.parameters(), decay=1)
            start.load_state_dict(dict(checkpoint.ema))
            self._set_weights(start.shadow_params)
        self.ema = None

    def renew_teacher(self, number: int) -> None:
        """Also what `use_ema_on_growth` and `reset_optimizer_on_growth` ask for."""
        grows, algo = number > 0, self.config.algo
        if grows and algo.use_ema_on_growth and self.ema is not None:
            self._set_weights(self.ema.shadow_params)
            self.ema = self.make_ema()
        super().renew_teacher(number)
        if grows and algo.reset_optimizer_on_growth:
            self.restart_optimizer()
        rank_zero_info(
            "distillation round %d: the teacher takes %d steps of %.4g",
            number,
            self.rounds.num_steps(number),
            self.rounds.step_size(number),
        )

    def restart_optimizer(self) -> None:
        """Moments and learning rate are those of a run that begins."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        schedule = self.lr_schedulers()
        if isinstance(optimizer, list) or isinstance(schedule, (list, type(None))):
            raise RuntimeError("there is not one optimiser with one schedule")
        fresh = self.make_optimizer()
        start = self.make_schedule(fresh).state_dict()
        optimizer.state.clear()
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group["lr"] = new["lr"]
        schedule.load_state_dict(start)

    def train_results(self) -> dict[str, Tensor]:
        size = torch.tensor(self.step_size)
        return super().train_results() | {"trainer/teacher_step_size": size}


class SDTTAsPublished(SDTT):
    """SDTT with the mask's column in its divergences: `algo.compat=reference`.

    NOTE(compat): both sides are about -1e6 there. The divergences of log-probabilities
    then have rounding noise in them, 0.06 nats in float32, and mse has another mean.
    Micro-batches are means over their own masked tokens.
    """

    def divergence_of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        pair = (without_mask(x, self.mask_index) for x in (student, teacher))
        return self.divergence(*pair)
