"""Samples of a checkpoint, batch by batch, over devices, into a JSON that survives an
interruption: what `mode=sample_eval` does between loading and reporting.

Every finished batch is a file of `<json>.parts/`; the JSON is made of these whenever
ten seconds have passed, and at the end, when the folder goes.
"""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import fsspec
import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from metrics import (
    GenerativePerplexity,
    TextScores,
    distinct_n,
    mean_and_error,
    sample_entropy,
)
from ngrams import NGramModel
from prompts import Prompt, given_tokens
from trainer_base import TrainerBase
from utils import ConfigError, path_exists, write_json

REFRESH = 10.0  # seconds between two writings of the JSON
DISTINCT = (1, 2, 3)  # n of distinct-n
PER_SAMPLE = ("entropy", *(f"distinct_{n}" for n in DISTINCT), "evaluations")

# What a run's samples depend on; a run goes on only where all of it is the same.
SETTINGS = (
    "algo",
    "model",
    "noise",
    "seed",
    "sampling",
    "loader.eval_batch_size",
    "trainer.precision",
    "training.ema",
    "training.loss_precision",
    "data.tokenizer_name_or_path",
    "data.vocab_size",
    "eval.checkpoint_path",
    "eval.disable_ema",
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.perplexity_batch_size",
    "eval.mauve_references",
    "eval.ngram_order",
)
FILES = ("eval.checkpoint_path", "sampling.prompt_file")  # whose contents count
_SHOWN_ONLY = ("num_sample_log",)


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The part of a config that samples and their numbers depend on, as plain data."""
    settings = {}
    for key in SETTINGS:
        value = OmegaConf.select(config, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        settings[key] = value
    for key in _SHOWN_ONLY:
        settings["sampling"].pop(key)
    for key in FILES:
        path = OmegaConf.select(config, key)
        if path and path_exists(path):
            filesystem, inner = fsspec.core.url_to_fs(path)
            info = filesystem.info(inner)
            settings[f"{key} (bytes)"] = info.get("size")
            settings[f"{key} (changed)"] = str(info.get("mtime", ""))
    return json.loads(json.dumps(settings))


class SampleFile:
    """The JSON of a run of `mode=sample_eval`, and the finished batches behind it.

    Args:
        path: Local or fsspec path of the JSON.
        settings: From `settings_of`.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path = path
        self.parts = f"{path}.parts"
        self._about = f"{self.parts}/settings.json"
        self.settings = settings
        self.num_batches: int = settings["sampling"]["num_sample_batches"]
        self._read: dict[int, dict[str, Any]] = {}
        self._written = time.monotonic()

    def check(self) -> int:
        """Says whether the path can be taken, or an interrupted run gone on with.

        Returns:
            How many batches are there already.

        Raises:
            ConfigError: If a finished file is there, one that is not ours, or the
                beginning of a run with other settings.
        """
        where = f"eval.generated_samples_path={self.path!r}"
        if not path_exists(self._about):
            if path_exists(self.path):
                raise ConfigError(
                    f"{where} exists; it is not overwritten. Move it away or give "
                    "another path."
                )
            return 0
        with fsspec.open(self._about) as file:
            there = json.load(file)
        if there != self.settings:
            changed = _first_difference(there, self.settings)
            raise ConfigError(
                f"{where} is an interrupted run with another {changed}; it is not "
                f"overwritten. Give another path, or remove {self.parts}."
            )
        return len(self.done())

    @rank_zero_only
    def begin(self) -> None:
        """Takes the path."""
        write_json(self._about, self.settings)

    @rank_zero_only
    def interrupt(self) -> None:
        """Leaves what there is, so that the same command goes on with it."""
        if self.done():
            self.write({"complete": False})
        else:
            self.close()

    def done(self) -> set[int]:
        """Indices of the finished batches."""
        return {i for i in range(self.num_batches) if path_exists(self._part(i))}

    def add(self, index: int, batch: dict[str, Any]) -> None:
        """Keeps a finished batch."""
        write_json(self._part(index), batch)
        if time.monotonic() - self._written > REFRESH:
            self.write({"complete": False})

    @rank_zero_only
    def write(self, numbers: dict[str, Any]) -> None:
        """Writes the JSON of the batches so far."""
        self._written = time.monotonic()
        batches = self.batches()
        lists = {key: [] for key in ("generated_seqs", "prompts", "sequence_lengths")}
        for batch in batches:
            for key in lists:
                lists[key] += batch.get(key, [])
        lists = {key: x for key, x in lists.items() if x or key == "generated_seqs"}
        results = summarise(batches) | numbers
        write_json(self.path, results | {"settings": self.settings} | lists)

    def close(self) -> None:
        """Drops the parts; the JSON holds them all."""
        filesystem, inner = fsspec.core.url_to_fs(self.parts)
        filesystem.rm(inner, recursive=True)

    def batches(self) -> list[dict[str, Any]]:
        """The finished batches, in order."""
        for index in sorted(self.done() - self._read.keys()):
            with fsspec.open(self._part(index)) as file:
                self._read[index] = json.load(file)
        return [self._read[index] for index in sorted(self._read)]

    def _part(self, index: int) -> str:
        return f"{self.parts}/batch_{index:06d}.json"


