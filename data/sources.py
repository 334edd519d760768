"""Documents of published data sets in their published order: from the hub, from its
fallbacks, or from files on this machine (`data.source`, `data.valid_source`).
"""

import contextlib
import logging
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fsspec.utils import compressions
from omegaconf import DictConfig, ListConfig

from data.detokenizers import DETOKENIZERS
from data.documents import Documents
from data.files import (
    TEXT_FORMATS,
    Texts,
    by_number,
    check_apart,
    find_files,
    load_files,
    load_rows,
    state_of,
    suffix_of,
)
from data.published import CORPORA, Corpus, Source, held_out_end
from data.readers import FORMATS, Files, Txt, format_of
from utils import ConfigError, answers, first_line, hub_answers, require

T = TypeVar("T")
log = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
HUB = "hf://datasets/"
_TXT = Txt()


# ---------------------------------------------------------------- local copies


class Local(NamedTuple):
    """Files that stand for a split of a published data set."""

    files: list[str]
    is_whole: bool  # no file says which split it is


def source_key(data: DictConfig, split: str) -> str | None:
    """The config key that says where a split comes from; None: the table.

    `data.source` is of what is trained on, and of what is validated on where that is
    the same data set; `data.valid_source` is of the latter alone.
    """
    if split == "valid" and data.valid_source is not None:
        return "data.valid_source"
    if data.source is not None and (split == "train" or _is_one_corpus(data)):
        return "data.source"
    return None


def _is_one_corpus(data: DictConfig) -> bool:
    """Whether what is trained and what is validated on come from the same place."""
    train, valid = CORPORA.get(data.train), CORPORA.get(data.valid)
    return train is not None and valid is not None and train.sources == valid.sources


def local_files(data: DictConfig, split: str) -> Local | None:
    """What stands for a split on this machine; None where the hub has it.

    Raises:
        ConfigError: If nothing fits.
    """
    key = source_key(data, split)
    if key is None or is_hub(path := data[key.removeprefix("data.")]):
        return None
    if isinstance(path, ListConfig) or not os.path.isdir(path):
        return Local(find_files(path, key), is_whole=True)
    corpus = CORPORA[data[split]]
    root = _config_folder(Path(path), corpus)
    below = (file for file in root.rglob("*") if file.is_file())
    files = [file for file in below if suffix_of(str(file)) in TEXT_FORMATS]
    by_split = {
        name: [file for file in files if is_of_split(file.relative_to(root), words)]
        for name, words in SPLIT_NAMES.items()
    }
    if files and not any(by_split.values()):
        return Local(topmost(files), is_whole=True)
    wanted = split_of(corpus, split, data)
    if not by_split[wanted]:
        names = ", ".join(f"{name}*" for name in SPLIT_NAMES[wanted])
        raise ConfigError(
            f"{key}={path!r} has no file of the {wanted} split: none is called {names} "
            f"and ends in {', '.join(TEXT_FORMATS)}."
        )
    return Local(topmost(by_split[wanted]), is_whole=False)


def topmost(files: list[Path]) -> list[str]:
    """Those nearest to the root; what lies deeper may be a copy of them."""
    depth = min(len(file.parts) for file in files)
    nearest = (str(file) for file in files if len(file.parts) == depth)
    return sorted(nearest, key=by_number)


def _config_folder(root: Path, corpus: Corpus) -> Path:
    """Copies of a hub repository may hold a folder for each config."""
    for source in corpus.sources:
        for name in (source.name, source.data_dir):
            if name and (root / name).is_dir():
                return root / name
    return root


def is_of_split(file: Path | str, names: Iterable[str]) -> bool:
    """Whether one of the names of a split is a word of a path."""
    words = re.split(r"[^a-z]+", str(file).lower())
    return any(name in words for name in names)


def split_of(corpus: Corpus, split: str, data: DictConfig) -> str:
    """The published split that 'train' or 'valid' means.

    Raises:
        ConfigError: If the data set has none.
    """
    name = getattr(corpus, split)
    if name is None:
        raise ConfigError(
            f"data.{split}={data[split]!r} has no split to "
            f"{'train' if split == 'train' else 'validate'} on; choose another data."
            f"{split}."
        )
    return name


def check_published(config: DictConfig, split: str) -> None:
    """Refuses, before anything is read, a split that cannot be had."""
    data, corpus = config.data, CORPORA[config.data[split]]
    split_of(corpus, split, data)
    if local_files(data, split) is None:
        sources_of(corpus, data, split)
    if data.detokenizer is not None:
        require(data.detokenizer, DETOKENIZERS, "data.detokenizer")
    if split == "train" and data.streaming and not corpus.can_stream:
        raise ConfigError(
            f"data.streaming=True: data.train={data.train!r} cannot be streamed; "
            "set it to False."
        )


