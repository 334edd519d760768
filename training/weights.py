"""Weights of an algorithm: their EMA, whole or split over processes, in and out of
checkpoints.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from checkpoints.about import disagreements, missing_plugins
from checkpoints.checkpoint import Checkpoint
from checkpoints.keys import key_report
from data.marks import tokenizer_mark
from models.ema import ExponentialMovingAverage
from models.network import Network
from models.shards import collected, is_split
from training.sharding import FullySharded, gathered
from utils import ConfigError

TOKENIZER = "data.tokenizer_name_or_path"


class Weights(lightning.LightningModule):
    """What `TrainerBase` knows of its weights."""

    config: DictConfig
    tokenizer: Any
    ema: ExponentialMovingAverage | None
    backbone: Network

    def __init__(self) -> None:
        super().__init__()
        self._split: tuple[Network, ...] = ()  # over processes
        self._is_gathered = False

    def make_ema(self) -> ExponentialMovingAverage:
        """EMA weights that start at the current ones."""
        parameters = self.averaged_parameters()
        return ExponentialMovingAverage(parameters, self.config.training.ema)

    def averaged_parameters(self) -> Iterable[nn.Parameter]:
        """Those of which there are EMA weights."""
        return self.parameters()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.averaged_parameters())

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """EMA weights (unless `eval.disable_ema`) and evaluation mode; both undone."""
        was_training = self.training
        ema = None if self.config.eval.disable_ema else self.ema
        self.eval()
        try:
            averaged = self.averaged_parameters()
            swapped = nullcontext() if ema is None else ema.applied(averaged)
            with swapped, self.whole_weights():
                yield
        finally:
            self.train(was_training)

    # ---- weights that are split over processes

    def networks(self) -> list[Network]:
        """What `strategy=fsdp` splits; all weights are in one of them."""
        return [self.backbone]

    def configure_model(self) -> None:
        """Splits the weights over processes where the strategy asks for it, once."""
        strategy = self.trainer.strategy
        if self._split or not isinstance(strategy, FullySharded):
            return
        self._split = tuple(self.networks())
        for network in self._split:
            strategy.split(network)
        rest = [name for name, x in self.named_parameters() if not is_split(x)]
        if rest:
            raise ConfigError(
                f"strategy=fsdp: {rest[0]} of algo={self.config.algo.name} is in none "
                "of its networks; choose strategy=ddp."
            )
        if self.ema is not None:
            self.ema.split(self.averaged_parameters())

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gathers weights that are split, for what is not a step of training."""
        if not self._split or self._is_gathered:
            yield
            return
        self._is_gathered = True
        try:
            strategy = cast(FullySharded, self.trainer.strategy)
            with gathered(self._split, strategy.reshard_after_forward):
                yield
        finally:
            self._is_gathered = False

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain data, so that the file loads without executing code.
        config = OmegaConf.to_container(self.config, resolve=True)
        checkpoint["hyper_parameters"] = {"config": config}
        if self.ema is not None:
            is_writer = not self._split or self.trainer.is_global_zero
            checkpoint["ema"] = collected(self.ema.state_dict(), is_writer)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self._load_ema(checkpoint.get("ema"))

    def _load_ema(self, state: Mapping[str, Any] | None) -> None:
        """Takes EMA weights over, unless there are none or the run has none."""
        if state is None or self.config.training.ema == 0:
            return
        self.ema = self.make_ema()
        self.ema.load_state_dict(dict(state))

    @torch.no_grad()
    def _set_weights(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    def load_weights(self, checkpoint: Checkpoint, key: str) -> None:
        """Takes weights and EMA over from a checkpoint.

        Args:
            checkpoint: One that has been read, of this algorithm or another one.
            key: Config key that named the file, for messages.

        Raises:
            ConfigError: If any weight is missing, unexpected or of another shape, or
                one that is used is not finite.
        """
        self.load_state_dict(self.check_weights(checkpoint, key))
        self._load_ema(checkpoint.ema)

    def check_weights(self, checkpoint: Checkpoint, key: str) -> Mapping[str, Tensor]:
        """Compares names and shapes, and warns of what the config says otherwise.

        Arguments and errors are those of `load_weights`.

        Returns:
            The weights of the checkpoint, which fit.
        """
        where = f"{key}={OmegaConf.select(self.config, key)!r}"
        if checkpoint.weights is None:
            raise ConfigError(f"{where} is not a Lightning checkpoint: no state_dict.")
        advice = missing_plugins(checkpoint, self.config)
        key_report(self, checkpoint.weights).raise_if_any(where, advice)
        config, kinds = self.config, ["raw"]
        if checkpoint.ema and config.training.ema:
            kinds = ["raw", "EMA"]
            if config.mode != "train":  # what is evaluated is one of them
                kinds = ["raw" if config.eval.disable_ema else "EMA"]
        if found := checkpoint.not_finite(kinds):
            raise ConfigError(
                f"{where} is of a run that has diverged: {found}. Take an earlier one."
            )
        known = (TOKENIZER,) if self._compare_tokenizer(checkpoint, where) else ()
        for line in disagreements(checkpoint, self.config, known):
            rank_zero_warn(f"{where}: {line}.")
        return checkpoint.weights

    def _compare_tokenizer(self, checkpoint: Checkpoint, where: str) -> bool:
        """Whether the tokenizer is known to be the checkpoint's, wherever it lies.

        Raises:
            ConfigError: If another one would change what is evaluated.
        """
        record = checkpoint.lightning.get("identity") or {}
        theirs = record.get("data", {}).get("tokenizer")
        if theirs is None or self.config.mode == "train":
            return False
        is_same = theirs == tokenizer_mark(self.tokenizer)
        if not is_same and TOKENIZER not in self.config.eval.differing:
            name = self.config.data.tokenizer_name_or_path
            stated = checkpoint.setting(TOKENIZER)
            raise ConfigError(
                f"{TOKENIZER}={name} is another tokenizer than that of {where}, which "
                f"was trained with {TOKENIZER}={stated}: give that one, or, if it is "
                f"meant, add eval.differing=[{TOKENIZER}]."
            )
        return is_same
