"""Data: tokenizers, the table of data sets, packing, and the DataModule.

    documents (`corpora.py`) -> token ids -> rows of `model.length` -> batches

A batch is {'input_ids', 'attention_mask'}, both (B, L) int64. Nothing here knows an
algorithm; what one needs of the data (its mask id) is passed in.
"""

import atexit
import functools
import hashlib
import multiprocessing
import os
import signal
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from corpora import (
    find_files,
    read_texts,
    standard_library_docstrings,
    synthetic_rows,
    text8_normalize,
)
from utils import STOP_SIGNALS, ConfigError, choose, first_line, hub_options, require

# ---------------------------------------------------------------- tokenizers


def get_tokenizer(config: DictConfig) -> Any:
    """The tokenizer that `data.tokenizer_name_or_path` names.

    A missing bos falls back to cls, a missing eos to sep; a missing pad is added.

    Returns:
        A `transformers` tokenizer.

    Raises:
        ConfigError: If it cannot be loaded, or has neither bos nor cls.
    """
    name = config.data.tokenizer_name_or_path
    tokenizer = TOKENIZERS.get(name, _pretrained_tokenizer)(config)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r} has no bos/cls or no eos/sep token; "
            "choose a tokenizer that has both."
        )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def _pretrained_tokenizer(config: DictConfig) -> Any:
    from transformers import AutoTokenizer

    name = config.data.tokenizer_name_or_path
    try:
        options = hub_options(name) | {"trust_remote_code": False}  # nor ask for it
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # the libraries raise OSError, ValueError, and others
        reason = first_line(error)
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r} cannot be loaded ({reason}). "
            f"Choose {', '.join(TOKENIZERS)}, a local folder, or a reachable hub id."
        ) from None


def _character_tokenizer(
    vocab: list[str], unk_token: str | None = None, **special: str
) -> tuple[Any, dict[str, str]]:
    """A core that cuts text into single entries of `vocab`, and its special tokens."""
    from tokenizers import Tokenizer, decoders, models

    ids = {token: index for index, token in enumerate(vocab)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=unk_token))
    core.decoder = decoders.Fuse()
    return core, special | ({"unk_token": unk_token} if unk_token else {})