def check_sources_apart(data: DictConfig) -> None:
    """Refuses to validate on what is trained on.

    Raises:
        ConfigError: If local files give the same documents to both.
    """
    if _is_one_corpus(data) and CORPORA[data.valid].cut is not None:
        return
    train, valid = (
        local_files(data, split) if data[split] in CORPORA else None
        for split in ("train", "valid")
    )
    if train is None or valid is None:
        return
    if train.files == valid.files:
        raise ConfigError(
            f"data.source={data.source!r} gives the same documents to train and to "
            "validate on; give data.valid_source, or a folder with files called "
            "train* and validation*."
        )
    keys = (source_key(data, split) or "" for split in ("train", "valid"))
    check_apart(train.files, valid.files, (next(keys), next(keys)))


# ---------------------------------------------------------------- documents


def identity(config: DictConfig, split: str) -> Any:
    """What tells the documents of a split from others, without reading them; JSON.

    Local files by name, size and time of change, published ones by name: with these,
    rows that were packed once are found again without a network.
    """
    data, corpus = config.data, CORPORA[config.data[split]]
    cut = data.valid_documents if corpus.cut is held_out_end else None
    local = local_files(data, split)
    if local is not None:
        where: Any = [state_of(local.files), data.on_bad_row]
    elif (key := source_key(data, split)) is not None:
        where = data[key.removeprefix("data.")]
    else:
        where = "published"
    return [where, data[split], split_of(corpus, split, data), corpus.column, cut]


def documents_of(config: DictConfig, split: str, folder: str) -> Documents:
    """The documents of a split, in the published order.

    Args:
        config: The run's config.
        split: 'train' or 'valid'.
        folder: For a copy of them, see `load_files`.

    Raises:
        ConfigError: If no source has them; the line says what was tried.
    """
    data, corpus = config.data, CORPORA[config.data[split]]
    key, local = source_key(data, split), local_files(data, split)
    if key is not None and local is not None:
        documents = load_files(files_of(local, corpus, data, key), folder)
        is_whole = local.is_whole
    else:
        documents, is_whole = _from_hub(corpus, data, split)
    if corpus.cut is not None and (corpus.always_cut or is_whole):
        return corpus.cut(documents, split, data)
    return documents


def files_of(local: Local, corpus: Corpus, data: DictConfig, key: str) -> Files:
    """How local files of a published data set are read."""
    return Files(
        local.files,
        corpus.column,
        corpus.txt,
        on_bad_row=data.on_bad_row,
        key=key,
        column_key="column",
    )


# ---------------------------------------------------------------- the hub


def is_hub(path: Any) -> bool:
    return isinstance(path, str) and path.startswith(HUB)


def sources_of(corpus: Corpus, data: DictConfig, split: str) -> tuple[Source, ...]:
    """The sources of the table, or the one of the command line.

    hf://datasets/OWNER/NAME[@REVISION][/CONFIG], a revision's slashes written %2F.
    """
    key = source_key(data, split)
    if key is None:
        return corpus.sources
    return sources_at(data[key.removeprefix("data.")], key)


def sources_at(path: str, key: str) -> tuple[Source, ...]:
    """The source that an address of the hub means, the value of a config key."""
    found = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", path[len(HUB) :])
    if found is None:
        raise ConfigError(f"{key}={path!r} is not {HUB}OWNER/NAME[@REVISION][/CONFIG].")
    name, revision, config = found.groups()
    return (Source(name, config, revision and urllib.parse.unquote(revision)),)


def _from_hub(corpus: Corpus, data: DictConfig, split: str) -> tuple[Documents, bool]:
    """Documents of the first source that has them, and whether it has no splits."""
    is_own = source_key(data, split) is not None

    def read(source: Source) -> tuple[Documents, bool]:
        name = "train" if source.is_whole else split_of(corpus, split, data)
        documents = _load_source(source, name, corpus, data.cache_dir)
        expected = corpus.num_documents.get(name, len(documents))
        if expected != len(documents) and not (is_own or source.is_whole):
            raise ValueError(f"{len(documents)} documents instead of {expected}")
        log.info("%s: %d documents of %s", data[split], len(documents), source)
        return documents, source.is_whole

    return first_that_works(corpus, data, split, read)


def first_that_works(
    corpus: Corpus, data: DictConfig, split: str, read: Callable[[Source], T]
) -> T:
    """What the first source gives from which `read` does not fail.

    Raises:
        ConfigError: If it fails for all; each is named with its reason.
    """
    tried = []
    for source in sources_of(corpus, data, split):
        try:
            return read(source)
        except Exception as error:  # the libraries raise whatever went wrong
            tried.append(f"{source} ({first_line(error)})")
    raise unavailable(corpus, data, split, tried)


