"""`mode=fid_eval`: images of a checkpoint beside the training set, batch by batch, over
devices: FID, Inception Score, one npz of all images, a picture of some.

Shapes: N images, H = W pixels of a side, L = 3 H W tokens, d features, k classes.
"""

import logging
import math
import time
from contextlib import nullcontext
from functools import reduce
from operator import add
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from checkpoints.reading import read_evaluated
from cli.paths import refuse_finished
from cli.settle import prepare
from data.images import ImageRows
from data.tokenizers import get_tokenizer
from dataloader import DataModule
from evaluation.extractor import Named, read_extractor
from evaluation.image_file import (
    Arrays,
    ImageFile,
    RealSums,
    settings_of,
    write_arrays,
)
from evaluation.records import check_path, images_record, origin
from evaluation.samples import draw_all
from metrics.fid import FeatureSums, check_finite, frechet_distance, inception_score
from metrics.inception import tried
from report.console import report_images
from report.grid import write_grid
from sampling.classes import classes_of, labels_at
from trainer_base import TrainerBase
from training.holding import holding
from training.processes import is_first
from utils import write_json

log = logging.getLogger(__name__)

AT_A_TIME = 64  # images that the extractor sees


def fid_eval(config: DictConfig) -> dict[str, Any] | None:
    """Draws images from a checkpoint and compares them with the training set.

    Returns:
        The record's numbers on the first rank, None on the others.
    """
    algorithm = prepare(config)
    key = "eval.generated_samples_path"
    for one in (key, "eval.results_path"):
        check_path(config.eval[one.removeprefix("eval.")], one)
    path, is_one = config.eval.generated_samples_path, is_first(config)
    with holding(path, key, is_file=True) if is_one else nullcontext():
        return _fid_eval(config, algorithm)


def _fid_eval(
    config: DictConfig, algorithm: type[TrainerBase]
) -> dict[str, Any] | None:
    started = time.monotonic()
    path, batch_size = config.eval.generated_samples_path, config.loader.eval_batch_size
    refuse_finished(path)
    extractor = read_extractor(config.eval.fid_features)
    checkpoint = read_evaluated(config)
    tokenizer = get_tokenizer(config)
    model = algorithm(config, tokenizer)
    model.load_weights(checkpoint, "eval.checkpoint_path")
    data = DataModule(config, tokenizer, model.mask_index)
    rows = cast(ImageRows, data.load("train"))
    tried(extractor.network, tokenizer.batch_decode(ids_of(rows, 0, 2)))
    mark = rows.mark()
    num_images = config.eval.fid_num_images or len(rows)
    settings = settings_of(config, num_images, mark)
    file = ImageFile(path, settings, math.ceil(num_images / batch_size))
    if num_done := file.check():
        log.info("going on with %s: %d batches are there", path, num_done)
    key = {"extractor": extractor.sha256, "rows": mark}
    sums = RealSums(config.data.cache_dir, key)
    size = {"loader.eval_batch_size": batch_size}
    real = ImageFile(f"{path}.real", key | size, math.ceil(len(rows) / batch_size))
    measuring = Measuring(model, extractor, file, real, rows, num_images)
    measuring.has_real = sums.read() is not None
    draw_all(model, measuring, file, real)
    about = origin(config, checkpoint, model.ema is not None)
    return finish(measuring, sums, about, started)


