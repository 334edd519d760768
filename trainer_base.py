"""The life cycle of every algorithm under Lightning: training, validation, checkpoints,
samples. What it is made of is in `training/`, the diffusion skeleton in
`diffusion/base.py`, the objectives in `algo.py`.

Shapes: B batch, L length, K vocabulary, D hidden size.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from data.rows import REPEATED
from metrics.likelihood import Likelihood
from models.ema import ExponentialMovingAverage
from models.flops import Passes
from models.head import Loss, TokenNLL
from models.registry import build_backbone, check_abilities
from sampling.prompts import Given
from sampling.recording import Recorder
from sampling.registry import build_sampler, check_sampler
from sampling.reverse_process import Samples
from training.lightning_state import (
    is_last_update,
    is_logged,
    is_validating,
    is_validation_due,
)
from training.losses import HeadLosses
from training.optimization import Optimization
from training.randomness import Randomness, seed_all
from training.resume import Bookkeeping
from training.row_streams import NOISE_VERSION
from training.scorable import Scorable
from training.weights import Weights
from utils import ConfigError, require

# Keys of `training`: other ways to draw the times of a bound, of which masked diffusion
# knows.
ESTIMATORS = ("importance_sampling", "change_of_variables")
COUNTS = ("rows", "tokens")  # that a validation has measured


class TrainerBase(Weights, HeadLosses, Optimization, Randomness, Scorable):
    """Life cycle of every algorithm: optimiser, EMA, logging, validation, samples.

    A subclass gives `vocabulary` and `nll`. The class attributes below tell others
    what to expect of it.

    Args:
        config: The composed config.
        tokenizer: Supplies vocabulary size and special ids.

    Raises:
        ConfigError: If the config asks for what the algorithm does not have.
    """

    parameterization = "mean"  # what the network's output means
    is_autoregressive = False
    is_one_step = False  # whether one pass of the network makes a sample
    has_score = False
    has_mask = False
    has_leave_one_out = False  # whether x_theta is without the position's own token
    is_discrete_time = False  # whether algo.T > 0 has a meaning
    has_estimators = False  # whether those of `diffusion.estimators` have one
    has_blocks = False  # whether algo.block_size and training.time_range have one
    has_subs_masking = False  # whether algo.subs_masking=True has one
    needs_weights = False  # whether training starts from a checkpoint only
    takes_labels = False  # whether data.num_classes has a meaning
    bound = "val/"  # what begins the names of the likelihood that a validation finds
    loss_types: tuple[str, ...] = ("elbo",)  # values of algo.loss_type

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__()
        self.validate_config(config)
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size, self.mask_index = self.vocabulary(tokenizer)
        self.num_tokens: int = config.model.length
        self.num_classes: int | None = config.data.get("num_classes")
        self.backbone = build_backbone(config, self.vocab_size)
        if config.training.compile:
            self.backbone.compile_blocks()
        self.ema: ExponentialMovingAverage | None = None
        self.train_likelihood = Likelihood()
        self.valid_likelihood = Likelihood()
        # Of the last validation: nll (nats), bpd, ppl, their standard errors; rows and
        # tokens that were measured; the step.
        self.valid_results: dict[str, float] = {}
        self.sampler = build_sampler(config, type(self))
        self.validation_due = False  # whether one was cut off where a run went on
        self._validating = ExitStack()
        self._validated_step = -1
        self._logged_step = 0
        self._loss: Tensor | None = None  # of the last batch
        self._counted: list[tuple[Likelihood, Tensor]] = []  # before this batch

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        """Refuses, before any heavy work, what the algorithm cannot do."""
        algo = config.algo
        if algo.T < 0 or (algo.T > 0 and not cls.is_discrete_time):
            raise ConfigError(
                f"algo.T={algo.T}: algo={algo.name} has no discrete-time form; "
                "the only value is 0."
            )
        if algo.causal_attention != cls.is_autoregressive:
            raise ConfigError(
                f"algo.causal_attention={algo.causal_attention}: algo={algo.name} "
                f"needs {cls.is_autoregressive}."
            )
        if algo.time_conditioning and cls.is_autoregressive:
            raise ConfigError(
                f"algo.time_conditioning=True: algo={algo.name} has no time; "
                "the only value is False."
            )
        if algo.subs_masking and not cls.has_subs_masking:
            raise ConfigError(
                f"algo.subs_masking=True is for algo=d3pm, not {algo.name}; "
                "the only value is False."
            )
        for key in ESTIMATORS:
            if config.training.get(key) and not cls.has_estimators:
                raise ConfigError(
                    f"training.{key}=True: the loss of algo={algo.name} has no form "
                    "for it, which algo=mdlm has; the only value is False."
                )
        if algo.get("block_size") is not None and not cls.has_blocks:
            raise ConfigError(
                f"algo.block_size={algo.block_size}: algo={algo.name} has no blocks, "
                "which mdlm, sedd, d3pm and duo_base have; the only value is null."
            )
        time_range = config.training.get("time_range")
        if time_range is not None and not cls.has_blocks:
            raise ConfigError(
                f"training.time_range={time_range}: algo={algo.name} does not draw "
                "times from a range, as mdlm, sedd, d3pm and duo_base do; the only "
                "value is null."
            )
        num_classes = config.data.get("num_classes")
        if num_classes is not None and not cls.takes_labels:
            raise ConfigError(
                f"data.num_classes={num_classes}: algo={algo.name} has no "
                "classes; the only value is null."
            )
        require(algo.parameterization, [cls.parameterization], "algo.parameterization")
        loss_type = algo.get("loss_type", cls.loss_types[0])
        require(loss_type, cls.loss_types, "algo.loss_type")
        require(algo.compat, ("paper", "reference"), "algo.compat")
        precisions = ("bf16", "float32", "float64")
        require(config.training.loss_precision, precisions, "training.loss_precision")
        check_abilities(config, cls.needs_soft_inputs(config))
        check_sampler(config, cls)

    @classmethod
    def needs_soft_inputs(cls, config: DictConfig) -> bool:
        """Whether a run gives the network averages of embeddings, not ids alone."""
        return False

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        """How often a token goes through the network in a step of training.

        Raises:
            ConfigError: If that is not counted.
        """
        return Passes(trunk=1, head=1)

    @classmethod
    def as_published(cls) -> type["TrainerBase"]:
        """The class that `algo.compat=reference` means, by default this one."""
        return cls

    # ---- for subclasses

    @staticmethod
    def vocabulary(tokenizer: Any) -> tuple[int, int | None]:
        """The model's vocabulary size K and the mask's id (None without a mask)."""
        raise NotImplementedError

    def nll(
        self, x0: Tensor, weights: Tensor | None = None, batch_idx: int = 0
    ) -> TokenNLL:
        """Loss of each token of x0; AR leaves the first token out.

        Args:
            x0: Clean ids, (B, L).
            weights: Of each loss in the total, (B, L); None is 1.
            batch_idx: Position in the epoch, for what is drawn.
        """
        raise NotImplementedError

    def prior_sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Token ids from which sampling starts."""
        raise NotImplementedError

    def with_bos(self, given: Given) -> Given:
        """What samples are given, with the bos that every sample begins with."""
        raise NotImplementedError

    def valid_tokens(self, attention_mask: Tensor) -> Tensor:
        """Which positions of `nll` count, from the batch's mask (B, L)."""
        return attention_mask

    # ---- training

    def loss(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> Loss:
        """Loss of a batch of clean `input_ids` and `attention_mask`, each (B, L).

        A model with classes needs `labels`, too, (B,).
        """
        valid_tokens = self.valid_tokens(batch["attention_mask"])
        weights = Loss.weights(valid_tokens)
        nll = self.nll(
            batch["input_ids"], weights, batch_idx, **self.condition_of(batch)
        )
        return Loss.reduce(nll, valid_tokens)

    def condition_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `nll` is told of a batch beside its tokens: labels, if any."""
        return {} if self.num_classes is None else {"labels": batch["labels"]}

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.loss(batch, batch_idx)
        are_finite = losses.nlls.isfinite()  # one row would spoil the mean of all
        self.train_likelihood.update(
            losses.nlls.where(are_finite, 0), losses.num_tokens.where(are_finite, 0)
        )
        self._loss = losses.loss.detach()
        self.note_loss(self._loss)
        self.log("trainer/loss", self._loss, prog_bar=True, logger=False)
        return self.weighed(losses)

    def on_validation_batch_start(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._counted = []
        if REPEATED in batch:
            found = [x for x in self.modules() if isinstance(x, Likelihood)]
            self._counted = [(x, x.sums()) for x in found]

    def on_validation_batch_end(self, *args: Any, **options: Any) -> None:
        """Rows that count elsewhere do not count here."""
        for likelihood, sums in self._counted:
            likelihood.set_sums(sums[None], rank=0, world_size=1)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        losses = self.loss(batch, batch_idx)
        self.valid_likelihood.update(losses.nlls, losses.num_tokens)

    def log_training(self) -> None:
        """Logs the loss, and the likelihood over the batches since it was last logged.

        At once: what Lightning logs after a batch would come after its checkpoint.
        """
        step = self.global_step  # stands still while gradients accumulate
        is_due = is_logged(self.trainer, step) and step != self._logged_step
        if is_due and self._loss is not None:
            self._logged_step = step
            results = {"trainer/loss": self._loss, **self.train_results()}
            self.train_likelihood.reset()
            numbers = {name: float(x) for name, x in results.items()}
            for logger in self.loggers:
                logger.log_metrics(numbers | {"epoch": self.current_epoch}, step - 1)

    def train_results(self) -> dict[str, Tensor]:
        """What is logged of the training batches, after an update."""
        results = self.train_likelihood.compute()
        return {f"train/{k}": results[k] for k in ("nll", "bpd", "ppl")}

    def on_train_start(self) -> None:
        if self.ema is None and self.config.training.ema > 0:
            self.ema = self.make_ema()

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Dropout and whatever else draws from torch's, numpy's or Python's state."""
        position = (self.global_step, batch_idx, self.global_rank)
        seed_all(self.seed("train/global", *position))

    def is_done(self) -> bool:
        """Whether training ends with the updates so far, before `trainer.max_steps`."""
        return False

    # ---- what else of training is in a checkpoint; `Bookkeeping` asks for it

    def training_state(self) -> dict[str, Any]:
        """What a run that goes on needs beside weights, optimiser and position."""
        sums = self.train_likelihood.sums()
        ranks = [torch.empty_like(sums) for _ in range(self.trainer.world_size)]
        if len(ranks) > 1:
            torch.distributed.all_gather(ranks, sums)
        else:
            ranks = [sums]
        trainer = self.trainer
        # A longer run that goes on has none where this one ends by its number of steps.
        is_end = is_last_update(trainer) and self.global_step != trainer.max_steps
        is_due = is_validation_due(trainer) or is_validating(trainer) or is_end
        return {
            "noise": NOISE_VERSION,
            "validation_due": is_due and not self.is_validated,
            "logged_step": self._logged_step,
            "likelihood": torch.stack(ranks).cpu(),  # since the last log, (W, 6)
        }

    def take_up_needed(self, checkpoint: Checkpoint) -> None:
        """Reads what a run that goes on from a checkpoint needs from other files.

        Raises:
            ConfigError: If it cannot be read.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_weights_finite()
        super().on_save_checkpoint(checkpoint)

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        self.validation_due = state["validation_due"]
        self._logged_step = state["logged_step"]
        ranks = self.trainer.global_rank, self.trainer.world_size
        self.train_likelihood.set_sums(state["likelihood"], *ranks)

    # ---- validation and samples

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [Bookkeeping()]

    @property
    def is_validated(self) -> bool:
        """Whether there was a validation since the last update."""
        return self._validated_step == self.global_step

    def on_validation_epoch_start(self) -> None:
        self.check_updates(everything=True)
        self.valid_likelihood.reset()
        self._validating.enter_context(self.eval_weights())

    def on_validation_epoch_end(self) -> None:
        try:
            results = self.valid_likelihood.compute()
            numbers = {k: x for k, x in results.items() if k not in COUNTS}
            logged = {f"{self.bound}{name}": x for name, x in numbers.items()}
            self.log_dict(logged, sync_dist=True)
        finally:
            self.leave_validation()  # before callbacks write checkpoints
        is_finite = self.check_validation(float(results["nll"]))
        if self.trainer.sanity_checking:
            return  # a few batches of an untrained model are no result
        if is_finite:
            self.valid_results = {
                **{name: float(x) for name, x in numbers.items()},
                **{name: int(results[name]) for name in COUNTS},
                "step": self.global_step,
            }
        self._validated_step = self.global_step
        self.validation_due = False

    def leave_validation(self) -> None:
        """Raw weights are back, if those of the validation were in their place."""
        self._validating.close()

    def generate_samples(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        given: Given | None = None,
        show_progress: bool = False,
        labels: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> Samples:
        """Draws samples with the configured sampler; see `sampling.sampler.Sampler`."""
        with self.autocast(), self.whole_weights():
            return self.sampler(
                self,
                num_samples,
                num_steps=num_steps,
                given=given,
                generator=generator,
                show_progress=show_progress,
                labels=labels,
                recorder=recorder,
            )
