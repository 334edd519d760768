"""Discrete consistency distillation: a student that takes, in one step of twice the
length, the steps of its teacher.

Reference: DUO (arXiv:2506.10892), discrete consistency distillation (DCD).

Shapes: B batch, L length, K vocabulary.
"""

import copy
import posixpath
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Self

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from omegaconf import DictConfig
from torch import Tensor, nn

from algo import DUO_BASE
from checkpoints.reading import read_checkpoint
from diffusion.base import is_first
from diffusion.curriculum import check_operator
from diffusion.gaussian import Levels, argmax_pair
from distillation.divergences import DIVERGENCES
from distillation.teacher import Rounds, digest
from integral.registry import Settings, build_operator
from integral.transform import gauss_levels
from metrics.likelihood import Likelihood
from models.device import widened
from models.head import Head, Loss, TokenNLL
from training.resume import TEACHER
from utils import ConfigError, copy_file, path_exists, require

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


class Distillation(DUO_BASE):
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

    is_discrete_time = True  # algo.T sets the time gap
    needs_weights = True
    loss_types = ("kl-fwd", "kl-bwd")

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.T = 0  # the bound is that of continuous time
        self.rounds = Rounds(config)
        self.operator = build_operator(Settings.of(config, self.vocab_size))
        self.divergence = DIVERGENCES[config.algo.loss_type]
        self.valid_distillation = Likelihood()
        self._teacher: list[nn.Module] = []  # a list: neither trained nor saved
        self._round: int | None = None
        self._digest = ""
        self._saved: Mapping[str, Any] = {}

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
        if "fsdp" in config.strategy._target_.lower():
            raise ConfigError(
                f"strategy=fsdp cannot hold the teacher of algo={config.algo.name}; "
                "choose strategy=ddp."
            )

    # ---- loss

    def nll(
        self, x0: Tensor, weights: Tensor | None = None, batch_idx: int = 0
    ) -> TokenNLL:
        """The divergence in training, the bound of the likelihood in validation."""
        if not self.training:
            return super().nll(x0, weights, batch_idx)
        return self.consistency(x0, weights, batch_idx)

    def consistency(
        self, x0: Tensor, weights: Tensor | None = None, batch_idx: int = 0
    ) -> TokenNLL:
        """The divergence of each token, nats. Arguments as for `nll`."""
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
        levels, sigmas = [], []
        for time in (t[:, None], t[:, None] - dt):
            gauss = gauss_levels(self.operator.gammas.gamma(time))
            level = Levels(*gauss, tau=torch.zeros_like(time))
            levels.append(Levels(*(widened(x, x0.device) for x in level)))
            sigma = self.sigma(self.operator(time).alpha_t)
            sigmas.append(widened(sigma, x0.device))
        generator = self._batch_generator("latent", batch_idx, device="cpu")
        ids = argmax_pair(x0, *levels, self.vocab_size, generator)
        if self.ignore_bos:
            ids = [torch.where(is_first(x0), x0, x) for x in ids]
        later, earlier = map(Noisy, ids, sigmas)
        return later, earlier

    @torch.no_grad()
    def teacher_head(self, xs: Tensor, sigma: Tensor) -> Head:
        """Hidden states of the teacher with its head, in float32."""
        (teacher,) = self._teacher
        with torch.autocast(xs.device.type, enabled=False):
            hidden = teacher.trunk(xs, self.condition(sigma))
        linear = teacher.output_embedding
        return Head(hidden, linear.weight, linear.bias)

    # ---- the teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to devices and types take the teacher along."""
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def on_train_start(self) -> None:
        super().on_train_start()
        number = self.rounds.number(self.global_step)
        if self.global_step > self.rounds.start(number):  # resumed within a round
            self._read_teacher(number)

    def on_validation_epoch_start(self) -> None:
        if self.validation_due:  # of an interrupted run, whose last step counts
            self._read_teacher(self.rounds.number(self.global_step - 1))
        super().on_validation_epoch_start()

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """A new teacher for a new round, once, before its first micro-batch."""
        super().on_train_batch_start(batch, batch_idx)
        number = self.rounds.number(self.global_step)
        if number == self._round:
            return
        use_ema = self.config.algo.teacher_ema and self.ema is not None
        with self.ema.applied(self.parameters()) if use_ema else nullcontext():
            self.set_teacher(self.backbone.state_dict(), number)
        self.trainer.save_checkpoint(self._path(number), weights_only=True)
        gap = self.rounds.gap(self.global_step)
        rank_zero_info("distillation round %d: time gap %.4g", number, gap)

    def set_teacher(self, weights: Mapping[str, Tensor], number: int) -> None:
        """Takes over the weights of a backbone as those of round `number`."""
        if not self._teacher:
            teacher = copy.deepcopy(self.backbone)  # draws nothing, unlike a new one
            if self.config.training.compile:
                teacher.compile_blocks()
            self._teacher = [teacher.eval().requires_grad_(False)]
        (teacher,) = self._teacher
        teacher.load_state_dict(weights)
        self._round, self._digest = number, digest(teacher)

    def _read_teacher(self, number: int) -> None:
        """The teacher that the interrupted run had in a round."""
        if number == self._round:
            return
        name = posixpath.basename(self._path(number))
        resumed = posixpath.dirname(self.config.checkpointing.resume_ckpt_path)
        places = [self._path(number), posixpath.join(resumed, name)]
        path = next((path for path in places if path_exists(path)), None)
        key = "checkpointing.resume_ckpt_path"
        if path is None:
            raise ConfigError(
                f"{key}: resuming at step {self.global_step} needs the teacher of "
                f"round {number}, {places[0]}, which is not there."
            )
        trusted = self.config.checkpointing.trusted_classes
        checkpoint = read_checkpoint(path, key, trusted)
        prefix = "backbone."
        weights = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        if self.config.algo.teacher_ema:
            names = [name for name, _ in self.backbone.named_parameters()]
            shadow = checkpoint["ema"]["shadow_params"]
            weights |= dict(zip(names, shadow, strict=True))
        self.set_teacher(weights, number)
        if self._saved.get("sha256", self._digest) != self._digest:
            raise ConfigError(
                f"{key}: {path} is not the teacher of the run that is resumed."
            )
        if path != places[0]:
            rank_zero_only(copy_file)(path, places[0])

    def _path(self, number: int) -> str:
        folder = f"{self.config.checkpointing.save_dir}/checkpoints"
        return f"{folder}/{TEACHER}{number}.ckpt"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = {"round": self._round, "sha256": self._digest}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint.get("teacher", {})

    # ---- logging

    def train_results(self) -> dict[str, Tensor]:
        return {
            "train/distillation_loss": self.train_likelihood.compute()["nll"],
            "trainer/time_gap": torch.tensor(self.rounds.gap(self.global_step - 1)),
        }

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self._teacher:
            valid_tokens = self.valid_tokens(batch["attention_mask"])
            weights = Loss.weights(valid_tokens)
            nll = self.consistency(batch["input_ids"], weights, batch_idx)
            losses = Loss.reduce(nll, valid_tokens)
            self.valid_distillation.update(losses.nlls, losses.num_tokens)

    def on_validation_epoch_end(self) -> None:
        if self._teacher:
            loss = self.valid_distillation.compute()["nll"]
            self.log("val/distillation_loss", loss, sync_dist=True)
            self.valid_distillation.reset()
        super().on_validation_epoch_end()
