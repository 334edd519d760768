"""Samples on the way: what a validation during training writes and logs of them."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metrics.judge import GenerativePerplexity
from metrics.registry import METRICS, measure
from metrics.samples import sample_entropy
from sampling.classes import classes_of, labels_at
from sampling.reverse_process import Samples
from utils import NotFinite, write_json

log = logging.getLogger(__name__)


class Sampled(Protocol):
    """What is asked of the model, which every algorithm has."""

    config: DictConfig
    tokenizer: Any
    validation_due: bool

    @property
    def global_step(self) -> int: ...

    @property
    def global_rank(self) -> int: ...

    def generator(self, purpose: str, *position: int) -> torch.Generator: ...

    def generate_samples(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Samples: ...

    def answer(self, step: int, what: str) -> None: ...

    def log_dict(
        self, dictionary: Mapping[str, Tensor], *, sync_dist: bool = False
    ) -> None: ...


class SampleLogging(lightning.Callback):
    """Draws samples at the end of a validation of a run that trains.

    They go to samples/step_N.json of `checkpointing.save_dir` and to loggers that have
    tables; their entropy, and their generative perplexity where there is a judge, are
    logged as val/sample_entropy (nats) and val/gen_ppl. Images are a picture,
    samples/step_N.png; with guidance they are of the classes of `sampling.labels`.

    Args:
        judge: Scores samples, or None.
        write_picture: Writes images (N, H, W, 3) of bytes to a path, and their classes,
            (N,) or None.
    """

    def __init__(
        self,
        judge: GenerativePerplexity | None = None,
        write_picture: Callable[[str, np.ndarray, np.ndarray | None], object]
        | None = None,
    ) -> None:
        self.judge = judge
        self.write_picture = write_picture
        self.texts: list[str] = []  # of the last validation

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        """With the weights of the validation still in place."""
        model = cast(Sampled, module)
        if not self._are_wanted(trainer, model):
            return
        try:
            drawn = self._draw(trainer, model)
        except NotFinite:
            drawn = None
        if not trainer.strategy.reduce_boolean_decision(drawn is not None):
            model.answer(model.global_step, "logits of samples are not finite")
        if drawn is None:
            return
        samples, labels, results = drawn
        model.log_dict({f"val/{k}": x for k, x in results.items()}, sync_dist=True)
        texts = [x for x in samples if isinstance(x, str)]
        if not trainer.sanity_checking:
            self.texts = texts
        numbers = {k: float(x) for k, x in results.items()}
        images = [x for x in samples if isinstance(x, Tensor)]
        if images:
            pixels = torch.stack(images).permute(0, 2, 3, 1).cpu().numpy()
            self._save_images(trainer, model, pixels, labels, numbers)
        else:
            self._save(trainer, model, texts, numbers)

    def _draw(
        self, trainer: lightning.Trainer, model: Sampled
    ) -> tuple[list[str | Tensor], np.ndarray | None, dict[str, Tensor]]:
        """Samples as texts or as images (3, H, W) of bytes, their classes (N,) if they
        are of some, and their numbers."""
        config, samples, entropies = model.config, [], []
        batch_size = config.loader.eval_batch_size
        is_of_data = config.sampling.labels == "data"
        data = cast(Any, trainer).datamodule
        classes = classes_of(config, data.load("train").labels if is_of_data else None)
        told: list[np.ndarray] = []
        measured: list[dict[str, list[float]]] = []
        for index in range(config.sampling.num_sample_batches):
            position = (model.global_step, index, model.global_rank)
            number = index * trainer.world_size + model.global_rank
            labels = labels_at(classes, number * batch_size, batch_size)
            x = model.generate_samples(
                batch_size, model.generator("samples", *position), labels=labels
            )
            rows = x.up_to_end(x.tokens)
            samples += list(model.tokenizer.batch_decode(rows))
            entropies.append(sample_entropy(rows))
            measured.append(measure(x.tokens, samples[-batch_size:]))
            told += [] if labels is None else [labels.numpy()]
        results = {"sample_entropy": torch.cat(entropies).mean()}
        for name in METRICS:
            values = [x for batch in measured for x in batch[name]]
            results[f"sample_{name}"] = torch.tensor(values).mean()
        if self.judge is not None:
            texts = [text for text in samples if isinstance(text, str)]
            results["gen_ppl"] = torch.tensor(self._judged(texts))
        return samples, np.concatenate(told) if told else None, results

    def _judged(self, texts: list[str]) -> float:
        """NaN where the judge has no number; that says nothing against the model."""
        try:
            ppl = None if self.judge is None else self.judge(texts)
        except NotFinite as error:
            log.warning("%s", error)
            ppl = None
        return float("nan") if ppl is None else ppl

    @staticmethod
    def _are_wanted(trainer: lightning.Trainer, model: Sampled) -> bool:
        config = model.config
        is_training = trainer.state.fn == "fit" or model.validation_due
        is_skipped = trainer.sanity_checking and not (
            config.eval.compute_perplexity_on_sanity
        )
        wanted = (
            config.eval.generate_samples or config.eval.compute_generative_perplexity
        )
        num_batches = config.sampling.num_sample_batches
        return bool(is_training and not is_skipped and wanted and num_batches)

    @rank_zero_only
    def _save_images(
        self,
        trainer: lightning.Trainer,
        model: Sampled,
        images: np.ndarray,
        labels: np.ndarray | None,
        numbers: dict[str, float],
    ) -> None:
        """Images (N, H, W, 3) of bytes as a picture, by their classes (N,) if any."""
        path = f"{model.config.checkpointing.save_dir}/samples/step_{model.global_step}"
        said = {"num_images": len(images), "sampling": _told(model.config)}
        write_json(f"{path}.json", numbers | said)
        if self.write_picture is not None:
            self.write_picture(f"{path}.png", images, labels)
        shown = list(images[: model.config.sampling.num_sample_log])
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # wandb
                logger.log_image(f"samples@global_step{model.global_step}", shown)

    @rank_zero_only
    def _save(
        self,
        trainer: lightning.Trainer,
        model: Sampled,
        texts: list[str],
        numbers: dict[str, float],
    ) -> None:
        config, step = model.config, model.global_step
        path = f"{config.checkpointing.save_dir}/samples/step_{step}.json"
        said = {"generated_seqs": texts, "sampling": _told(config)}
        write_json(path, numbers | said)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # wandb
                shown = [[x] for x in texts[: config.sampling.num_sample_log]]
                logger.log_table(
                    f"samples@global_step{step}",
                    columns=["Generated Samples"],
                    data=shown,
                )


def _told(config: DictConfig) -> Any:
    """What the sampler was told, as the file of its samples says it."""
    return OmegaConf.to_container(config.sampling, resolve=True)