class Measuring(lightning.LightningModule):
    """Draws images and makes their features, and those of the real images, each rank
    its share; keeps both batch by batch.

    Args:
        model: With its weights, in evaluation mode.
        extractor: On the CPU.
        file: Where generated batches go.
        real: Where real batches go.
        rows: The real images, which say the classes of the generated ones.
        num_images: To be generated, N.
    """

    def __init__(
        self,
        model: TrainerBase,
        extractor: Named,
        file: ImageFile,
        real: ImageFile,
        rows: ImageRows,
        num_images: int,
    ) -> None:
        super().__init__()
        # Fewer batches than ranks, or what an interruption left of them.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self.extractor = extractor  # no module of this one, whose precision it keeps
        self.file = file
        self.real = real
        self.rows = rows
        self.num_images = num_images
        self.batch_size: int = model.config.loader.eval_batch_size
        self.has_real = False  # whether the moments of the real ones are known

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches that are not there yet: first real ones, which are
        numbered from 0, then generated ones.

        Which is whose depends on the numbers alone: another process may fill the cache
        of the real ones between the looks of two ranks.
        """
        num_real = self.real.num_batches
        there = {num_real + index for index in self.file.done()}
        there |= set(range(num_real)) if self.has_real else self.real.done()
        total, rank = num_real + self.file.num_batches, self.global_rank
        mine = range(rank, total, self.trainer.world_size)
        indices = sorted(set(mine) - there)
        # A list has what torch asks of a dataset, but not its base class.
        return DataLoader(cast("Dataset[int]", indices), batch_size=None)

    def on_predict_start(self) -> None:
        self.extractor.network.to(self.device)

    def predict_step(self, number: int) -> int:
        index = int(number) - self.real.num_batches
        if index < 0:
            self.real.add(int(number), self.measure(int(number)))
        else:
            self.file.add(index, self.draw(index))
        return number

    def labels(self, first: int, count: int) -> Tensor | None:
        """Classes of the images `first`, `first` + 1, ..., (count,); None without."""
        classes = classes_of(self.model.config, self.rows.labels)
        return labels_at(classes, first, count)

    def measure(self, index: int) -> Arrays:
        """Features of a batch of real images, as they are: without flips."""
        first = index * self.batch_size
        ids = ids_of(self.rows, first, first + self.batch_size)
        features, _ = self.extract(self.model.tokenizer.batch_decode(ids))
        return {"features": features}

    def draw(self, index: int) -> Arrays:
        """A batch of generated images, whose draws depend on its number alone."""
        model, start = self.model, time.perf_counter()
        first = index * self.batch_size
        count = min(self.batch_size, self.num_images - first)
        labels = self.labels(first, count)
        samples = model.generate_samples(
            count,
            model.generator("fid_eval", index),
            labels=labels,
            show_progress=self.global_rank == 0,
        )
        images = model.tokenizer.batch_decode(samples.tokens.cpu())
        seconds = time.perf_counter() - start
        features, logits = self.extract(images)
        batch = {
            "images": images.permute(0, 2, 3, 1).numpy(),
            "features": features,
            "evaluations": samples.evaluations.cpu().numpy(),
            "seconds": np.array(seconds),
        }
        if logits is not None:
            batch["logits"] = logits
        if labels is not None:
            batch["labels"] = labels.numpy()
        return batch

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and logits of images (n, 3, H, W), in full precision."""
        outputs = []
        with torch.autocast(self.device.type, enabled=False):
            for part in images.split(AT_A_TIME):
                outputs.append(self.extractor.network(part.to(self.device)))
        found, scores = zip(*outputs, strict=True)
        features = torch.cat(found).float().cpu()
        check_finite(features, "features")
        if scores[0] is None:
            return features.numpy(), None
        logits = torch.cat(scores).float().cpu()
        check_finite(logits, "logits")
        return features.numpy(), logits.numpy()


@rank_zero_only
def finish(
    measuring: Measuring,
    cache: RealSums,
    about: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """The scores; the npz, the picture and the record on disk, and a table of it.

    Args:
        measuring: With its batches.
        cache: Of the real images.
        about: The checkpoint, from `origin`.
        started: When, by the monotonic clock.
    """
    file, real, config = measuring.file, measuring.real, measuring.model.config
    file.check_all()
    sums = cache.read()
    if sums is None:
        real.check_all()
        sums = sums_of(real)
        cache.write(sums)
    arrays = [
        {name: x for name, x in batch.items() if name != "features"}
        for batch in file.batches()
    ]
    results: dict[str, Any] = {
        "fid": frechet_distance(sums, sums_of(file)),
        "inception_score": None,
        "inception_score_std": None,
    }
    whole = {
        name: np.concatenate([batch[name] for batch in arrays])
        for name in arrays[0]
        if name != "seconds"
    }
    logits = whole.pop("logits", None)
    if logits is not None:
        order = torch.randperm(
            len(logits), generator=torch.Generator().manual_seed(config.seed)
        )
        score = inception_score(torch.from_numpy(logits), order)
        results |= zip(("inception_score", "inception_score_std"), score, strict=True)
    evaluations = whole.pop("evaluations")
    results |= {
        "num_images": len(whole["images"]),
        "num_real": sums.count,
        "num_features": len(sums.total),
        "evaluations": float(evaluations.mean()),
        "sampling_seconds": sum(float(batch["seconds"]) for batch in arrays),
    }
    picture = f"{file.path.removesuffix('.npz')}.png"
    write_arrays(file.path, whole)
    names = measuring.rows.class_names
    write_grid(picture, whole["images"], whole.get("labels"), names)
    of_extractor = {
        name: x
        for name, x in measuring.extractor._asdict().items()
        if name != "network"
    }
    record = images_record(
        config,
        results
        | {"seconds": time.monotonic() - started, "images": file.path}
        | {"picture": picture},
        of_extractor,
        measuring.trainer.world_size,
        about,
    )
    write_json(config.eval.results_path, record)
    file.close()
    real.close()
    report_images(record, config.eval.results_path)
    return results


def ids_of(rows: ImageRows, start: int, stop: int) -> Tensor:
    """Ids of the images start .. stop - 1, as far as there are some, (n, L)."""
    return torch.from_numpy(np.array(rows.ids[start:stop]).astype(np.int64))


def sums_of(file: ImageFile) -> FeatureSums:
    """Of all images of a file, added up in the order of its batches: the same numbers,
    whoever has made them."""
    features = (torch.from_numpy(batch["features"]) for batch in file.batches())
    return reduce(add, map(FeatureSums.of, features))
