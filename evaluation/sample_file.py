"""The JSON of `mode=sample_eval`, which survives an interruption.

Every finished batch is a file of `<json>.parts/`; the JSON is made of these whenever
ten seconds have passed, and at the end, when the folder goes. With each batch is a hash
of it and of the run's settings: one that is damaged or of other settings is drawn anew.
"""

import hashlib
import json
import logging
import math
import posixpath
import re
import time
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from metrics.judge import TextScores
from metrics.samples import mean_and_error
from utils import ConfigError, filesystem_of, open_file, path_exists, write_json

log = logging.getLogger(__name__)

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
    "data.bos_token",
    "eval.checkpoint_path",
    "eval.disable_ema",
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.perplexity_batch_size",
    "eval.mauve_references",
    "eval.ngram_order",
)
# Whose contents count.
FILES = ("eval.checkpoint_path", "sampling.prompt_file", "sampling.refine_path")
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
            settings[f"{key} (sha256)"] = digest_of(path)
    return json.loads(json.dumps(settings))


_OF_FOLDERS = (".json", ".safetensors", ".txt")


def digest_of(path: str) -> str:
    """A hash of a file's content, or of those of a Hugging Face folder's files."""
    filesystem, inner = filesystem_of(path)
    names, total = [inner], hashlib.sha256()
    if filesystem.isdir(inner):
        every = sorted(filesystem.ls(inner, detail=False))
        names = [name for name in every if name.endswith(_OF_FOLDERS)]
        total.update("/".join(map(posixpath.basename, names)).encode())
    for name in names:
        with filesystem.open(name, "rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


# Names of the files of the parts' folder, whole or half-written.
_OURS = re.compile(r"(batch_\d+|settings)\.json(\..*)?")


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
        self._damaged: set[int] = set()  # those that have been named
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
        try:
            with open_file(self._about) as file:
                there = json.load(file)
        except (ValueError, RecursionError):
            raise ConfigError(
                f"{where}: {self._about} of an interrupted run is damaged. Give "
                f"another path, or remove {self.parts}."
            ) from None
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
        """Indices of the finished batches; a damaged one is named, and is not."""
        for index in range(self.num_batches):
            if index not in self._read and path_exists(self._part(index)):
                batch = self._batch(index)
                if batch is not None:
                    self._read[index] = batch
                elif index not in self._damaged:
                    self._damaged.add(index)
                    text = "%s is damaged or of another run: it is drawn again"
                    log.warning(text, self._part(index))
        return set(self._read)

    def _batch(self, index: int) -> dict[str, Any] | None:
        """A batch whose hash is right."""
        try:
            with open_file(self._part(index)) as file:
                batch = json.load(file)
            digest = batch.pop("sha256")
            return batch if digest == self._digest(index, batch) else None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _digest(self, index: int, batch: Any) -> str:
        whole = json.dumps([self.settings, index, batch], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    def add(self, index: int, batch: dict[str, Any]) -> None:
        """Keeps a finished batch."""
        digest = self._digest(index, batch)
        write_json(self._part(index), batch | {"sha256": digest})
        if time.monotonic() - self._written > REFRESH:
            self.write({"complete": False})

    @rank_zero_only
    def write(self, numbers: dict[str, Any]) -> None:
        """Writes the JSON of the batches so far."""
        self._written = time.monotonic()
        batches = self.batches()
        keys = ("generated_seqs", "prompts", "sequence_lengths")
        lists: dict[str, list[Any]] = {key: [] for key in keys}
        for batch in batches:
            for key in keys:
                lists[key] += batch.get(key, [])
        lists = {key: x for key, x in lists.items() if x or key == "generated_seqs"}
        results = summarise(batches) | numbers
        write_json(self.path, results | {"settings": self.settings} | lists)

    def close(self) -> None:
        """Drops the parts; the JSON holds them all."""
        filesystem, inner = filesystem_of(self.parts)
        for name in filesystem.ls(inner, detail=False):
            if _OURS.fullmatch(posixpath.basename(name)):
                filesystem.rm_file(name)
        with suppress(OSError):  # not empty, or none of the store's
            filesystem.rmdir(inner)

    def batches(self) -> list[dict[str, Any]]:
        """The finished batches, in order."""
        self.done()
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


def _first_difference(one: Any, other: Any, key: str = "") -> str:
    """The first key under which two settings differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                inner = f"{key}.{name}" if key else name
                return _first_difference(one.get(name), other.get(name), inner)
    return f"{key} ({one!r} there, {other!r} now)"
