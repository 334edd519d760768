"""The images of `mode=fid_eval`: one npz, made of finished batches that survive an
interruption (`parts.py`), and the moments of the real images' features, which the cache
keeps for the next evaluation.

Shapes: N images, H height, W width, d features, k classes.
"""

import hashlib
import io
import json
import logging
import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from evaluation.parts import DAMAGES, OF_SAMPLES, Parts, settings_under
from metrics.fid import FeatureSums
from utils import open_file, path_exists, whole_file

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
DIGEST = "sha256"  # name of the hash among the arrays of a file

# What a run's images and their features depend on; a run goes on only where all of it
# is the same.
SETTINGS = (*OF_SAMPLES, "data.train", "data.num_classes", "eval.fid_features")
FILES = ("eval.checkpoint_path", "eval.fid_features", "sampling.refine_path")
_OF_TEXTS = ("num_sample_log", "num_sample_batches", "save_trajectory")


def settings_of(config: DictConfig, num_images: int, rows_mark: str) -> dict[str, Any]:
    """The part of a config that images depend on, as plain data.

    Args:
        config: The run's config.
        num_images: To be generated.
        rows_mark: Of the rows that the labels are of.
    """
    settings = settings_under(config, SETTINGS, FILES)
    for key in _OF_TEXTS:
        settings["sampling"].pop(key)
    return settings | {"eval.fid_num_images": num_images, "rows": rows_mark}


class ImageFile(Parts[Arrays]):
    """The npz of a run, and the finished batches behind it: arrays by name.

    Of generated images these are `images` (n, H, W, 3) uint8, `features` (n, d),
    `logits` (n, k) where the extractor gives some, `labels` (n,) where the model has
    classes, `evaluations` (n,) of the network, and `seconds` (). Of real ones they are
    the features alone.
    """

    suffix = ".npz"

    def write_batch(self, path: str, batch: Arrays, digest: str) -> None:
        write_arrays(path, batch | {DIGEST: np.array(digest)})

    def read_batch(self, file: Any) -> tuple[Arrays, str]:
        batch = read_arrays(file)
        return batch, str(batch.pop(DIGEST))

    def hash_batch(self, batch: Arrays) -> bytes:
        return _digest(batch).encode()

    def kept(self, batch: Arrays) -> bool:
        """Nothing but that it is there: all images would be too many."""
        return True

    def check_all(self) -> None:
        """Refuses to go on with less than all batches.

        Raises:
            RunStopped: If some are missing; the same command makes them.
        """
        if missing := self.num_batches - len(self.done()):
            raise self.missing(missing)

    def batches(self) -> Iterable[Arrays]:
        """The batches, in order, one at a time."""
        return (self.batch(index) for index in range(self.num_batches))


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz, all of it or nothing; equal arrays make equal files."""
    content: dict[str, Any] = dict(sorted(arrays.items()))
    with whole_file(path) as file:
        np.savez(file, **content)


def read_arrays(file: Any) -> Arrays:
    """All arrays of an open npz, none of which may be of objects."""
    with np.load(io.BytesIO(file.read()), allow_pickle=False) as content:
        return {name: content[name] for name in content.files}


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        total.update(json.dumps([name, x.dtype.str, x.shape]).encode())
        total.update(np.ascontiguousarray(x).tobytes())
    return total.hexdigest()


# ---------------------------------------------------------------- real images


class RealSums:
    """The moments of the real images' features in the cache.

    Args:
        cache_dir: `data.cache_dir`, local or fsspec.
        key: What they depend on: the extractor's hash and the rows' mark.
    """

    def __init__(self, cache_dir: str, key: Mapping[str, str]) -> None:
        self.key = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(self.key.encode()).hexdigest()[:16]
        self.path = posixpath.join(cache_dir, "fid", f"real-{name}.npz")

    def read(self) -> FeatureSums | None:
        """None where they are not there; a damaged file is named, and is not."""
        if not path_exists(self.path):
            return None
        try:
            with open_file(self.path) as file:
                arrays = read_arrays(file)
            digest = str(arrays.pop(DIGEST))
            if digest != _digest(arrays) or str(arrays["key"]) != self.key:
                raise ValueError("its hash is another one")
            total, products = (
                torch.from_numpy(arrays[x]) for x in ("total", "products")
            )
            return FeatureSums(int(arrays["count"]), total, products)
        except DAMAGES:
            log.warning("%s is damaged: it is made anew", self.path)
            return None

    def write(self, sums: FeatureSums) -> None:
        """Keeps them; a cache that cannot be written to is no reason to stop."""
        arrays = {
            "key": np.array(self.key),
            "count": np.array(sums.count),
            "total": sums.total.numpy(),
            "products": sums.products.numpy(),
        }
        try:
            write_arrays(self.path, arrays | {DIGEST: np.array(_digest(arrays))})
        except OSError as error:
            log.warning("%s is not written (%s); going on without", self.path, error)
