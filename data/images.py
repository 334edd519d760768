"""Images as rows of tokens with their classes, flipped at random in training.

    file, folder or hub (`image_sources.py`, `image_files.py`) -> rows in the cache

Shapes: B batch, L = 3 H W tokens in order (channel, row, column).
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from data.cache import open_folder, stored_folder
from data.fingerprints import Fingerprint
from data.image_files import Asked, Images, files_read, read_images, table_images
from data.image_sources import (
    ImageSource,
    class_folders,
    source_of,
    split_names,
    state,
)
from data.marks import rows_mark
from data.packing import Block, Layout
from data.pixels import VALUES, flipped, side_of
from data.progress import progress
from data.published import IMAGE_SETS, Source, published_documents
from data.rows import TokenRows, batch_of
from data.sources import rows_of_hub, sources_at
from utils import ConfigError, first_line

log = logging.getLogger(__name__)


class ImageRows(TokenRows):
    """Images as rows of ids, with their classes.

    Args:
        ids: (N, L) bytes: an array, or what is indexed like one.
        labels: Class of each image, (N,); None: batches have none.
        class_names: Of the classes, where something says them.
        flips: Whether an index N + row is the image of the row, left and right
            exchanged; an order draws either with probability 1/2.
        counts: How often each id occurs, where that is known already.
    """

    def __init__(
        self,
        ids: Any,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        flips: bool = False,
        counts: np.ndarray | None = None,
    ) -> None:
        super().__init__(ids, counts=counts, num_documents=len(ids))
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self._class_names = class_names or []
        self.num_starts = self.num_published_starts = 2 if flips else 1

    @property
    def class_names(self) -> list[str]:
        """Those of the source, or else the numbers of the classes that there are."""
        if self._class_names or self.labels is None:
            return self._class_names
        return [str(label) for label in range(int(self.labels.max(initial=-1)) + 1)]

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch, (B, L), with labels (B,); an index is row + N * is flipped."""
        is_flipped, rows = np.divmod(np.asarray(indices), len(self))
        ids = np.array(self.ids[rows])
        chosen = is_flipped == 1
        if chosen.any():
            ids[chosen] = flipped(ids[chosen])
        batch = batch_of(ids)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch

    def mark(self) -> str:
        return rows_mark(*self.ids.shape, super().mark().encode(), self._of_labels())

    def fingerprint(self) -> Fingerprint:
        """Of the images and, where batches have them, of their classes."""
        of_ids = super().fingerprint()
        if self.labels is None:
            return of_ids
        digest = hashlib.sha256(of_ids.sha256.encode() + self._of_labels())
        return of_ids._replace(sha256=digest.hexdigest())

    def _of_labels(self) -> bytes:
        return b"" if self.labels is None else self.labels.astype("<i4").tobytes()


# ---------------------------------------------------------------- loading


def load_images(config: DictConfig, tokenizer: Any, split: str) -> ImageRows:
    """A split of a set of images, from the cache of `data.cache_dir` or into it."""
    data = config.data
    source = source_of(data, split)
    folders = class_folders(data) if source.kind == "folder" else []
    key = {
        "images": _digest([_identity(data, source, split), folders]),
        "vocab_size": VALUES,
    }
    read: list[Images] = []
    num_images = 0

    def build(folder: str) -> Iterator[Block]:
        nonlocal num_images
        asked = Asked(source, side_of(data.length), folders)
        read[:] = [
            _of_hub(data, split, asked) if source.kind == "hub" else read_images(asked)
        ]
        bar = progress(None, f"reading images of {data[split]}", unit="")
        with bar:
            for block in read[0].blocks:
                num_images += len(block.ids)
                yield block
                bar.update(len(block.ids))

    def about() -> dict[str, Any]:
        return {"num_documents": num_images, "class_names": read[0].class_names}

    # Every value of an image is a token: there is nothing around or behind them.
    layout = Layout(data.length, bos=-1, eos=-1, pad=-1, insert_eos=False)
    name = f"{data[split]}-{split}"
    home = stored_folder(data.cache_dir, name, key, layout, build, about)
    ids, counts, said = open_folder(home)
    names = [str(name) for name in said.get("class_names", ())]
    labels = check_labels(data, split, source, ids.labels, names)
    published = published_documents(config, split)
    if published not in (None, len(ids)):
        log.warning(
            "data.%s=%s: %d images, the published set has %d; numbers of the two "
            "cannot be compared",
            *(split, data[split], len(ids), published),
        )
    flips = split == "train" and bool(data.flip)
    return ImageRows(ids, labels, names, flips, counts)


def check_labels(
    data: DictConfig,
    split: str,
    source: ImageSource,
    labels: np.ndarray | None,
    names: list[str],
) -> np.ndarray | None:
    """The labels that batches are to have, (N,); None where there are no classes.

    Raises:
        ConfigError: If `data.num_classes` is not what the images have.
    """
    num_classes = data.num_classes
    if num_classes is None:
        return None
    where = f"{source.key}={str(source)!r}" if source.files else source.key
    key = f"data.num_classes={num_classes}"
    if labels is None:
        raise ConfigError(
            f"{key}: the images of {where} have no labels; put those of each class "
            "into a sub-folder of its own, or train without classes, "
            "data.num_classes=null."
        )
    is_out = (labels < 0) | (labels >= num_classes)
    if is_out.any():
        row = int(is_out.argmax())
        label = int(labels[row])
        name = f" ({names[label]})" if 0 <= label < len(names) else ""
        raise ConfigError(
            f"{key}: image {row + 1} of {where} has label {label}{name}; labels are 0 "
            f"to {num_classes - 1}. Its largest label is {int(labels.max())}: give "
            f"data.num_classes={int(labels.max()) + 1} or more."
        )
    return labels


def _identity(data: DictConfig, source: ImageSource, split: str) -> Any:
    """What tells the images of a split from others, without reading them; JSON."""
    if source.kind == "hub":
        where = "published"
        if source.key in ("data.source", "data.valid_source"):
            where = data[source.key.removeprefix("data.")]
        return [where, data[split], split_names(data, split), data.length]
    return [state(source, files_read(source)), data.length]


def _digest(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---------------------------------------------------------------- the hub


def _of_hub(data: DictConfig, split: str, asked: Asked) -> Images:
    """Images of the first source that has them.

    Raises:
        ConfigError: If none does; each is named with its reason.
    """
    corpus, key = IMAGE_SETS[data[split]], asked.source.key
    is_own = key in ("data.source", "data.valid_source")
    published = getattr(corpus, split)
    sources: tuple[Source, ...] = corpus.sources
    names: tuple[str, ...] = (published,)
    if is_own:
        sources = sources_at(data[key.removeprefix("data.")], key)
        names = split_names(data, split)
    tried = []
    for source, name in itertools.product(sources, names):
        try:
            _, rows = rows_of_hub(source, name, data.cache_dir)
            expected = corpus.num_documents.get(name, len(rows))
            if expected != len(rows) and not is_own:
                raise ValueError(f"{len(rows)} images instead of {expected}")
            return table_images(asked, rows, source)
        except Exception as error:  # the libraries raise whatever went wrong
            tried.append(f"{source}, {name} ({first_line(error)})")
    raise ConfigError(
        f"data.{split}={data[split]!r} cannot be loaded. Tried: {'; '.join(tried)}. "
        "With the files on this machine: data.source=PATH, a copy of the hub's parquet "
        "files (train*, test*) or cifar-10-python.tar.gz."
    )
