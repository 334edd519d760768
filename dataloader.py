"""Data: batches in a reproducible order, from any position of it, and the DataModule.

    rows or a stream of a data set (`data/registry.py`) -> batches

A batch is {'input_ids', 'attention_mask'}, both (B, L); of data with classes
'labels', (B,), too. Nothing here knows an
algorithm; what one needs of the data (its mask id) is passed in.
"""

import atexit
import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from data.registry import DATASETS
from data.rows import REPEATED, TokenRows
from data.streaming import Stream, StreamLoader
from data.tokenizers import padding_id
from utils import STOP_SIGNALS, ConfigError

# ---------------------------------------------------------------- order


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
        num_starts: Of the crops or forms of a row, each of which is as probable; an
            index is row + num_rows * start.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        accumulate: int = 1,
        num_starts: int = 1,
    ) -> None:
        self.num_rows = num_rows
        self.num_starts = num_starts
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
        yield from self.indices()[self.start * self.batch_size :].tolist()

    def indices(self) -> np.ndarray:
        """Of this rank in the whole epoch."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = self._with_starts(random.permutation(self.num_rows), random)
        used = self.num_batches * self.world_size * self.batch_size
        shape = (self.num_batches, self.world_size, self.batch_size)
        return order[:used].reshape(shape)[:, self.rank].ravel()

    def _with_starts(
        self, order: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Rows in their order, each with the start that is drawn for it."""
        if self.num_starts > 1:
            order += self.num_rows * random.integers(self.num_starts, size=len(order))
        return order

    @staticmethod
    def starts_of(rows: TokenRows) -> int:
        """How many starts of a row are drawn from."""
        return rows.num_starts


class ReferenceOrder(EpochOrder):
    """The order of the published code: `algo.compat=reference`.

    Rank r takes the places r, r + W, ... of torch's permutation. NOTE(compat): on one
    device, the permutations of all epochs come from one generator. Images are flipped,
    as published, by draws of ours, of which a run that goes on makes the same; crops
    are not taken.
    """

    @staticmethod
    def starts_of(rows: TokenRows) -> int:
        return rows.num_published_starts

    def indices(self) -> np.ndarray:
        generator = torch.Generator()
        if self.world_size > 1:
            generator.manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_rows, generator=generator)
        else:
            generator.manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                order = torch.randperm(self.num_rows, generator=generator)
        random = np.random.default_rng([self.seed, self.epoch])
        indices = self._with_starts(order.numpy(), random)
        used = self.num_batches * self.world_size * self.batch_size
        return indices[:used][self.rank :: self.world_size]


# By `algo.compat`.
ORDERS: dict[str, type[EpochOrder]] = {"paper": EpochOrder, "reference": ReferenceOrder}


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

    # torch declares its own iterator, of which nothing but the batches is needed.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
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


