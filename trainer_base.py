"""The life cycle of every algorithm under Lightning: optimiser, EMA, randomness,
logging, validation, samples, checkpoints. The diffusion skeleton is in
`diffusion/base.py`, the objectives in `algo.py`.

Shapes: B batch, L length, K vocabulary, D hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import hydra
import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from metrics.judge import GenerativePerplexity
from metrics.likelihood import Likelihood
from metrics.samples import sample_entropy
from models.device import wide_dtype
from models.ema import ExponentialMovingAverage
from models.head import (
    Head,
    Loss,
    Precision,
    TokenLoss,
    TokenNLL,
    chunk_size,
    head_loss,
    is_compiled,
    logits_of,
)
from models.registry import build_backbone
from sampling.prompts import Given
from sampling.registry import build_sampler
from sampling.reverse_process import Samples
from training.randomness import seed_all
from training.resume import Bookkeeping, is_validation_due
from training.scorable import Stratum
from training.weights import Weights
from utils import ConfigError, require, write_json


class TrainerBase(Weights):
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
    has_score = False
    has_mask = False
    is_discrete_time = False  # whether algo.T > 0 has a meaning
    has_subs_masking = False  # whether algo.subs_masking=True has one
    needs_weights = False  # whether training starts from a checkpoint only
    loss_types: tuple[str, ...] = ("elbo",)  # values of algo.loss_type

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__()
        self.validate_config(config)
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size, self.mask_index = self.vocabulary(tokenizer)
        self.num_tokens: int = config.model.length
        self.backbone = build_backbone(config, self.vocab_size)
        if config.training.compile:
            self.backbone.compile_blocks()
        self.ema: ExponentialMovingAverage | None = None
        self.train_likelihood = Likelihood()
        self.valid_likelihood = Likelihood()
        self.valid_results: dict[str, float] = {}
        self.valid_texts: list[str] = []
        self.judge: GenerativePerplexity | None = None
        self.sampler = build_sampler(config, type(self))
        self.validation_due = False  # whether one was cut off where a run went on
        self._validating = ExitStack()
        self._validated_step = -1
        self._logged_step = 0
        self._loss: Tensor | None = None  # of the last batch

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
        require(algo.parameterization, [cls.parameterization], "algo.parameterization")
        loss_type = algo.get("loss_type", cls.loss_types[0])
        require(loss_type, cls.loss_types, "algo.loss_type")
        require(algo.compat, ("paper", "reference"), "algo.compat")
        precisions = ("bf16", "float32", "float64")
        require(config.training.loss_precision, precisions, "training.loss_precision")
        build_sampler(config, cls)

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

    def nll_given(self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]) -> Tensor:
        """-log p of unknown tokens given the known ones of their row, nats, (B, L).

        Exact, or one draw of an upper bound, whose sum over a row is what counts; 0 at
        known tokens. A row's numbers do not depend on the other rows.

        Args:
            x0: Clean ids, (B, L), of any L up to `model.length`.
            known: (B, L) bool, on the host; the first token of each row is.
            strata: Draw of each row; an exact likelihood needs none.
        """
        raise NotImplementedError

    def regret_given(
        self, x0: Tensor, known: Tensor, strata: Sequence[Stratum]
    ) -> Tensor:
        """max_y log p(y) - log p(x_0) of unknown tokens, nats, (B, L).

        0 where the token is the model's first choice, and at known tokens. AR: given
        all tokens to the left of it. Diffusion: at t = 1, where the known tokens are
        clean and all others noise, in one evaluation of the network.

        Args:
            x0, known: As for `nll_given`.
            strata: For the noise of each row.
        """
        raise NotImplementedError

    def prior_sample(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Token ids from which sampling starts."""
        raise NotImplementedError

    def valid_tokens(self, attention_mask: Tensor) -> Tensor:
        """Which positions of `nll` count, from the batch's mask (B, L)."""
        return attention_mask

    # ---- loss

    def loss(self, batch: Mapping[str, Tensor], batch_idx: int = 0) -> Loss:
        """Loss of a batch of clean `input_ids` and `attention_mask`, each (B, L)."""
        valid_tokens = self.valid_tokens(batch["attention_mask"])
        weights = Loss.weights(valid_tokens)
        return Loss.reduce(
            self.nll(batch["input_ids"], weights, batch_idx), valid_tokens
        )

    def head_loss(
        self,
        hidden: Tensor,
        token_loss: TokenLoss,
        weights: Tensor | None,
        *,
        others: Sequence[Head] = (),
        scored: Tensor | None = None,
        **inputs: Tensor,
    ) -> TokenNLL:
        """Losses of tokens from their hidden states, a chunk at a time.

        Args:
            hidden: (B, L, D).
            token_loss: From logits (n, K), one of each head, and `inputs`, (n,) each,
                to losses (n,).
            weights: As for `nll`.
            others: Further heads, with hidden states (B, L, D), in their own precision.
            scored: Flat positions to score, (N,); the others lose 0. None is all.
            inputs: (B, L) or (B, 1) each.
        """
        shape, device = hidden.shape[:2], hidden.device
        if weights is None:
            weights = torch.ones(shape, device=device)

        def rows(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return x if scored is None else x.index_select(0, scored)

        training = self.config.training
        heads = [self._head(hidden), *others]
        precision = self.loss_precision()
        total, nll = head_loss(
            [head._replace(hidden=rows(head.hidden)) for head in heads],
            token_loss,
            {name: rows(x.expand(shape)) for name, x in inputs.items()},
            rows(weights),
            precision=precision,
            products=[precision.product, *(head.weight.dtype for head in others)],
            chunk=chunk_size(training.loss_chunk, self.vocab_size, device.type),
            compiled=is_compiled(training.loss_compile, device.type),
        )
        if scored is not None:
            nll = nll.new_zeros(shape.numel()).index_copy(0, scored, nll)
        return TokenNLL(total, nll.unflatten(0, shape))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.loss(batch, batch_idx)
        self.train_likelihood.update(losses.nlls, losses.num_tokens)
        self._loss = losses.loss.detach()
        self.log("trainer/loss", self._loss, prog_bar=True, logger=False)
        return losses.loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        losses = self.loss(batch, batch_idx)
        self.valid_likelihood.update(losses.nlls, losses.num_tokens)

    def log_training(self) -> None:
        """Logs the loss, and the likelihood over the batches since it was last logged.

        At once: what Lightning logs after a batch would come after its checkpoint.
        """
        step = self.global_step  # stands still while gradients accumulate
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
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

    # ---- randomness: a pure function of the seed and the position in the run

    def seed(self, purpose: str, *position: int) -> int:
        """A seed that depends on the run's, on `purpose` and `position` only."""
        entropy = [self.config.seed, *purpose.encode(), *position]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        return seed % 2**63

    def generator(
        self, purpose: str, *position: int, device: torch.device | str | None = None
    ) -> torch.Generator:
        """A generator with that seed."""
        generator = torch.Generator(device or self.device)
        return generator.manual_seed(self.seed(purpose, *position))

    def _batch_generator(
        self, purpose: str, batch_idx: int, device: torch.device | str | None = None
    ) -> torch.Generator:
        """Draws for one batch of one rank. Those of validation do not depend on the
        step, so that every validation of a run sees the same noise."""
        if self.training:
            position = (self.global_step, batch_idx, self.global_rank)
            return self.generator(f"train/{purpose}", *position, device=device)
        position = (batch_idx, self.global_rank)
        return self.generator(f"valid/{purpose}", *position, device=device)

    def on_train_start(self) -> None:
        if self.ema is None and self.config.training.ema > 0:
            self.ema = self.make_ema()
        if self.validation_due:
            loop = self.trainer.fit_loop.epoch_loop.val_loop
            loop.restarting = False  # from its first batch
            self.trainer.validating = True
            loop.run()
            self.trainer.training = True

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Dropout and whatever else draws from torch's, numpy's or Python's state."""
        position = (self.global_step, batch_idx, self.global_rank)
        seed_all(self.seed("train/global", *position))

    # ---- optimiser and EMA

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters, in one kernel.

        With float16 gradients Lightning unscales and clips them between backward and
        step, which a fused optimiser does not allow.
        """
        optim = self.config.optim
        return torch.optim.AdamW(
            self.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=str(self.config.trainer.precision) not in ("16", "16-mixed"),
        )

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer()
        scheduler = hydra.utils.instantiate(
            self.config.lr_scheduler, optimizer=optimizer
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step",
                "name": "trainer/lr",
            },
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the total norm; sharded gradients need their own wrapper's method.

        Not through Lightning, which refuses to clip for a fused optimiser under any
        mixed precision, although only float16 gradients are scaled.
        """
        if not gradient_clip_val:
            return
        sharded = getattr(self.trainer.model, "clip_grad_norm_", None)
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif sharded is not None:
            sharded(gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    # ---- what else of training is in a checkpoint; `Bookkeeping` asks for it

    def training_state(self) -> dict[str, Any]:
        """What a run that goes on needs beside weights, optimiser and position."""
        is_validated = self._validated_step == self.global_step
        sums = self.train_likelihood.sums()
        ranks = [torch.empty_like(sums) for _ in range(self.trainer.world_size)]
        if len(ranks) > 1:
            torch.distributed.all_gather(ranks, sums)
        else:
            ranks = [sums]
        return {
            "validation_due": is_validation_due(self.trainer) and not is_validated,
            "logged_step": self._logged_step,
            "likelihood": torch.stack(ranks).cpu(),  # since the last log, (W, 6)
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        self.validation_due = state["validation_due"]
        self._logged_step = state["logged_step"]
        ranks = self.trainer.global_rank, self.trainer.world_size
        self.train_likelihood.set_sums(state["likelihood"], *ranks)

    # ---- validation and samples

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [Bookkeeping()]

    def on_validation_epoch_start(self) -> None:
        self.valid_likelihood.reset()
        self._validating.enter_context(self.eval_weights())

    def on_validation_epoch_end(self) -> None:
        try:
            results = self.valid_likelihood.compute()
            self.valid_results = {name: float(x) for name, x in results.items()}
            results = {f"val/{name}": x for name, x in results.items()}
            self.log_dict(results, sync_dist=True)
            self._log_samples()
        finally:
            self.leave_validation()  # before callbacks write checkpoints
        self._validated_step = self.global_step
        self.validation_due = False

    def leave_validation(self) -> None:
        """Raw weights are back, if those of the validation were in their place."""
        self._validating.close()

    def _log_samples(self) -> None:
        """Samples of a validation during training: a file, and the loggers."""
        config, trainer = self.config, self.trainer
        wanted = config.eval.generate_samples or (
            config.eval.compute_generative_perplexity
        )
        skipped = trainer.sanity_checking and not (
            config.eval.compute_perplexity_on_sanity
        )
        num_batches = config.sampling.num_sample_batches
        is_training = trainer.state.fn == "fit" or self.validation_due
        if not is_training or skipped or not wanted or not num_batches:
            return
        texts, entropies = [], []
        for index in range(num_batches):
            position = (self.global_step, index, self.global_rank)
            x = self.generate_samples(
                config.loader.eval_batch_size, self.generator("samples", *position)
            )
            texts += self.tokenizer.batch_decode(x.tokens)
            entropies.append(sample_entropy(x.tokens))
        results = {"sample_entropy": torch.cat(entropies).mean()}
        if self.judge is not None:
            results["gen_ppl"] = torch.tensor(self.judge(texts) or float("nan"))
        self.log_dict({f"val/{k}": x for k, x in results.items()}, sync_dist=True)
        self.valid_texts = texts
        self._save_samples(texts, {k: float(x) for k, x in results.items()})

    @rank_zero_only
    def _save_samples(self, texts: list[str], numbers: dict[str, float]) -> None:
        config, step = self.config, self.global_step
        path = f"{config.checkpointing.save_dir}/samples/step_{step}.json"
        write_json(path, numbers | {"generated_seqs": texts})
        for logger in self.loggers:
            if hasattr(logger, "log_table"):  # wandb
                shown = [[text] for text in texts[: config.sampling.num_sample_log]]
                logger.log_table(
                    f"samples@global_step{step}",
                    columns=["Generated Samples"],
                    data=shown,
                )

    def generate_samples(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        given: Given | None = None,
        show_progress: bool = False,
    ) -> Samples:
        """Draws samples with the configured sampler; see `samplers.Sampler`."""
        with self.autocast(), self.whole_weights():
            return self.sampler(
                self,
                num_samples,
                num_steps=num_steps,
                given=given,
                generator=generator,
                show_progress=show_progress,
            )

    def autocast(self) -> torch.autocast:
        """The precision of `trainer.precision`, also outside of a Lightning trainer."""
        half = {"bf16": torch.bfloat16, "16": torch.float16}
        dtype = half.get(str(self.config.trainer.precision).removesuffix("-mixed"))
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def logits_for_loss(self, hidden: Tensor) -> Tensor:
        """The head in the precision that `training.loss_precision` asks for."""
        return logits_of(self._head(hidden), self.loss_precision())

    def _head(self, hidden: Tensor) -> Head:
        linear = self.backbone.output_embedding
        return Head(hidden, linear.weight, linear.bias)

    def loss_precision(self) -> Precision:
        weight = self.backbone.output_embedding.weight
        return Precision.of(
            self.config.training.loss_precision, weight, wide_dtype(weight.device)
        )