def summarise(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over samples, each with its standard error, as the JSON has them."""
    results: dict[str, Any] = {"generative_ppl": None, "generative_ppl_stderr": None}
    scored = [batch for batch in batches if "nll" in batch]
    if scored:
        columns = ("nll", "num_tokens")
        sums = ([x for batch in scored for x in batch[name]] for name in columns)
        judged = TextScores(*map(torch.tensor, sums)).perplexity()
        if judged is not None:
            ppl, error = judged
            results["generative_ppl"] = ppl
            results["generative_ppl_stderr"] = error if error == error else None
    for name in PER_SAMPLE:
        values = [x for batch in batches for x in batch[name]]
        pair = mean_and_error(values) if values else (None, None)
        results[name], results[f"{name}_stderr"] = pair
    ngram_nll = [x for batch in batches for x in batch.get("ngram_nll", [])]
    nll, error = mean_and_error(ngram_nll) if ngram_nll else (None, None)
    results["ngram_ppl"] = None if nll is None else math.exp(nll)
    results["ngram_ppl_stderr"] = None if error is None else math.exp(nll) * error
    count = sum(len(batch["generated_seqs"]) for batch in batches)
    seconds = sum(batch["seconds"] / batch["devices"] for batch in batches)
    results["num_samples"] = count
    results["samples_per_second"] = count / seconds if seconds else None
    return results


class Drawing(lightning.LightningModule):
    """Draws, judges and keeps batches, each rank its share.

    Args:
        model: With its weights, in evaluation mode.
        file: Where batches go.
        judge: Scores texts, or None.
        prompts: Sample i starts from prompt i mod their number; none: from nothing.
        ngrams: Scores tokens, or None.
    """

    def __init__(
        self,
        model: TrainerBase,
        file: SampleFile,
        judge: GenerativePerplexity | None,
        prompts: list[Prompt],
        ngrams: NGramModel | None = None,
    ) -> None:
        super().__init__()
        # Fewer batches than ranks, or what an interruption left of them.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self.file = file
        self.judge = judge
        self.ngrams = ngrams
        self.prompts = prompts
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
        return DataLoader(sorted(set(mine) - self.file.done()), batch_size=None)

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
        samples = model.generate_samples(
            self.batch_size,
            model.generator("sample_eval", index),
            given=given_tokens(prompts, bos, length) if prompts else None,
            show_progress=self.global_rank == 0,
        )
        x = samples.tokens.cpu()  # waits for the device
        batch = {
            "seconds": time.perf_counter() - start,
            "devices": self.trainer.world_size,
            "generated_seqs": model.tokenizer.batch_decode(x),
            "evaluations": samples.evaluations.tolist(),
            "entropy": sample_entropy(x).tolist(),
        }
        for n in DISTINCT:
            batch[f"distinct_{n}"] = distinct_n(x, n).tolist()
        if self.ngrams is not None:
            nll = self.ngrams.nll(x.numpy())
            batch["ngram_nll"] = nll.mean(axis=1).tolist()
        if prompts:
            batch["prompts"] = [prompt.text for prompt in prompts]
        if model.config.sampling.semi_ar:
            ends = (x[:, 1:] == model.tokenizer.eos_token_id).long()
            no_end = ends.sum(dim=-1) == 0
            lengths = ends.argmax(dim=-1).masked_fill(no_end, x.shape[1] - 1)
            batch["sequence_lengths"] = lengths.tolist()
        return batch

    def _prompts_of(self, index: int) -> Iterator[Prompt]:
        for sample in range(index * self.batch_size, (index + 1) * self.batch_size):
            if self.prompts:
                yield self.prompts[sample % len(self.prompts)]

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


def _first_difference(one: Any, other: Any, key: str = "") -> str:
    """The first key under which two settings differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                inner = f"{key}.{name}" if key else name
                return _first_difference(one.get(name), other.get(name), inner)
    return f"{key} ({one!r} there, {other!r} now)"
