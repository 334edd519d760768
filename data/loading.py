"""How each data set of the table (`registry.py`) becomes rows of `model.length` tokens.

documents (`files.py`, `sources.py`) -> rows (`packing.py`, `cache.py`)
"""

import functools
import hashlib
import json
import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from data.cache import stored_rows
from data.detokenizers import DETOKENIZERS, TEXT8, Rules
from data.docstrings import docstrings, standard_library
from data.documents import Documents, Listed
from data.files import find_files, load_files, state_of
from data.packing import Layout, lay_out, tokenize
from data.published import CORPORA, published_documents
from data.readers import Files
from data.rows import TokenRows, batch_of
from data.sources import documents_of, identity, stream_files
from data.streaming import Stream
from data.synthetic import synthetic_rows
from utils import ConfigError

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- layout


def published_separator(tokenizer: Any) -> int:
    """What published runs put between packed documents: `algo.compat=reference`.

    NOTE(compat): the first token of encode(eos), which is [CLS] for BERT tokenizers.
    """
    eos = tokenizer.eos_token
    return tokenizer.encode(eos, split_special_tokens=False)[0]


# By `algo.compat`: the token that separates packed documents.
SEPARATORS: dict[str, Callable[[Any], int]] = {
    "paper": operator.attrgetter("eos_token_id"),
    "reference": published_separator,
}


def layout_of(config: DictConfig, tokenizer: Any, split: str) -> Layout:
    """How `data.wrap` and its neighbours lay out the rows of a split."""
    data = config.data
    return Layout(
        length=config.model.length,
        bos=tokenizer.bos_token_id,
        eos=SEPARATORS[config.algo.compat](tokenizer),
        pad=tokenizer.pad_token_id,
        wrap=data.wrap,
        insert_eos=data[f"insert_{split}_eos"],
        keep_remainder=data.keep_remainder,
    )


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer from others, for the key of what it has made."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind, content = type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())
    if backend is not None:
        kind, content = "fast", backend.to_str()
    state = {
        "tokenizer": f"{kind} {_digest(content)}",
        "vocab_size": len(tokenizer),
    }
    if tokenizer.split_special_tokens:
        state["special_tokens_in_text"] = "split"
    return state


