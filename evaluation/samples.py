"""`mode=sample_eval`: samples of a checkpoint, batch by batch, over devices, judged and
kept in a JSON (`sample_file.py`).
"""

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from checkpoints.reading import read_evaluated
from cli.modality import is_image
from cli.paths import refuse_finished
from cli.settle import prepare
from data.files import find_files, read_texts
from data.images import ImageRows
from data.readers import Files
from data.tokenizers import get_tokenizer
from dataloader import DataModule
from evaluation.held_out import held_out
from evaluation.image_file import write_arrays
from evaluation.parts import Parts
from evaluation.records import origin, samples_record
from evaluation.sample_file import DISTINCT, SampleFile, settings_of, summarise
from evaluation.trajectories import check_size, save_trajectories
from metrics.judge import GenerativePerplexity, mauve_score, require_mauve
from metrics.ngrams import NGramModel
from metrics.registry import measure
from metrics.samples import distinct_n, sample_entropy
from models.device import device_of
from report.console import report_lines, report_samples, report_sampling
from report.grid import write_grid
from sampling.classes import classes_of, labels_at
from sampling.prompts import Prompt, given_tokens, read_prompts
from sampling.recording import Recorder
from sampling.registry import build_sampler
from sampling.trajectory import packed, unpacked
from trainer_base import TrainerBase
from training.holding import holding
from training.processes import is_first
from training.trainer import build_trainer
from utils import ConfigError, RunStopped, stopped_by

log = logging.getLogger(__name__)


def sample_eval(config: DictConfig) -> dict[str, Any] | None:
    """Draws samples from a checkpoint, judges them, writes them as JSON.

    Returns:
        The JSON's numbers on the first rank, None on the others.
    """
    algorithm = prepare(config)
    key = "eval.generated_samples_path"
    path = config.eval.generated_samples_path
    is_one = is_first(config)
    with holding(path, key, is_file=True) if is_one else nullcontext():
        return _sample_eval(config, algorithm)


def _sample_eval(
    config: DictConfig, algorithm: type[TrainerBase]
) -> dict[str, Any] | None:
    order = config.eval.ngram_order
    refuse_finished(config.eval.generated_samples_path)
    tokenizer = get_tokenizer(config)
    classes = classes_of(config, _classes_of_data(config, tokenizer))
    settings = settings_of(config, classes)
    if config.sampling.save_trajectory is not None:
        check_size(
            config.loader.eval_batch_size * config.sampling.num_sample_batches,
            build_sampler(config, algorithm).length(config.model.length),
            "loader.eval_batch_size or sampling.num_sample_batches",
        )
    file = SampleFile(config.eval.generated_samples_path, settings)
    if num_done := file.check():
        log.info("going on with %s: %d batches are there", file.path, num_done)
    checkpoint = read_evaluated(config)
    references = mauve_references(config)
    judge = load_judge(config, algorithm)
    model = algorithm(config, tokenizer)
    model.load_weights(checkpoint, "eval.checkpoint_path")
    prompts = read_prompts(config, tokenizer, model.sampler.length(model.num_tokens))
    data = DataModule(config, tokenizer, model.mask_index)
    ngrams = None
    if order:
        ngrams = NGramModel(data.load("train").ids, order, model.vocab_size)
    about: dict[str, Any] = {}
    if config.eval.held_out:
        about["held_out"] = held_out(data.load("valid"), ngrams)
    drawing = Drawing(model, file, judge, prompts, ngrams, classes)
    draw_all(model, drawing, file)
    draws = model.sampler.draw_dtype(device_of(config))
    of_checkpoint = origin(config, checkpoint, model.ema is not None)
    about |= samples_record(config, draws, of_checkpoint)
    return finish_samples(drawing, references, about)


def _classes_of_data(config: DictConfig, tokenizer: Any) -> np.ndarray | None:
    """Those of the training images, where samples have the same."""
    if config.sampling.labels != "data":
        return None
    return cast(ImageRows, DataModule(config, tokenizer, None).load("train")).labels


def draw_all(
    model: TrainerBase, drawing: lightning.LightningModule, *files: Parts[Any]
) -> None:
    """Has the ranks make all batches that are not there yet; then every one is.

    Args:
        model: Whose samples they are.
        drawing: Makes a batch in a prediction step.
        files: Where batches go, those of samples first.

    Raises:
        RunStopped: After a signal; what is there stays.
    """
    config = model.config
    trainer = build_trainer(config, callbacks=[], logger=[])
    log.info("categorical draws in %s", model.sampler.draw_dtype(device_of(config)))
    for file in files:
        file.begin()
    try:
        with model.eval_weights():
            trainer.predict(drawing, return_predictions=False)
    except BaseException as error:
        for file in files:
            file.interrupt()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):  # after a signal
            raise stopped(error, files[0]) from None
        raise
    trainer.strategy.barrier()  # every rank's batches are there