def unavailable(
    corpus: Corpus, data: DictConfig, split: str, tried: list[str]
) -> ConfigError:
    """What was tried, and the one thing that helps."""
    is_other = split == "valid" and not _is_one_corpus(data)
    key = "data.valid_source" if is_other else "data.source"
    names = dict.fromkeys(("train", corpus.valid or "validation"))
    return ConfigError(
        f"data.{split}={data[split]!r} cannot be loaded. Tried: {'; '.join(tried)}. "
        f"With the files on this machine: {key}=FOLDER (parquet, jsonl or txt, called "
        f"{' and '.join(f'{name}*' for name in names)})."
    )


def _load_source(source: Source, split: str, corpus: Corpus, cache_dir: str) -> Texts:
    """The texts of one split."""
    builder, rows = rows_of_hub(source, split, cache_dir, corpus.txt)
    if builder == "text":
        return Texts(rows, "text", corpus.txt, ".txt")
    return Texts(rows, corpus.column, corpus.txt)


def rows_of_hub(
    source: Source, split: str, cache_dir: str, txt: Txt = _TXT
) -> tuple[str, Any]:
    """The builder of one split and its rows; of the others nothing is downloaded."""
    import datasets

    with offline_unless_answered(source):
        if source.files is None and not hub_answers():  # what the library has kept
            rows = datasets.load_dataset(
                source.path,
                source.name,
                revision=source.revision,
                data_dir=source.data_dir,
                split=split,
            )
            return "", rows
        builder, files = data_files(source, split)
        return builder, load_rows(builder, files, cache_dir, txt)


def data_files(source: Source, split: str) -> tuple[str, list[str]]:
    """The builder of a source, and the files of one split, in order."""
    import datasets

    if source.files is not None:
        return source.path, [source.files[split]]
    builder = datasets.load_dataset_builder(
        source.path,
        source.name,
        revision=whole_hash(source.path, source.revision),
        data_dir=source.data_dir,
    )
    return builder.name, list(builder.config.data_files[split])


def whole_hash(repository: str, revision: str | None) -> str | None:
    """A revision as the hub takes it, which knows commits by all 40 digits alone.

    Raises:
        ValueError: If no commit of the repository begins with these digits.
    """
    from huggingface_hub import HfApi

    if revision is None or not re.fullmatch("[0-9a-f]{7,39}", revision):
        return revision
    where: dict[str, Any] = {"repo_id": repository, "repo_type": "dataset"}
    hub = HfApi()
    refs = hub.list_repo_refs(**where, include_pull_requests=True)
    for ref in (*refs.branches, *refs.converts, *(refs.pull_requests or ())):
        for commit in hub.list_repo_commits(**where, revision=ref.ref):
            if commit.commit_id.startswith(revision):
                return commit.commit_id
    raise ValueError(f"no commit begins with {revision}")


@contextlib.contextmanager
def offline_unless_answered(source: Source) -> Iterator[None]:
    """Where a source is out of reach the libraries do not try for half a minute."""
    import datasets
    import huggingface_hub

    if source.files is None:
        is_there = hub_answers()
    else:
        is_there = answers(next(iter(source.files.values())))
    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = not is_there
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


# ---------------------------------------------------------------- streams


def stream_files(data: DictConfig) -> Files:
    """The files of the training split, to be read as they are needed.

    Raises:
        ConfigError: If no source has them, or they are of no format for that.
    """
    corpus = CORPORA[data.train]
    local = local_files(data, "train")
    paths = _files_of_hub(corpus, data) if local is None else local.files
    for path in paths:
        require(format_of(path), FORMATS, "data.streaming=True: suffix", path)
    if any(path.endswith(".zst") for path in paths) and not has_zstandard():
        raise ConfigError(
            f"data.train={data.train!r} has files of .zst, which the package zstandard "
            "reads, and it is not installed: pip install zstandard."
        )
    key = source_key(data, "train") or "data.train"
    return files_of(Local(paths, is_whole=False), corpus, data, key)


def has_zstandard() -> bool:
    """Whether fsspec can decompress .zst: with the package, or Python 3.14."""
    return "zst" in compressions


def _files_of_hub(corpus: Corpus, data: DictConfig) -> list[str]:
    def read(source: Source) -> list[str]:
        with offline_unless_answered(source):
            _, paths = data_files(source, split_of(corpus, "train", data))
        return paths

    return first_that_works(corpus, data, "train", read)