def _fast(core: Any, special: dict[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )


def text8_tokenizer(config: DictConfig | None = None) -> Any:
    """27 characters and 8 special tokens; K = 35, mask id 4."""
    from tokenizers import normalizers

    names = ("CLS", "SEP", "BOS", "EOS", "MASK", "PAD", "RESERVED", "UNK")
    vocab = [f"[{name}]" for name in names] + [*string.ascii_lowercase, " "]
    roles = ("cls", "sep", "bos", "eos", "mask", "pad")
    core, special = _character_tokenizer(
        vocab,
        unk_token="[UNK]",
        **{f"{role}_token": f"[{role.upper()}]" for role in roles},
    )
    core.normalizer = normalizers.Lowercase()
    return _fast(core, special)


def bytes_tokenizer(config: DictConfig | None = None) -> Any:
    """UTF-8 bytes, then bos, eos, mask, pad; K = 260."""
    from tokenizers import decoders, pre_tokenizers

    roles = ("bos", "eos", "mask", "pad")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core, special = _character_tokenizer(
        alphabet + [f"[{role.upper()}]" for role in roles],
        **{f"{role}_token": f"[{role.upper()}]" for role in roles},
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    return _fast(core, special)


def synthetic_tokenizer(config: DictConfig) -> Any:
    """Numbers 0 .. K - 3 written in decimal, then bos and eos; no mask."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab_size = config.data.vocab_size
    vocab = [f"{number} " for number in range(vocab_size - 2)] + ["[BOS]", "[EOS]"]
    ids = {token: index for index, token in enumerate(vocab)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[EOS]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+ "), "isolated")
    core.decoder = decoders.Fuse()
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
    return _fast(core, special)


TOKENIZERS: dict[str, Callable[[DictConfig], Any]] = {
    "text8": text8_tokenizer,
    "bytes": bytes_tokenizer,
    "synthetic": synthetic_tokenizer,
}


# ---------------------------------------------------------------- rows


class Fingerprint(NamedTuple):
    """Of a split's rows; equal for equal rows, however they were made."""

    rows: int
    tokens: int  # bos and eos included, padding not
    sha256: str  # of each row's number of tokens, and of the tokens


class TokenRows(Dataset):
    """Rows of token ids, handed out a batch at a time.

    Args:
        ids: (N, L) integers.
        num_valid: Tokens before the padding of each row, (N,); None: no padding.
    """

    def __init__(self, ids: np.ndarray, num_valid: np.ndarray | None = None) -> None:
        self.ids = ids
        self.num_valid = num_valid

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: x[0] for name, x in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch, (B, L) each; torch's fetcher calls this."""
        ids = torch.from_numpy(self.ids[indices].astype(np.int64))
        mask = torch.ones(ids.shape)
        if self.num_valid is not None:
            num_valid = torch.from_numpy(self.num_valid[indices])
            mask = (torch.arange(ids.shape[1]) < num_valid[:, None]).float()
        return {"input_ids": ids, "attention_mask": mask}

    def valid_ids(self) -> np.ndarray:
        """All token ids but the padding, (number of them,)."""
        if self.num_valid is None:
            return self.ids.ravel()
        return self.ids[np.arange(self.ids.shape[1]) < self.num_valid[:, None]]

    def fingerprint(self, chunk: int = 4096) -> Fingerprint:
        """What two people compare to see whether they measured on the same rows."""
        digest, tokens = hashlib.sha256(), 0
        for start in range(0, len(self), chunk):
            part = TokenRows(
                np.asarray(self.ids[start : start + chunk]),
                None
                if self.num_valid is None
                else self.num_valid[start : start + chunk],
            )
            widths = part.num_valid
            if widths is None:
                widths = np.full(len(part), part.ids.shape[1])
            ids = part.valid_ids()
            digest.update(widths.astype("<i4").tobytes())
            digest.update(ids.astype("<i4").tobytes())
            tokens += ids.size
        return Fingerprint(len(self), tokens, digest.hexdigest())

    def split_tail(self, fraction: float) -> tuple["TokenRows", "TokenRows"]:
        """The first rows, and the last `fraction` of them (at least one)."""
        cut = len(self) - max(1, round(fraction * len(self)))
        parts = (slice(0, cut), slice(cut, None))
        head, tail = (
            TokenRows(
                self.ids[part], None if self.num_valid is None else self.num_valid[part]
            )
            for part in parts
        )
        return head, tail


def pack(
    documents: Iterable[np.ndarray],
    *,
    length: int,
    bos: int,
    eos: int,
    insert_eos: bool,
) -> TokenRows:
    """Concatenates documents and cuts the stream into full rows.

    A row is bos, L - 2 tokens of the stream, eos; the remainder is dropped.

    Args:
        documents: Token ids of each document, in order.
        length: L.
        bos, eos: Ids around every row.
        insert_eos: Whether eos also follows every document in the stream.
    """
    end = np.array([eos] if insert_eos else [], dtype=np.int32)
    parts = [part for document in documents for part in (document, end)]
    stream = np.concatenate(parts) if parts else end[:0]
    num_rows = len(stream) // (length - 2)
    ids = np.empty((num_rows, length), dtype=np.int32)
    ids[:, 0], ids[:, -1] = bos, eos
    ids[:, 1:-1] = stream[: num_rows * (length - 2)].reshape(num_rows, length - 2)
    return TokenRows(ids)


def pad(
    documents: Iterable[np.ndarray], *, length: int, bos: int, eos: int, pad_id: int
) -> TokenRows:
    """One document a row: bos, at most L - 2 tokens, eos, then padding."""
    documents = list(documents)
    ids = np.full((len(documents), length), pad_id, dtype=np.int32)
    num_valid = np.empty(len(documents), dtype=np.int64)
    for row, document in enumerate(documents):
        content = document[: length - 2]
        ids[row, 0] = bos
        ids[row, 1 : 1 + len(content)] = content
        ids[row, 1 + len(content)] = eos
        num_valid[row] = len(content) + 2
    return TokenRows(ids, num_valid)


def tokenize(
    texts: list[str], tokenizer: Any, batch_size: int = 256
) -> Iterator[np.ndarray]:
    """Token ids of each text, without special tokens, with a progress bar."""
    for start in tqdm(range(0, len(texts), batch_size), "tokenizing", leave=False):
        batch = texts[start : start + batch_size]
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def rows_of_texts(
    texts: list[str], config: DictConfig, tokenizer: Any, *, insert_eos: bool
) -> TokenRows:
    """Tokenises documents and lays them out as `data.wrap` says."""
    eos = tokenizer.eos_token_id
    if config.algo.compat == "reference":
        # NOTE(compat): the reference separates packed documents by the first token
        # of encode(eos), which is [CLS] for BERT tokenizers.
        eos = tokenizer.encode(tokenizer.eos_token)[0]
    documents = tokenize(texts, tokenizer)
    frame = {"length": config.model.length, "bos": tokenizer.bos_token_id, "eos": eos}
    if config.data.wrap:
        return pack(documents, insert_eos=insert_eos, **frame)
    return pad(documents, pad_id=tokenizer.pad_token_id, **frame)


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
    texts = []
    for name, text in standard_library_docstrings():
        digest = hashlib.sha256(name.encode()).digest()
        held_out = int.from_bytes(digest[:8]) / 2**64 < config.data.valid_fraction
        if held_out == (split == "valid"):
            texts.append(text8_normalize(text))
    insert_eos = config.data[f"insert_{split}_eos"]
    return rows_of_texts(texts, config, tokenizer, insert_eos=insert_eos)


def load_text_files(config: DictConfig, tokenizer: Any, split: str) -> TokenRows:
    """The user's own files; see configs/data/text_files.yaml."""
    data = config.data
    insert_eos = data[f"insert_{split}_eos"]
    key = "valid_path" if split == "valid" and data.valid_path else "path"
    files = find_files(data[key], f"data.{key}")
    texts = read_texts(files, f"data.{key}", data.text_column, data.cache_dir)
    if data.tokenizer_name_or_path == "text8":
        texts = [text8_normalize(text) for text in texts]
    rows = rows_of_texts(texts, config, tokenizer, insert_eos=insert_eos)
    if data.valid_path or not len(rows):
        return rows
    head, tail = rows.split_tail(data.valid_fraction)
    return tail if split == "valid" else head


def check_text_files(config: DictConfig) -> None:
    """Refuses missing files and unknown formats before anything is loaded."""
    data = config.data
    find_files(data.path, "data.path")
    if data.valid_path:
        find_files(data.valid_path, "data.valid_path")
    elif not 0 < data.valid_fraction < 1:
        raise ConfigError(
            f"data.valid_fraction={data.valid_fraction} is not between 0 and 1; "
            "or give data.valid_path."
        )


class DatasetSpec(NamedTuple):
    """How a data set is read: (config, tokenizer, split) -> rows."""

    load: Callable[[DictConfig, Any, str], TokenRows]
    check: Callable[[DictConfig], None] | None = None  # quick, before anything else
    can_stream: bool = False


# By `data.train` and `data.valid`.
DATASETS = {
    "synthetic": DatasetSpec(load_synthetic, can_stream=True),
    "docstrings": DatasetSpec(load_docstrings),
    "text_files": DatasetSpec(load_text_files, check=check_text_files),
}


# ---------------------------------------------------------------- loading


class EpochOrder(Sampler[int]):
    """One rank's row indices of an epoch: a function of seed, epoch and rank alone.

    Micro-batch m of all ranks together is the slice [m W b, (m + 1) W b) of a
    permutation, rank r taking the r-th b of it. So W ranks with batch b see the rows
    of one rank with batch W b, in order. The last rows of an epoch, which do not fill
    an update, are left out.

    Args:
        num_rows: Rows of the data set.
        batch_size: b, rows of one rank's micro-batch.
        rank, world_size: r and W.
        seed: Of the permutation, together with the epoch.
        accumulate: Micro-batches of an update.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        accumulate: int = 1,
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0  # micro-batches to leave out at the beginning
        num_updates = num_rows // (batch_size * world_size * accumulate)
        self.num_batches = num_updates * accumulate

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(
            self.num_rows
        )
        used = self.num_batches * self.world_size * self.batch_size
        shape = (self.num_batches, self.world_size, self.batch_size)
        yield from order[:used].reshape(shape)[self.start :, self.rank].ravel().tolist()


class TrainLoader(DataLoader):
    """Batches in an `EpochOrder`, from any position of it, at the cost of none before.

    The position counts batches that have been handed out, not those that workers have
    fetched ahead. Lightning keeps it in checkpoints.

    Args:
        rows: The data set.
        order: Its order.
        options: Of torch's `DataLoader`.
    """

    def __init__(self, rows: TokenRows, order: EpochOrder, **options: Any) -> None:
        self.order = order
        self._done = 0  # batches of the epoch that have been handed out
        super().__init__(rows, order.batch_size, sampler=order, **options)

    def __iter__(self) -> Iterator[Any]:
        self._done = self.order.start
        for batch in super().__iter__():
            self.order.start = 0  # the next epoch is a whole one
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the rows of it that all ranks have seen."""
        order = self.order
        rows = self._done * order.batch_size * order.world_size
        return {"epoch": order.epoch, "rows": rows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        order = self.order
        batches = state["rows"] // (order.batch_size * order.world_size)
        is_over = batches >= order.num_batches
        order.epoch = state["epoch"] + is_over
        order.start = 0 if is_over else batches


class DataModule(lightning.LightningDataModule):
    """Train and validation rows of the configured data set.

    Args:
        config: The run's config.
        tokenizer: From `get_tokenizer`.
        mask_index: The model's mask id, which clean data must not hold.

    Raises:
        ConfigError: On `load` if a split has no row, or too few for a batch.
    """

    def __init__(
        self, config: DictConfig, tokenizer: Any, mask_index: int | None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.mask_index = mask_index
        self.rows: dict[str, TokenRows] = {}

    @staticmethod
    def validate_config(config: DictConfig, splits: Iterable[str]) -> None:
        """Refuses unknown data sets and layouts before anything is read."""
        for split in splits:
            name = config.data[split]
            spec = choose(DATASETS, name, f"data.{split}")
            if config.data.streaming and not spec.can_stream:
                raise ConfigError(
                    f"data.streaming=True is not supported for data.{split}={name!r}; "
                    "the only value is False."
                )
            if spec.check is not None:
                spec.check(config)
        require(config.data.modality, ["text"], "data.modality")
        if config.model.length < 3:
            raise ConfigError(
                f"model.length={config.model.length}: a row holds bos, at least one "
                "token, and eos; give 3 or more."
            )

    def load(self, split: str) -> TokenRows:
        """Rows of `split`, 'train' or 'valid', read once."""
        if split not in self.rows:
            name = self.config.data[split]
            rows = DATASETS[name].load(self.config, self.tokenizer, split)
            self._check(rows, split, name)
            self.rows[split] = rows
        return self.rows[split]

    def _check(self, rows: TokenRows, split: str, name: str) -> None:
        where = f"data.{split}={name!r}"
        if not len(rows):
            raise ConfigError(
                f"{where} is empty: it does not fill one row of "
                f"model.length={self.config.model.length} tokens."
            )
        if self.mask_index is not None and (rows.ids == self.mask_index).any():
            raise ConfigError(
                f"{where} holds token {self.mask_index}, which is the mask of "
                f"algo={self.config.algo.name}; with data.wrap=False the tokenizer "
                "needs a mask token apart from its pad token."
            )
        loader = self.config.loader
        needed = loader.global_batch_size
        if split == "train" and len(rows) < needed:
            raise ConfigError(
                f"{where} has {len(rows)} rows, fewer than one batch of {needed}; "
                "lower loader.global_batch_size or model.length."
            )

    def train_dataloader(self) -> DataLoader:
        rows = self.load("train")
        order = EpochOrder(
            len(rows),
            self.config.loader.batch_size,
            *self._rank(),
            self.config.seed,
            self.config.trainer.accumulate_grad_batches,
        )
        return TrainLoader(rows, order, **self._options())

    def val_dataloader(self) -> DataLoader:
        """Every row once, in order; ranks take contiguous shares."""
        rows = self.load("valid")
        rank, world_size = self._rank()
        share = np.array_split(np.arange(len(rows)), world_size)[rank].tolist()
        batch_size = self.config.loader.eval_batch_size
        return DataLoader(rows, batch_size, sampler=share, **self._options())

    def _rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _options(self) -> dict[str, Any]:
        """Of both loaders."""
        loader = self.config.loader
        options = {
            "collate_fn": _as_fetched,
            "pin_memory": loader.pin_memory and torch.cuda.is_available(),
        }
        if not loader.num_workers:
            return options
        is_over = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, is_over, "value", 1)
        return options | {
            "num_workers": loader.num_workers,
            "persistent_workers": True,
            "worker_init_fn": functools.partial(_outlast_signals, is_over),
        }


def _outlast_signals(is_over: Any, worker: int) -> None:
    """A worker ends with the process it works for, and not before.

    Slurm and terminals send their signals to every process, but an update has to be
    finished and saved before the run may end.

    Args:
        is_over: Shared with the main process, which sets its value when it ends.
        worker: Index of the worker.
    """

    def end(number: int, frame: Any) -> None:
        if is_over.value:
            os._exit(0)

    for number in STOP_SIGNALS:
        signal.signal(number, end)


def _as_fetched(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`TokenRows.__getitems__` already returns a batch."""
    return batch