def stopped(error: KeyboardInterrupt | SystemExit, file: Parts[Any]) -> RunStopped:
    """What a signal ends a run with: where its finished batches are."""
    count = len(file.done())
    where = f", in {file.path} and {file.parts}" if count else ""
    return stopped_by(error, f"{count} of {file.num_batches} batches are there{where}")


@rank_zero_only
def finish_samples(
    drawing: "Drawing", references: list[str], about: dict[str, Any]
) -> dict[str, Any]:
    """The whole JSON, with what is said `about` it, and a report."""
    file, judge, config = drawing.file, drawing.judge, drawing.model.config
    batches = file.batches()
    if len(batches) < file.num_batches:
        raise file.missing(file.num_batches - len(batches))
    texts = [text for batch in batches for text in batch["generated_seqs"]]
    results = summarise(batches)
    page = config.sampling.save_trajectory
    if page is not None:
        samples = [unpacked(x) for batch in batches for x in batch["trajectories"]]
        save_trajectories(
            page, drawing.model, config, config.eval.checkpoint_path, samples
        )
    if is_image(config):
        where = write_images(drawing, batches)
        file.write(results | about | {"complete": True, "generated_seqs": []} | where)
        file.close()
        report_lines(where)
        report_sampling(config, results)
        return results
    if references and judge is not None:
        file.write({"complete": False})  # before what may take long
        plain = [without_marks(text, drawing.model.tokenizer) for text in texts]
        features = [judge.features(x) for x in (references, plain)]
        results["mauve"] = mauve_score(features[0], features[1], seed=config.seed)
    file.write(results | about | {"complete": True})
    file.close()
    count = config.sampling.num_sample_log
    report_samples(texts[:count], [drawing.given_parts(i) for i in range(count)])
    report_sampling(config, results)
    return results


def write_images(drawing: "Drawing", batches: list[dict[str, Any]]) -> dict[str, str]:
    """All samples as an npz and some as a picture, beside the JSON; their paths."""
    stem = drawing.file.path.removesuffix(".json")
    paths = {"images": f"{stem}.npz", "picture": f"{stem}.png"}
    ids = [row for batch in batches for row in batch["generated_seqs"]]
    decoded = drawing.model.tokenizer.batch_decode(ids)
    images = decoded.permute(0, 2, 3, 1).numpy()
    arrays = {"images": images}
    if drawing.classes is not None:
        labels = [label for batch in batches for label in batch["labels"]]
        arrays["labels"] = np.array(labels)
    write_arrays(paths["images"], arrays)
    write_grid(paths["picture"], images, arrays.get("labels"))
    return paths


NO_JUDGE = (
    "no language model judges the samples: eval.compute_generative_perplexity=True has "
    "gpt2-large do it, which is downloaded once (3 GB), "
    "eval.gen_ppl_eval_model_name_or_path=FOLDER a model of yours, and "
    "eval.ngram_order=5 an n-gram model of the training data"
)


def load_judge(
    config: DictConfig, algorithm: type[TrainerBase]
) -> GenerativePerplexity | None:
    """The model that scores samples, or None where it is off or cannot be had.

    Raises:
        ConfigError: If it cannot be had, but is asked for: by
            `eval.compute_generative_perplexity` or `eval.mauve_references`.
    """
    name = config.eval.gen_ppl_eval_model_name_or_path
    if is_image(config):
        return None
    if name is None:
        if not config.eval.ngram_order:
            log.info(NO_JUDGE)
        return None
    try:
        return GenerativePerplexity(
            name,
            batch_size=config.eval.perplexity_batch_size,
            max_length=build_sampler(config, algorithm).length(config.model.length),
            device=device_of(config),
        )
    except ConfigError as error:
        wanted = config.eval.mauve_references is not None
        if wanted or config.eval.compute_generative_perplexity:
            raise
        log.warning("%s Going on without it.", error)
        return None


def mauve_references(config: DictConfig) -> list[str]:
    """Texts of `eval.mauve_references`; none if it is not set."""
    path, key = config.eval.mauve_references, "eval.mauve_references"
    if path is None:
        return []
    if config.eval.gen_ppl_eval_model_name_or_path is None:
        raise ConfigError(
            f"{key}={path!r} needs a judge, whose hidden states are compared: "
            "eval.gen_ppl_eval_model_name_or_path=gpt2-large, or a folder."
        )
    require_mauve()
    texts = read_texts(
        Files(find_files(path, key), "text", key=key, column_key="column")
    )
    if ".txt" in Path(path).suffixes:  # one a line
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    return texts


