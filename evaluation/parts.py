"""Finished batches of a run that survive its interruption: a file each, in
`<path>.parts/`, until what they make is at `path`.

With each batch is a hash of it and of the run's settings: one that is damaged or of
other settings is made anew.
"""

import hashlib
import json
import logging
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from cli.paths import ABOUT, parts_of, refuse_finished
from utils import (
    ConfigError,
    RunStopped,
    filesystem_of,
    open_file,
    path_exists,
    write_json,
)

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
# What reading a damaged file may raise.
DAMAGES = (
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError, EOFError),
    *(zipfile.BadZipFile, zlib.error, struct.error, OverflowError),
    NotImplementedError,
)

# ---------------------------------------------------------------- settings

# What every sample of a checkpoint depends on.
OF_SAMPLES = (
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
    "eval.checkpoint_path",
    "eval.disable_ema",
)


def settings_under(
    config: DictConfig, keys: Iterable[str], files: Iterable[str]
) -> dict[str, Any]:
    """The part of a config that a run's batches depend on, as plain data.

    Args:
        config: The run's config.
        keys: What counts.
        files: Keys of paths whose contents count.
    """
    settings = {}
    for key in keys:
        value = OmegaConf.select(config, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        settings[key] = value
    for key in files:
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


def _first_difference(one: Any, other: Any, key: str = "") -> str:
    """The first key under which two settings differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                inner = f"{key}.{name}" if key else name
                return _first_difference(one.get(name), other.get(name), inner)
    return f"{key} ({one!r} there, {other!r} now)"


# ---------------------------------------------------------------- batches


class Parts(Generic[Batch]):
    """The finished batches behind a file that a run makes.

    A subclass says how a batch is written, read and hashed.

    Args:
        path: Local or fsspec path of the file.
        settings: What the batches depend on, as plain data.
        num_batches: How many there will be.
    """

    suffix: ClassVar[str]  # of a batch's file

    def __init__(self, path: str, settings: dict[str, Any], num_batches: int) -> None:
        self.path = path
        self.parts = parts_of(path)
        self.settings = settings
        self.num_batches = num_batches
        self._about = f"{self.parts}/{ABOUT}"
        self._kept: dict[int, Any] = {}  # of the finished batches
        self._damaged: set[int] = set()  # those that have been named

    # ---- for subclasses

    def write_batch(self, path: str, batch: Batch, digest: str) -> None:
        """Writes a batch with its hash, all of it or nothing."""
        raise NotImplementedError

    def read_batch(self, file: Any) -> tuple[Batch, str]:
        """A batch and its hash from an open file; of a damaged one any error."""
        raise NotImplementedError

    def hash_batch(self, batch: Batch) -> bytes:
        """What the hash of a batch is made of."""
        raise NotImplementedError

    def kept(self, batch: Batch) -> Any:
        """What stays in memory of a batch."""
        return batch

    # ---- the life of a run

    def check(self) -> int:
        """Says whether the path can be taken, or an interrupted run gone on with.

        Returns:
            How many batches are there already.

        Raises:
            ConfigError: If a finished file is there, one that is not ours, or the
                beginning of a run with other settings.
        """
        where = f"eval.generated_samples_path={self.path!r}"
        refuse_finished(self.path)
        if not path_exists(self._about):
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
        if not self.done():
            self.close()

    def done(self) -> set[int]:
        """Indices of the finished batches; a damaged one is named, and is not."""
        for index in range(self.num_batches):
            if index not in self._kept and path_exists(self._part(index)):
                batch = self._batch(index)
                if batch is not None:
                    self._kept[index] = self.kept(batch)
                elif index not in self._damaged:
                    self._damaged.add(index)
                    text = "%s is damaged or of another run: it is drawn again"
                    log.warning(text, self._part(index))
        return set(self._kept)

    def add(self, index: int, batch: Batch) -> None:
        """Keeps a finished batch."""
        self.write_batch(self._part(index), batch, self._digest(index, batch))

    def batch(self, index: int) -> Batch:
        """A finished batch, read again.

        Raises:
            RunStopped: If it is no longer there, or damaged.
        """
        batch = self._batch(index)
        if batch is None:
            raise self.missing(1)
        return batch

    def missing(self, count: int) -> RunStopped:
        """What a run ends with that cannot read all that it has made."""
        return RunStopped(
            f"{count} batches of {self.parts} are damaged, or other nodes do not see "
            "this folder; the same command draws them again, all of them in a folder "
            "that every node sees"
        )

    def close(self) -> None:
        """Drops the parts; the file holds them all."""
        filesystem, inner = filesystem_of(self.parts)
        ours = re.compile(rf"(batch_\d+\{self.suffix}|{re.escape(ABOUT)})(\..*)?")
        for name in filesystem.ls(inner, detail=False):
            if ours.fullmatch(posixpath.basename(name)):
                filesystem.rm_file(name)
        with suppress(OSError):  # not empty, or none of the store's
            filesystem.rmdir(inner)

    # ---- files

    def _batch(self, index: int) -> Batch | None:
        """A batch whose hash is right."""
        try:
            with open_file(self._part(index)) as file:
                batch, digest = self.read_batch(file)
            return batch if digest == self._digest(index, batch) else None
        except DAMAGES:
            return None

    def _digest(self, index: int, batch: Batch) -> str:
        about = json.dumps([self.settings, index], sort_keys=True).encode()
        return hashlib.sha256(about + self.hash_batch(batch)).hexdigest()

    def _part(self, index: int) -> str:
        return f"{self.parts}/batch_{index:06d}{self.suffix}"
