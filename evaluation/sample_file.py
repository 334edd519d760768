"""The JSON of `mode=sample_eval`, which survives an interruption (`parts.py`).

It is made of the finished batches whenever ten seconds have passed, and at the end.
"""

import hashlib
import json
import math
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from evaluation.parts import OF_SAMPLES, Parts, settings_under
from metrics.judge import TextScores
from metrics.registry import METRICS
from metrics.samples import mean_and_error
from utils import write_json

REFRESH = 10.0  # seconds between two writings of the JSON
DISTINCT = (1, 2, 3)  # n of distinct-n
PER_SAMPLE = ("entropy", *(f"distinct_{n}" for n in DISTINCT), "evaluations")

# What a run's samples depend on; a run goes on only where all of it is the same.
SETTINGS = (
    *OF_SAMPLES,
    "data.vocab_size",
    "data.bos_token",
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.perplexity_batch_size",
    "eval.mauve_references",
    "eval.ngram_order",
)
# Whose contents count.
FILES = ("eval.checkpoint_path", "sampling.prompt_file", "sampling.refine_path")
_SHOWN_ONLY = ("num_sample_log", "save_trajectory")


def settings_of(
    config: DictConfig, classes: np.ndarray | None = None
) -> dict[str, Any]:
    """The part of a config that samples and their numbers depend on, as plain data.

    Args:
        config: The run's config.
        classes: Of the samples; None: of none.
    """
    settings = settings_under(config, SETTINGS, FILES)
    for key in _SHOWN_ONLY:
        settings["sampling"].pop(key)
    if config.sampling.save_trajectory is not None:
        settings["trajectories"] = True  # are in the batches
    if METRICS:
        settings["metrics of plug-ins"] = sorted(METRICS)
    if classes is not None:
        raw = classes.astype("<i8").tobytes()
        settings["classes (sha256)"] = hashlib.sha256(raw).hexdigest()
    return settings


class SampleFile(Parts[dict[str, Any]]):
    """The JSON of a run of `mode=sample_eval`, and the finished batches behind it.

    Args:
        path: Local or fsspec path of the JSON.
        settings: From `settings_of`.
    """

    suffix = ".json"

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        super().__init__(path, settings, settings["sampling"]["num_sample_batches"])
        self._written = time.monotonic()

    def write_batch(self, path: str, batch: dict[str, Any], digest: str) -> None:
        write_json(path, batch | {"sha256": digest})

    def read_batch(self, file: Any) -> tuple[dict[str, Any], str]:
        batch = json.load(file)
        return batch, batch.pop("sha256")

    def hash_batch(self, batch: dict[str, Any]) -> bytes:
        return json.dumps(batch, sort_keys=True).encode()

    @rank_zero_only
    def interrupt(self) -> None:
        super().interrupt()
        if self.done():
            self.write({"complete": False})

    def add(self, index: int, batch: dict[str, Any]) -> None:
        super().add(index, batch)
        if time.monotonic() - self._written > REFRESH:
            self.write({"complete": False})

    @rank_zero_only
    def write(self, numbers: dict[str, Any]) -> None:
        """Writes the JSON of the batches so far."""
        self._written = time.monotonic()
        batches = self.batches()
        keys = ("generated_seqs", "labels", "prompts", "sequence_lengths")
        lists: dict[str, list[Any]] = {key: [] for key in keys}
        for batch in batches:
            for key in keys:
                lists[key] += batch.get(key, [])
        lists = {key: x for key, x in lists.items() if x or key == "generated_seqs"}
        lists |= {key: numbers[key] for key in lists.keys() & numbers.keys()}
        results = summarise(batches) | numbers
        write_json(self.path, results | {"settings": self.settings} | lists)

    def batches(self) -> list[dict[str, Any]]:
        """The finished batches, in order."""
        self.done()
        return [self._kept[index] for index in sorted(self._kept)]


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
    for name in (*PER_SAMPLE, *METRICS):
        values = [x for batch in batches for x in batch[name]]
        pair = mean_and_error(values) if values else (None, None)
        results[name], results[f"{name}_stderr"] = pair
    ngram_nll = [x for batch in batches for x in batch.get("ngram_nll", [])]
    results["ngram_ppl"] = results["ngram_ppl_stderr"] = None
    if ngram_nll:
        nll, nll_error = mean_and_error(ngram_nll)
        results["ngram_ppl"] = ppl = math.exp(nll)
        results["ngram_ppl_stderr"] = None if nll_error is None else ppl * nll_error
    count = sum(len(batch["generated_seqs"]) for batch in batches)
    seconds = sum(batch["seconds"] / batch["devices"] for batch in batches)
    results["num_samples"] = count
    results["samples_per_second"] = count / seconds if seconds else None
    return results
