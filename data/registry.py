"""The table of data sets, and what can be refused about one before anything is read.

A data set's functions are imported when they are called (`loading.py`), so that a
mistake on the command line is found before the heavy libraries are there.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from omegaconf import DictConfig

from data.files import check_apart, find_files
from data.image_sources import check_images, check_images_apart, check_sizes
from data.published import CORPORA, IMAGE_SETS
from data.sources import check_published, check_sources_apart
from data.tokenizers import PIXELS
from utils import ConfigError, choose, imported, require

SPLITS = ("train", "valid")


def check_text_files(config: DictConfig, split: str) -> None:
    """Refuses missing files and unknown formats before anything is loaded."""
    data = config.data
    files = find_files(data.path, "data.path")
    if data.valid_path:
        held_out = find_files(data.valid_path, "data.valid_path")
        check_apart(files, held_out, ("data.path", "data.valid_path"))
    elif data.streaming and split == "train":
        raise ConfigError(
            "data.streaming=True: nothing can be held out of a stream; give "
            "data.valid_path."
        )
    elif not 0 < data.valid_fraction < 1:
        raise ConfigError(
            f"data.valid_fraction={data.valid_fraction} is not between 0 and 1; "
            "or give data.valid_path."
        )


class DatasetSpec(NamedTuple):
    """How a data set is read: functions (or their paths), and a check of its keys."""

    # (config, tokenizer, split) -> rows
    loader: Callable[..., Any] | str
    # (config, split): refuses what cannot work, quickly, before anything else
    check: Callable[[DictConfig, str], None] | None = None
    # (config, tokenizer) -> training data, read as they are needed
    streamer: Callable[..., Any] | str | None = None
    is_made: bool = False  # on the spot, so that data.streaming makes no difference
    has_rows: bool = True  # of files, which may be damaged: `data.on_bad_row`
    modality: str = "text"

    def load(self, config: DictConfig, tokenizer: Any, split: str) -> Any:
        """The rows of a split, a `data.rows.TokenRows`."""
        return _function(self.loader)(config, tokenizer, split)

    def stream(self, config: DictConfig, tokenizer: Any) -> Any:
        """Training data, read as they are needed, a `data.streaming.Stream`.

        Raises:
            ValueError: If they cannot be; `check_splits` has refused such a config.
        """
        if self.streamer is None:
            raise ValueError("this data set has no streamer")
        return _function(self.streamer)(config, tokenizer)


def _function(named: Callable[..., Any] | str) -> Callable[..., Any]:
    return imported(named) if isinstance(named, str) else named


PUBLISHED = DatasetSpec(
    "data.loading.load_published", check_published, "data.loading.stream_published"
)


class Source(Protocol):
    """A data set of a plug-in (`duo.dataset`): a function that gives its texts."""

    def __call__(self, config: DictConfig, split: str) -> Iterable[str]:
        """Texts, one a document, in the same order every time.

        Args:
            config: The run's config, of which `data` has the settings.
            split: 'train' or 'valid'.
        """


# By `data.train` and `data.valid`.
DATASETS: dict[str, DatasetSpec] = {
    "synthetic": DatasetSpec(
        "data.loading.load_synthetic", is_made=True, has_rows=False
    ),
    "docstrings": DatasetSpec("data.loading.load_docstrings", has_rows=False),
    "text_files": DatasetSpec(
        "data.loading.load_text_files",
        check_text_files,
        "data.loading.stream_text_files",
    ),
    **dict.fromkeys(CORPORA, PUBLISHED),
    "text8-crop": DatasetSpec("data.loading.load_crops", check_published),
    **dict.fromkeys(
        IMAGE_SETS,
        DatasetSpec(
            "data.images.load_images", check_images, has_rows=False, modality="image"
        ),
    ),
}
MODALITIES = sorted({spec.modality for spec in DATASETS.values()})


def check_splits(config: DictConfig, splits: Iterable[str]) -> None:
    """Refuses unknown data sets and layouts before anything is read.

    Args:
        config: The run's config.
        splits: 'train' and 'valid', as far as they are to be read.

    Raises:
        ConfigError: If one of them cannot be had, or a key has no meaning for it.
    """
    data, splits = config.data, tuple(splits)
    specs = {s: choose(DATASETS, data[s], f"data.{s}") for s in splits}
    require(data.modality, MODALITIES, "data.modality")
    for split, spec in specs.items():
        where = f"data.{split}={data[split]!r}"
        require(data.modality, [spec.modality], "data.modality", where)
    check_modality(config)
    for split, spec in specs.items():
        if spec.check is not None:
            spec.check(config, split)
    train = specs.get("train")
    if train and data.streaming and not (train.is_made or train.streamer):
        raise ConfigError(
            f"data.streaming=True is not supported for data.train={data.train!r}; "
            "the only value is False."
        )
    if train and data.streaming and train.streamer:
        _refuse_keys_of_packed(config)
    if len(splits) == 2:
        is_text = data.modality == "text"
        (check_sources_apart if is_text else check_images_apart)(data)
    if splits and not any(data[x] in CORPORA.keys() | IMAGE_SETS for x in splits):
        _refuse_keys_of_published(data, splits)
    has_rows = any(spec.has_rows for spec in specs.values())
    if specs and not has_rows and data.on_bad_row == "skip":
        raise ConfigError(
            f"data.on_bad_row=skip has no effect: data.train={data.train!r} and "
            f"data.valid={data.valid!r} are read from no files; leave it out."
        )
    if config.model.length < 3:
        raise ConfigError(
            f"model.length={config.model.length}: a row holds bos, at least one "
            "token, and eos; give 3 or more."
        )


def check_modality(config: DictConfig) -> None:
    """Refuses keys of images in a run on text, and the other way round."""
    data = config.data
    is_image, name = data.modality == "image", data.tokenizer_name_or_path
    if is_image != (name in PIXELS):
        cure = PIXELS[0] if is_image else "a tokenizer of text"
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r} is not for data.modality="
            f"{data.modality}; give {cure}."
        )
    if is_image:
        check_sizes(config)
    elif data.num_classes is not None:
        raise ConfigError(
            f"data.num_classes={data.num_classes}: data.modality=text has no classes; "
            "the only value is null."
        )


def packed_splits(config: DictConfig) -> tuple[str, ...]:
    """The splits that there are, and that are not streamed."""
    corpora = {split: CORPORA.get(config.data[split]) for split in SPLITS}
    there = [s for s, c in corpora.items() if c is None or getattr(c, s)]
    is_stream = config.data.streaming and corpora["train"] is not None
    return tuple(split for split in there if split == "valid" or not is_stream)


def _refuse_keys_of_published(data: DictConfig, splits: tuple[str, ...]) -> None:
    """Refuses keys that would change nothing."""
    for key in ("source", "valid_source", "detokenizer"):
        if data[key] is not None:
            names = " and ".join(f"data.{split}={data[split]!r}" for split in splits)
            raise ConfigError(
                f"data.{key}={data[key]!r} is for published data sets, not for {names}."
            )


def _refuse_keys_of_packed(config: DictConfig) -> None:
    """Refuses what would read all training data where they are streamed."""
    for key in ("unigram_baseline", "ngram_order"):
        if config.eval[key]:
            raise ConfigError(
                f"eval.{key}={config.eval[key]} counts all training data, which "
                "data.streaming=True does not read; set one of them to False or 0."
            )