class Drawing(lightning.LightningModule):
    """Draws, judges and keeps batches, each rank its share.

    Args:
        model: With its weights, in evaluation mode.
        file: Where batches go.
        judge: Scores texts, or None.
        prompts: Sample i starts from prompt i mod their number; none: from nothing.
        ngrams: Scores tokens, or None.
        classes: Sample i is of class i mod their number; None: of none.
    """

    def __init__(
        self,
        model: TrainerBase,
        file: SampleFile,
        judge: GenerativePerplexity | None,
        prompts: list[Prompt],
        ngrams: NGramModel | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        # Fewer batches than ranks, or what an interruption left of them.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self.file = file
        self.judge = judge
        self.ngrams = ngrams
        self.prompts = prompts
        self.classes = classes
        self.batch_size: int = model.config.loader.eval_batch_size
        total = self.batch_size * file.num_batches
        if len(prompts) > total:
            raise ConfigError(
                f"sampling.prompt_file holds {len(prompts)} prompts, but "
                "sampling.num_sample_batches x loader.eval_batch_size is "
                f"{file.num_batches} x {self.batch_size} = {total}: raise one of them."
            )

    def predict_dataloader(self) -> DataLoader:
        """Indices of this rank's batches that are not there yet."""
        mine = range(self.global_rank, self.file.num_batches, self.trainer.world_size)
        indices = sorted(set(mine) - self.file.done())
        # A list has what torch asks of a dataset, but not its base class.
        return DataLoader(cast("Dataset[int]", indices), batch_size=None)

    def on_predict_start(self) -> None:
        if self.judge is not None:
            self.judge.to(self.device)

    def predict_step(self, index: int) -> int:
        batch = self.draw(int(index))
        texts = batch["generated_seqs"]
        if self.judge is not None:
            scores = self.judge.score([self._judged(text) for text in texts])
            batch |= {name: x.tolist() for name, x in scores._asdict().items()}
        self.file.add(int(index), batch)
        return index

    def draw(self, index: int) -> dict[str, Any]:
        """Samples of one batch with their numbers, as plain data."""
        model, start = self.model, time.perf_counter()
        prompts = list(self._prompts_of(index))
        length = model.sampler.length(model.num_tokens)
        bos = model.tokenizer.bos_token_id
        labels = labels_at(self.classes, index * self.batch_size, self.batch_size)
        is_recorded = model.config.sampling.save_trajectory is not None
        recorder = Recorder() if is_recorded else None
        samples = model.generate_samples(
            self.batch_size,
            model.generator("sample_eval", index),
            given=given_tokens(prompts, bos, length) if prompts else None,
            show_progress=self.global_rank == 0,
            labels=labels,
            recorder=recorder,
        )
        samples = samples.to_host()  # waits for the device
        seconds = time.perf_counter() - start
        x = samples.tokens
        rows = samples.up_to_end(x)
        decoded = model.tokenizer.batch_decode(rows)
        batch = {
            "seconds": seconds,
            "devices": self.trainer.world_size,
            "generated_seqs": x.tolist() if is_image(model.config) else decoded,
            "evaluations": samples.evaluations.tolist(),
            "entropy": sample_entropy(rows).tolist(),
            **measure(x, decoded),
        }
        for n in DISTINCT:
            batch[f"distinct_{n}"] = distinct_n(rows, n).tolist()
        if self.ngrams is not None:
            nll = samples.up_to_end(torch.from_numpy(self.ngrams.nll(x.numpy())))
            batch["ngram_nll"] = [float(row.numpy().mean()) for row in nll]
        if recorder is not None:
            batch["trajectories"] = [packed(x) for x in recorder.trajectories()]
        if labels is not None:
            batch["labels"] = labels.tolist()
        if prompts:
            batch["prompts"] = [prompt.text for prompt in prompts]
        if model.config.sampling.semi_ar:
            ends = (x[:, 1:] == model.tokenizer.eos_token_id).long()
            no_end = ends.sum(dim=-1) == 0
            lengths = ends.argmax(dim=-1).masked_fill(no_end, x.shape[1] - 1)
            batch["sequence_lengths"] = lengths.tolist()
        if samples.lengths is not None:
            batch["sequence_lengths"] = (samples.lengths - 1).tolist()
        return batch

    def _prompts_of(self, index: int) -> Iterator[Prompt]:
        for sample in range(index * self.batch_size, (index + 1) * self.batch_size):
            if self.prompts:
                yield self.prompts[sample % len(self.prompts)]

    def given_parts(self, sample: int) -> list[str]:
        """The parts of a sample's text that were given, bos included, in order."""
        if not self.prompts:
            return []
        tokenizer = self.model.tokenizer
        ids = [tokenizer.bos_token_id, *self.prompts[sample % len(self.prompts)].ids]
        runs = itertools.groupby(ids, key=lambda x: x is None)
        known = [list(run) for is_gap, run in runs if not is_gap]
        return [tokenizer.batch_decode([run])[0] for run in known]

    def _judged(self, text: str) -> str:
        """What the judge reads: of long texts of windows, without end marks."""
        if not self.model.config.sampling.semi_ar:
            return text
        return without_marks(text, self.model.tokenizer)


def without_marks(text: str, tokenizer: Any) -> str:
    """A text without the names of bos and eos."""
    for mark in {tokenizer.bos_token, tokenizer.eos_token}:
        text = text.replace(mark, "")
    return text