def validation_batches(
    num_rows: int, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """One rank's rows of a validation, batch by batch.

    Batch m of all ranks together is the slice [m W b, (m + 1) W b) of all rows, rank r
    having the r-th b of it. Each rank has as many batches, since all of them have to
    take part in what runs on all devices; so the last one of some may be empty.

    Args:
        num_rows: Of the split.
        batch_size: b.
        rank, world_size: r and W.
    """
    width = world_size * batch_size
    starts = range(rank * batch_size, num_rows + rank * batch_size, width)
    return [list(range(x, min(x + batch_size, num_rows))) for x in starts]


class Measured(Dataset):
    """Rows of which every one counts once; in the place of none a row that does not.

    Args:
        rows: All of them.
    """

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        if indices:
            return self.rows.__getitems__(indices)
        return self.rows.__getitems__([0]) | {REPEATED: True}


def check_limit(config: DictConfig, num_rows: int) -> None:
    """Refuses a share of the validation that has no batch.

    Args:
        config: The run's config.
        num_rows: Of the validation.
    """
    limit, trainer = config.trainer.limit_val_batches, config.trainer
    if not isinstance(limit, float) or not 0 < limit < 1:
        return
    at_once = trainer.devices * trainer.num_nodes * config.loader.eval_batch_size
    batches = math.ceil(num_rows / at_once)
    if batches and int(batches * limit) == 0:
        raise ConfigError(
            f"trainer.limit_val_batches={limit}: this share of {batches} validation "
            "batches is none; give 1 for one batch, 1.0 for all."
        )


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
        self._rows: dict[str, TokenRows] = {}
        self._stream: Stream | None = None

    def load(self, split: str) -> TokenRows:
        """Rows of `split`, 'train' or 'valid', read once."""
        if split not in self._rows:
            name = self.config.data[split]
            rows = DATASETS[name].load(self.config, self.tokenizer, split)
            self._check(rows, split)
            self._rows[split] = rows
        return self._rows[split]

    def load_training(self) -> TokenRows | Stream:
        """What is trained on: rows, or a stream of them (`data.streaming`)."""
        spec = DATASETS[self.config.data.train]
        if not self.config.data.streaming or spec.streamer is None:
            rows, needed = self.load("train"), self.config.loader.global_batch_size
            if len(rows) < needed:
                raise ConfigError(
                    f"data.train={self.config.data.train!r} has {len(rows)} rows, "
                    f"fewer than one batch of {needed}; lower "
                    "loader.global_batch_size or model.length."
                )
            return rows
        if self._stream is None:
            self._stream = spec.stream(self.config, self.tokenizer)
            row = self._stream.first_row()  # also that it can be read
            self._check_ids(row.ids[: row.num_valid])
        return self._stream

    def _check(self, rows: TokenRows, split: str) -> None:
        where = f"data.{split}={self.config.data[split]!r}"
        if not len(rows):
            raise ConfigError(
                f"{where} is empty: it does not fill one row of "
                f"model.length={self.config.model.length} tokens."
            )
        if self.mask_index is not None and rows.valid_count(
            self.mask_index, self.tokenizer.pad_token_id
        ):
            raise self._holds_mask(split)

    def _check_ids(self, ids: Any) -> None:
        """Refuses a mask in training data."""
        if self.mask_index is not None and (ids == self.mask_index).any():
            raise self._holds_mask("train")

    def _holds_mask(self, split: str) -> ConfigError:
        token = self.tokenizer.convert_ids_to_tokens(self.mask_index)
        key, is_text = (
            "data.special_tokens_in_text",
            self.tokenizer.split_special_tokens,
        )
        cure = "take it out of the text" if is_text else f"{key}=split makes it text"
        return ConfigError(
            f"data.{split}={self.config.data[split]!r} holds token {self.mask_index}, "
            f"{token!r}, which is the mask of algo={self.config.algo.name}; {cure}."
        )

    def train_dataloader(self) -> DataLoader:
        source = self.load_training()
        config, (rank, world_size) = self.config, self._rank()
        accumulate = config.trainer.accumulate_grad_batches
        if isinstance(source, Stream):
            source.rank, source.world_size = rank, world_size
            source.batch_size = config.loader.batch_size
            gather = functools.partial(_of_ranks, world_size)
            options = self._options() | {"persistent_workers": False}
            if not config.loader.num_workers:
                del options["persistent_workers"]
            return StreamLoader(source, gather, self._check_ids, **options)
        kind = ORDERS[config.algo.compat]
        order = kind(
            len(source),
            config.loader.batch_size,
            rank,
            world_size,
            config.seed,
            accumulate,
            kind.starts_of(source),
        )
        return TrainLoader(source, order, **self._options())

    def val_dataloader(self) -> DataLoader:
        """Every row once, in order."""
        rows = self.load("valid")
        batch_size = self.config.loader.eval_batch_size
        batches = validation_batches(len(rows), batch_size, *self._rank())
        return DataLoader(Measured(rows), batch_sampler=batches, **self._options())

    def _rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _padding(self) -> int | None:
        """What takes the place of the pad in batches, where that is the mask."""
        pad = self.tokenizer.pad_token_id
        if self.mask_index is None or pad is None:
            return None
        padding = padding_id(self.tokenizer, self.mask_index)
        return None if padding == pad else padding

    def _options(self) -> dict[str, Any]:
        """Of both loaders."""
        loader = self.config.loader
        options = {
            "collate_fn": functools.partial(_as_fetched, self._padding()),
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


def _as_fetched(padding: int | None, fetched: Any) -> Any:
    """What rows and streams give is a batch already; other padding, if any.

    A stream gives a batch and where it goes on.
    """
    if padding is not None:
        batch = fetched[0] if isinstance(fetched, tuple) else fetched
        batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, padding)
    return fetched


def _of_ranks(world_size: int, value: Any) -> list[Any]:
    """What every rank gives, in their order."""
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values
