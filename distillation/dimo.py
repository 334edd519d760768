"""Distillation to one step: a generator that makes samples in one pass, trained on what
its teacher and a model of its own samples think of these.

Reference: Di[M]O (arXiv:2503.15457), a method for images; docs/distillation.md has the
equations for text, and where they depart from the published code.

Shapes: B batch, L length, K vocabulary, D hidden size, N masked tokens, n tokens of a
chunk.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from checkpoints.checkpoint import Checkpoint
from checkpoints.reading import read_checkpoint
from distillation.divergences import without_column
from distillation.generator import Drawn, Generator, no_noise
from distillation.jeffreys import (
    BETAS,
    jeffreys_gradient,
    smoothed_cross_entropy,
    soft_loss,
    surrogate,
)
from distillation.masking import RATIO_LAWS
from distillation.student import Student
from distillation.teacher import Teacher
from metrics.likelihood import Likelihood
from models.ema import ExponentialMovingAverage
from models.head import Head, Loss, TokenNLL
from models.network import Network
from models.registry import is_sharded
from training.optimization import total_norm
from training.scorable import Stratum
from utils import ConfigError, require

# Keys that have one value for text, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "algo.true_cfg": (1, "the teacher has no condition by which it could be guided"),
    "algo.aux_rounds": (
        1,
        "generator and auxiliary model take one step each in every update, so that "
        "updates count both; a larger algo.aux_lr lets the auxiliary model keep up",
    ),
    "algo.time_conditioning": (False, "a generator of one step sees no time"),
}
CHOICES = {
    "algo.divergence": BETAS,
    "algo.init_tokens": ("uniform", "unigram", "data"),
    "algo.mask_ratio_mode": RATIO_LAWS,
    "algo.aux_mask_ratio_mode": RATIO_LAWS,
    "algo.loss_reduction": ("sum", "mean"),
}


class WholeRun:
    """The one round of a teacher that stays."""

    def number(self, step: int) -> int:
        return 0

    def start(self, number: int) -> int:
        return 0


class DiMO(Student, Generator):
    """One pass of the generator theta makes a sample. Three networks, one of them the
    teacher phi:

        x ~ p_theta(. | x_init) by token;  x~ is x with tokens M masked
        dz_theta = g / B,  g = grad D_beta of p_phi(. | x~) and p_psi(. | x~), at M
        psi: cross entropy of the masked tokens of such an x

    `backbone` is theta. `aux` is psi, a masked diffusion model of theta's samples. Both
    begin as the teacher, which is in no checkpoint but checkpoints/round_0.ckpt.

    The networks share no parameter, so one optimiser that steps once along the
    gradient of the sum of both losses makes the steps of both; whatever counts
    updates counts those of the generator.

    theta may change every token, so there is no bound of its likelihood. Validation
    reports that of psi, as val/aux_nll, and both losses under their own names.
    """

    PURPOSES = ("generator", "auxiliary")  # of draws
    bound = "val/aux_"

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        algo = config.algo
        self.rounds = WholeRun()
        self.teacher = Teacher(self.backbone, config)
        self.aux: Network = copy.deepcopy(self.backbone)
        if config.training.compile:
            self.aux.compile_blocks()
        if algo.freeze_embeddings:
            for network in (self.backbone, self.aux):
                network.input_embedding.requires_grad_(False)
                network.output_embedding.requires_grad_(False)
        beta = BETAS[algo.divergence]
        self.beta: float = algo.jeffreys_beta if beta is None else beta
        self.valid_auxiliary = Likelihood()
        self._auxiliary_loss: Tensor | None = None  # of the last batch
        self._refiner: Teacher | None = None

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        algo = config.algo
        for key, (value, reason) in FIXED.items():
            if (given := OmegaConf.select(config, key)) != value:
                raise ConfigError(
                    f"{key}={given}: {reason}; the only value is {value}."
                )
        for key, names in CHOICES.items():
            require(OmegaConf.select(config, key), names, key)
        if config.sampling.refine_path and is_sharded(config):
            raise ConfigError(
                f"sampling.refine_path={config.sampling.refine_path!r}: strategy=fsdp "
                "does not split that network, too; choose strategy=ddp."
            )
        if algo.ratio_min > algo.ratio_max:
            raise ConfigError(
                f"algo.ratio_min={algo.ratio_min} is above "
                f"algo.ratio_max={algo.ratio_max}."
            )
        if BETAS[algo.divergence] is not None and algo.jeffreys_beta != 0:
            raise ConfigError(
                f"algo.jeffreys_beta={algo.jeffreys_beta} has no effect with "
                f"algo.divergence={algo.divergence}; choose algo.divergence=jeffreys."
            )

    # ---- both networks

    def networks(self) -> list[Network]:
        return [*super().networks(), self.aux]

    def parameter_groups(self) -> list[dict[str, Any]]:
        aux_lr = self.config.algo.aux_lr
        return [
            {"params": trained(self.backbone), "name": "generator"},
            {"params": trained(self.aux), "name": "auxiliary", "lr": aux_lr},
        ]

    def clipped_parameters(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())

    def averaged_parameters(self) -> Iterable[nn.Parameter]:
        return self.backbone.parameters()

    def make_ema(self) -> ExponentialMovingAverage:
        """Of theta, frozen weights included, as files of other algorithms have it."""
        decay = self.config.training.ema
        parameters = self.averaged_parameters()
        return ExponentialMovingAverage(
            parameters, decay, has_frozen=True, counts_before=True
        )

    def _clip(self, limit: float | None, algorithm: str | None) -> Tensor:
        """Clips gradients of theta alone; the norm is that of all."""
        auxiliary = total_norm(self.aux.parameters())
        return torch.hypot(super()._clip(limit, algorithm), auxiliary)

    def _are_weighed(self) -> bool:
        return False  # how much text a row holds does not matter

    # ---- weights

    def load_weights(self, checkpoint: Checkpoint, key: str) -> None:
        """Those of a DiMO model; or of a teacher, as which both networks begin.

        Of a teacher the EMA weights, if it has some and `algo.start_from_ema` is set.
        """
        is_start = key == "training.finetune_path"
        if not any(x.startswith("aux.") for x in checkpoint.weights or {}):
            if not is_start:
                rank_zero_warn(
                    f"{self._place(key)} is of a network that was not distilled; it is "
                    "taken for a generator as it is."
                )
            checkpoint = self._of_both(checkpoint, is_start, key)
        elif is_start:
            raise ConfigError(
                f"{self._place(key)} cannot be the teacher of "
                f"algo={self.config.algo.name}: it is a generator of one step; give "
                "its own teacher, a checkpoint of algo=mdlm."
            )
        else:
            self._check_initial(checkpoint, key)
        super().load_weights(checkpoint, key)
        self.steps_read = 0 if is_start else checkpoint.step or 0

    def _check_initial(self, checkpoint: Checkpoint, key: str) -> None:
        """Refuses a model whose samples start from other tokens, of which it has a
        table or needs one."""
        theirs, ours = checkpoint.setting("algo.init_tokens"), self.initial.kind
        if theirs not in (None, ours):
            raise ConfigError(
                f"{self._place(key)} was trained with algo.init_tokens={theirs}, not "
                f"{ours}: give algo.init_tokens={theirs}."
            )

    def _place(self, key: str) -> str:
        return f"{key}={OmegaConf.select(self.config, key)!r}"

    def _of_both(self, checkpoint: Checkpoint, is_start: bool, key: str) -> Checkpoint:
        """A checkpoint of one network as one of two networks like it."""
        use_ema = is_start and self.config.algo.start_from_ema and checkpoint.ema
        if is_start:
            self.refuse_other_kind(checkpoint, key)
        source = Teacher(self.backbone, self.config, use_ema=bool(use_ema))
        source.take_checkpoint(checkpoint, 0, self._place(key))
        weights = {
            f"{name}.{k}": x
            for name in ("backbone", "aux")
            for k, x in source.network.state_dict().items()
        }
        table = {f"initial.{k}": x for k, x in self.initial.state_dict().items()}
        if self.initial.kind == "unigram":
            table["initial.table"] = self._unigram(source.network)
        ema = None if is_start else checkpoint.ema
        return replace(checkpoint, weights=weights | table, ema=ema)

    @torch.no_grad()
    def _unigram(self, network: Network) -> Tensor:
        """Law of a token where a network sees masks alone, over all positions, (K,)."""
        xt = torch.full((1, self.num_tokens), self.mask_index, device=self.device)
        with self.through(network):
            hidden = self.hidden(xt, no_noise(xt))[0]
            sums = [
                self.denoised(self.logits_for_loss(part), xt=xt, sigma=no_noise(xt))
                .exp()
                .sum(dim=0)
                for part in hidden.split(self._chunk())
            ]
        return torch.stack(sums).sum(dim=0).float() / len(hidden)

    # ---- losses

    def distillation_loss(self, batch: Mapping[str, Tensor], batch_idx: int) -> Loss:
        """The sum of both; of each sequence, which counts as one token, |g|^2 / 2."""
        x0 = batch["input_ids"]
        if self.training:
            rows = self.row_indices(len(x0), batch_idx)
            before = self.global_step * self.config.loader.global_batch_size
            self.initial.remember(x0, [before + row for row in rows])
        drawn = self.run_generator(self.draws(x0, "generator", batch_idx))
        generator = self.generator_loss(drawn, batch_idx)
        if not self.config.algo.reuse_student_batch:
            with torch.no_grad():
                drawn = self.run_generator(self.draws(x0, "auxiliary", batch_idx))
        auxiliary = self.auxiliary_loss(drawn, batch_idx)
        entries = self._entries(x0.shape)
        nlls = generator.nll.sum(dim=-1) / entries
        return Loss(generator.total + auxiliary, nlls, torch.ones_like(nlls))

    def _entries(self, shape: torch.Size) -> int:
        """Of a sequence's logits, over which the mean goes; 1 of a sum."""
        is_mean = self.config.algo.loss_reduction == "mean"
        return shape[1] * (self.vocab_size - 1) if is_mean else 1

    def generator_loss(self, drawn: Drawn, batch_idx: int) -> TokenNLL:
        """|g|^2 / 2 of each masked token; the gradient of its logits is g / B."""
        shape = drawn.u.shape
        law = self.config.algo.mask_ratio_mode
        masks = self.masks(shape, "generator", law, batch_idx)
        xt = self.tokens(drawn, masks.others).masked_fill(masks.where, self.mask_index)
        weight = 1 / (len(xt) * self._entries(shape))
        return self.head_loss(
            drawn.hidden,
            self.token_surrogate,
            torch.full(shape, weight, device=xt.device),
            others=[self.judgement(x, xt) for x in (self.aux, self.teacher.network)],
            scored=masks.masked,
        )

    @torch.no_grad()
    def judgement(self, network: Network, xt: Tensor) -> Head:
        """Hidden states of a network in evaluation mode, with its head, in the
        precision of the run."""
        with self.through(network), evaluating(network):
            head = self._head(self.hidden(xt, no_noise(xt)))
            return head.detached().to(self.loss_precision().product)

    def token_surrogate(self, z: Tensor, z_psi: Tensor, z_phi: Tensor) -> Tensor:
        algo = self.config.algo
        z, z_psi, z_phi = (
            without_column(x, self.mask_index) for x in (z, z_psi, z_phi)
        )
        log_psi = (z_psi / algo.aux_temp).log_softmax(dim=-1)
        log_phi = (z_phi / algo.teacher_temp).log_softmax(dim=-1)
        return surrogate(z, jeffreys_gradient(log_psi, log_phi, self.beta))

    def auxiliary_loss(self, drawn: Drawn, batch_idx: int) -> Tensor:
        """Mean over masked tokens of samples, nats, with the gradient of psi."""
        shape, algo, x = drawn.u.shape, self.config.algo, self.tokens(drawn)
        masks = self.masks(shape, "auxiliary", algo.aux_mask_ratio_mode, batch_idx)
        xt = x.masked_fill(masks.where, self.mask_index)
        others = []
        if algo.aux_soft_weight:
            head = self._head(drawn.hidden).detached()
            others = [head.to(self.loss_precision().product)]
        with self.through(self.aux):
            loss = self.head_loss(
                self.hidden(xt, no_noise(xt)),
                self.token_auxiliary,
                torch.full(shape, masks.share, device=x.device),
                others=others,
                scored=masks.masked,
                x=x - (x > self.mask_index).long(),  # among the tokens but the mask
            )
        self._auxiliary_loss = loss.total.detach()
        if not self.training:
            counts = masks.where.sum(dim=-1)
            self.valid_auxiliary.update(loss.nll.sum(dim=-1), counts)
        return loss.total

    def token_auxiliary(self, z: Tensor, *generated: Tensor, x: Tensor) -> Tensor:
        algo = self.config.algo
        z = without_column(z, self.mask_index)
        log_psi = z.log_softmax(dim=-1)
        hard = smoothed_cross_entropy(log_psi, x, algo.aux_label_smoothing)
        if not generated:
            return hard
        target = without_column(generated[0], self.mask_index) / algo.gen_temp
        soft = soft_loss(z, target, algo.aux_temp)
        return algo.aux_soft_weight * soft + (1 - algo.aux_soft_weight) * hard

    # ---- validation and logs

    def nll(
        self,
        x0: Tensor,
        weights: Tensor | None = None,
        batch_idx: int = 0,
        labels: Tensor | None = None,
    ) -> TokenNLL:
        """The negative ELBO of the auxiliary model."""
        with self.through(self.aux):
            return super().nll(x0, weights, batch_idx, labels)

    def nll_given(self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]) -> Tensor:
        with self.through(self.aux):
            return super().nll_given(x0, known, strata)

    def regret_given(
        self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]
    ) -> Tensor:
        with self.through(self.aux):
            return super().regret_given(x0, known, strata)

    def train_results(self) -> dict[str, Tensor]:
        results = super().train_results()
        if self._auxiliary_loss is not None:
            results["trainer/auxiliary_loss"] = self._auxiliary_loss
        return results

    def on_validation_epoch_end(self) -> None:
        if self.teacher.is_there:
            loss = self.valid_auxiliary.compute()["nll"]
            self.log("val/auxiliary_loss", loss, sync_dist=True)
            self.valid_auxiliary.reset()
        super().on_validation_epoch_end()

    # ---- samples

    @contextmanager
    def refining(self) -> Iterator[None]:
        """Has the network of `sampling.refine_path` denoise, or the generator."""
        path = self.config.sampling.refine_path
        if not path:
            yield
            return
        if self._refiner is None:
            trusted = tuple(self.config.checkpointing.trusted_classes)
            checkpoint = read_checkpoint(path, "sampling.refine_path", trusted)
            self.refuse_other_kind(checkpoint, "sampling.refine_path")
            refiner = Teacher(self.backbone, self.config, use_ema=bool(checkpoint.ema))
            refiner.take_checkpoint(checkpoint, 0, self._place("sampling.refine_path"))
            self._refiner = refiner
        with self.through(self._refiner.network):
            yield


def trained(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not frozen."""
    return [p for p in network.parameters() if p.requires_grad]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, undone afterwards."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
