"""Discrete consistency distillation: a student that takes, in one step of twice the
length, the steps of its teacher.

Reference: DUO (arXiv:2506.10892), discrete consistency distillation (DCD).

Shapes: B batch, L length, K vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig
from torch import Tensor

from algo import DUO_BASE
from diffusion.base import is_first
from diffusion.curriculum import check_operator
from diffusion.gaussian import Levels, argmax_pair
from distillation.divergences import DIVERGENCES
from distillation.student import Student
from distillation.teacher import Rounds, Teacher
from integral.registry import Settings, build_operator
from integral.transform import gauss_levels
from models.device import widened
from models.head import Head, Loss, TokenNLL
from utils import ConfigError, require

# Keys of `algo.curriculum` for soft inputs, of which there are none here.
_NO_CURRICULUM = (
    "gumbel_tau_log10_start",
    "gumbel_tau_log10_end",
    "start",
    "end",
    "top_k",
)


class Noisy(NamedTuple):
    """Input of a network."""

    xt: Tensor  # ids, (B, L)
    sigma: Tensor  # -log(alpha_t), (B, 1)


class Distillation(Student, DUO_BASE):
    """The student's belief at x_t is drawn to the teacher's at a less noisy x_s.

        t <- min(t + dt, 1),  s = t - dt
        x_t = argmax w_t,  x_s = argmax w_s  of Gaussian latents with the same noise
        loss = D(p_student(. | x_t), p_teacher(. | x_s)) of each token

    The teacher is a copy of the student, taken anew at the start of every round of
    `algo.update_teacher_every` steps. Each round's copy is also a checkpoint,
    checkpoints/round_N.ckpt, from which a resumed run has its teacher; other
    checkpoints hold the student alone. Validation reports the bound of the likelihood,
    and the loss under its own name.
    """

    rounds: Rounds
    is_discrete_time = True  # algo.T sets the time gap
    loss_types = ("kl-fwd", "kl-bwd")

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.T = 0  # the bound is that of continuous time
        self.rounds = Rounds(config)
        use_ema = config.algo.teacher_ema
        self.teacher = Teacher(self.backbone, config, use_ema=use_ema)
        self.operator = build_operator(Settings.of(config, self.vocab_size))
        self.divergence = DIVERGENCES[config.algo.loss_type]

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        check_operator(config)
        Rounds.validate_config(config)
        for key in _NO_CURRICULUM:
            if (value := config.algo.curriculum[key]) != -1:
                raise ConfigError(
                    f"algo.curriculum.{key}={value} has no effect with "
                    f"algo={config.algo.name}; the only value is -1."
                )
        require(config.algo.teacher_ema, (True, False), "algo.teacher_ema")
        if config.algo.teacher_ema and config.training.ema == 0:
            raise ConfigError("algo.teacher_ema=True needs training.ema above 0.")

    # ---- loss

    def nll(
        self,
        x0: Tensor,
        weights: Tensor | None = None,
        batch_idx: int = 0,
        labels: Tensor | None = None,
    ) -> TokenNLL:
        """The divergence in training, the bound of the likelihood in validation."""
        if not self.training:
            return super().nll(x0, weights, batch_idx, labels)
        return self.consistency(x0, weights, batch_idx)

    def distillation_loss(self, batch: Mapping[str, Tensor], batch_idx: int) -> Loss:
        valid_tokens = self.valid_tokens(batch["attention_mask"])
        weights = Loss.weights(valid_tokens)
        nll = self.consistency(batch["input_ids"], weights, batch_idx)
        return Loss.reduce(nll, valid_tokens)

    def consistency(
        self, x0: Tensor, weights: Tensor | None = None, batch_idx: int = 0
    ) -> TokenNLL:
        """The divergence of each token, nats; arguments as for `nll`."""
        t = self.sample_t(len(x0), batch_idx)
        student, teacher = self.corrupt_pair(x0, t, batch_idx)
        return self.head_loss(
            self.hidden(student.xt, student.sigma),
            self.divergence,
            weights,
            others=[self.teacher_head(teacher.xt, teacher.sigma)],
        )

    def corrupt_pair(
        self, x0: Tensor, t: Tensor, batch_idx: int = 0
    ) -> tuple[Noisy, Noisy]:
        """What the student sees, at t + dt, and what the teacher sees, at t.

        Args:
            x0: Clean ids, (B, L).
            t: Times, (B,) on the host; t + dt is cut at 1, with dt between the two.
            batch_idx: Position in the epoch.
        """
        dt = self.rounds.gap(self.global_step)
        t = (t + dt).clamp(max=1)
        later, sigma_t = self._levels(t[:, None], x0.device)
        earlier, sigma_s = self._levels(t[:, None] - dt, x0.device)
        stream = self.row_stream("latent", self.row_indices(len(x0), batch_idx))
        xt, xs = argmax_pair(x0, later, earlier, self.vocab_size, stream)
        if self.ignore_bos:
            xt, xs = (torch.where(is_first(x0), x0, x) for x in (xt, xs))
        return Noisy(xt, sigma_t), Noisy(xs, sigma_s)

    def _levels(self, time: Tensor, device: torch.device) -> tuple[Levels, Tensor]:
        """Of the latents, and sigma, at times (B, 1) on the host; (B, 1) each."""
        gauss = gauss_levels(self.operator.gammas.gamma(time))
        level = Levels(*gauss, tau=torch.zeros_like(time))
        sigma = self.sigma(self.operator(time).alpha_t)
        return Levels(*(widened(x, device) for x in level)), widened(sigma, device)

    def teacher_head(self, xs: Tensor, sigma: Tensor) -> Head:
        """Hidden states of the teacher with its head, in float32."""
        return self.teacher.head(xs, self.condition(sigma))

    def renew_teacher(self, number: int) -> None:
        super().renew_teacher(number)
        gap = self.rounds.gap(self.global_step)
        rank_zero_info("distillation round %d: time gap %.4g", number, gap)

    # ---- logging

    def train_results(self) -> dict[str, Tensor]:
        gap = self.rounds.gap(self.global_step - 1)
        return super().train_results() | {"trainer/time_gap": torch.tensor(gap)}