def _digest(content: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---------------------------------------------------------------- data sets


def load_synthetic(config: DictConfig, tokenizer: Any, split: str) -> TokenRows:
    """Seeded synthetic rows; see `synthetic_rows`."""
    num_rows, seed = {
        "train": (config.data.num_train, 42),
        "valid": (config.data.num_valid, 41),
    }[split]
    ids = synthetic_rows(num_rows, config.model.length, config.data.vocab_size, seed)
    return TokenRows(ids)


def load_docstrings(config: DictConfig, tokenizer: Any, split: str) -> TokenRows:
    """Documentation strings of the standard library, one document a module.

    A module belongs to the validation split if the hash of its name falls below
    `data.valid_fraction`, so the split does not depend on what else is installed.
    """
    files = standard_library()

    def documents(folder: str) -> Listed:
        texts = []
        for name, text in docstrings(files):
            digest = hashlib.sha256(name.encode()).digest()
            held_out = int.from_bytes(digest[:8]) / 2**64 < config.data.valid_fraction
            if held_out == (split == "valid"):
                texts.append(text)
        return Listed(texts)

    where = [state_of(files), config.data.valid_fraction, split]
    return packed(config, tokenizer, split, documents, where, TEXT8)


def load_text_files(config: DictConfig, tokenizer: Any, split: str) -> TokenRows:
    """The user's own files; see configs/data/text_files.yaml."""
    data = config.data
    key = "valid_path" if split == "valid" and data.valid_path else "path"
    files = text_files(config, key)
    documents = functools.partial(load_files, files)
    rules = text_rules(config)
    where = [state_of(files.paths), data.text_column, data.on_bad_row]
    name = "text_files"  # of both splits: rows of the same files are made once
    rows = packed(
        config, tokenizer, split, documents, where, rules, name=name, drop_empty=True
    )
    if data.valid_path or not len(rows):
        return rows
    head, tail = rows.split_tail(data.valid_fraction)
    return tail if split == "valid" else head


def stream_text_files(config: DictConfig, tokenizer: Any) -> Stream:
    """The user's own files, read as they are needed."""
    files = text_files(config, "path")
    return stream_of(files, config, tokenizer, text_rules(config))


def text_files(config: DictConfig, key: str) -> Files:
    """The files of `data.path` or `data.valid_path`, and how they are read."""
    data = config.data
    return Files(
        find_files(data[key], f"data.{key}"),
        data.text_column,
        drop_empty=True,
        on_bad_row=data.on_bad_row,
        key=f"data.{key}",
    )


def text_rules(config: DictConfig) -> Rules:
    """What is done to the user's texts first."""
    return TEXT8 if config.data.tokenizer_name_or_path == "text8" else ()


def load_source(
    source: Callable[[DictConfig, str], Iterable[str]],
    config: DictConfig,
    tokenizer: Any,
    split: str,
) -> TokenRows:
    """The texts that a function gives (`data.registry.Source`).

    They are all asked for each time, since only their hash tells whether the cache has
    their rows.

    Raises:
        ConfigError: If one is no text.
    """
    texts = list(source(config, split))
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(
                f"data.{split}={config.data[split]!r} gives {text!r:.80}, a "
                f"{type(text).__name__}; a data set gives texts."
            )
    rules = text_rules(config)
    return packed(config, tokenizer, split, lambda folder: Listed(texts), texts, rules)


def load_published(config: DictConfig, tokenizer: Any, split: str) -> TokenRows:
    """A split of a data set of `published.CORPORA`."""
    documents = functools.partial(documents_of, config, split)
    rules, where = rules_of(config, split), identity(config, split)
    rows = packed(config, tokenizer, split, documents, where, rules)
    published = published_documents(config, split)
    if published not in (None, rows.num_documents):
        log.warning(
            "data.%s=%s: %s documents, the published set has %d; numbers of the two "
            "cannot be compared",
            *(split, config.data[split], rows.num_documents, published),
        )
    return rows


def load_crops(config: DictConfig, tokenizer: Any, split: str) -> TokenRows:
    """Rows of twice the content, of which training takes a random part."""
    if split == "valid":
        return load_published(config, tokenizer, split)
    size = config.model.length - 2
    longer = config.copy()
    OmegaConf.set_readonly(longer, False)
    longer.model.length = 2 * size + 2
    rows = load_published(longer, tokenizer, split)
    return CroppedRows(rows, size)


def stream_published(config: DictConfig, tokenizer: Any) -> Stream:
    """The training split of a data set of `published.CORPORA`, read as needed."""
    files = stream_files(config.data)
    return stream_of(files, config, tokenizer, rules_of(config, "train"))


def stream_of(files: Files, config: DictConfig, tokenizer: Any, rules: Rules) -> Stream:
    """Training rows of files, in the order of the run's seed."""
    return Stream(
        files,
        tokenizer,
        rules,
        layout_of(config, tokenizer, "train"),
        seed=config.seed,
        block=config.data.shuffle_rows,
    )


def rules_of(config: DictConfig, split: str) -> Rules:
    """The detokenizer of a split: `data.detokenizer`, or the data set's own."""
    name = config.data.detokenizer or CORPORA[config.data[split]].detokenizer
    return DETOKENIZERS[name]


def packed(
    config: DictConfig,
    tokenizer: Any,
    split: str,
    documents: Callable[[str], Documents],
    where: Any,
    rules: Rules,
    *,
    name: str | None = None,
    drop_empty: bool = False,
) -> TokenRows:
    """Rows of documents, from the cache of `data.cache_dir` or into it.

    Args:
        config: The run's config.
        tokenizer: From `get_tokenizer`.
        split: 'train' or 'valid'.
        documents: Gives them if they have to be tokenised, with a folder for a copy.
        where: What tells these documents from others, JSON.
        rules: Run on every text first.
        name: Of the folder in the cache; by default data set and split.
        drop_empty: Whether documents without text are left out.
    """
    data, layout = config.data, layout_of(config, tokenizer, split)
    made: list[Documents] = []
    key = {
        "documents": _digest(where),
        "detokenizer": _digest(repr(rules)),
        "drop_empty": drop_empty,
        **tokenizer_state(tokenizer),
    }

    def build(folder: str) -> Iterator[Any]:
        made[:] = [documents(folder)]
        chunks = tokenize(
            made[0],
            tokenizer,
            rules,
            num_proc=data.num_proc,
            name=data[split],
            drop_empty=drop_empty,
        )
        return lay_out(chunks, layout)

    def about() -> dict[str, int]:
        return {
            "num_documents": made[0].num_whole,
            "num_skipped": made[0].num_skipped,
        }

    name = name or f"{data[split]}-{split}"
    rows = stored_rows(data.cache_dir, name, key, layout, build, about)
    if rows.num_skipped:
        log.warning(
            "data.%s=%s: %d rows could not be read and were passed over "
            "(data.on_bad_row=skip)",
            *(split, data[split], rows.num_skipped),
        )
    return rows


class CroppedRows(TokenRows):
    """Rows of which a part is handed out: bos, `size` tokens from some start, eos.

    Args:
        rows: bos, 2 * size tokens, eos each.
        size: L - 2.
    """

    def __init__(self, rows: TokenRows, size: int) -> None:
        super().__init__(rows.ids, counts=rows.counts())
        self.num_starts = size + 1

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch, (B, L); an index is row + number of rows * start."""
        starts, rows = np.divmod(np.asarray(indices), len(self))
        ids = np.asarray(self.ids[rows])
        size = self.num_starts - 1
        columns = 1 + starts[:, None] + np.arange(size)
        content = np.take_along_axis(ids, columns, axis=1)
        cropped = np.concatenate([ids[:, :1], content, ids[:, -1:]], axis=1)
        return batch_of(cropped)
