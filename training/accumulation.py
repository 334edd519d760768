"""Micro-batches of an update, on all ranks, as the one batch that they are parts of."""

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor

from models.device import wide_dtype
from models.head import Loss
from models.shards import local


class Accumulation(lightning.LightningModule):
    """Weighs micro-batches by their tokens, where rows are padded.

    With S_i the summed loss of micro-batch i of any rank and n_i its tokens, an update
    follows the gradient of the mean over all tokens of its batch, however that is cut:

        sum_i S_i / sum_i n_i = f sum_i (S_i / n_i) (n_i / m) / k,  f = k m / sum_i n_i

    for k micro-batches, m the tokens of one whose rows are full. The factor n_i / m
    goes into each loss; f, which is known at the end, into the gradients. Where all
    rows are full both are 1 and nothing changes.

    NOTE(compat): the published code gives the mean of each micro-batch the same weight.
    """

    counts_vary = False  # whether n_i varies also where all rows are full
    config: DictConfig
    num_tokens: int  # L

    def __init__(self) -> None:
        super().__init__()
        self._num_batches = 0  # k of this rank
        self._tokens: Tensor | None = None  # sum_i n_i of this rank

    def valid_tokens(self, attention_mask: Tensor) -> Tensor:
        """Which positions of a loss count, from the batch's mask (B, L)."""
        raise NotImplementedError

    def weighed(self, losses: Loss) -> Tensor:
        """The loss of a micro-batch as backward takes it, a scalar."""
        if not self._are_weighed():
            return losses.loss
        tokens = losses.num_tokens.sum()
        self._num_batches += 1
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        return losses.loss * (tokens / self._full_tokens()).to(losses.loss.dtype)

    def weigh_gradients(self) -> None:
        """Multiplies gradients that are accumulated and averaged over ranks by f."""
        if self._tokens is None:
            return
        tokens = self._tokens.to(wide_dtype(self._tokens.device))
        world_size = self.trainer.world_size
        if world_size > 1:
            torch.distributed.all_reduce(tokens)
        full = self._full_tokens() * self._num_batches * world_size
        factor = full / tokens.clamp(min=1)
        grads = [local(p.grad) for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
        self._num_batches, self._tokens = 0, None

    def _are_weighed(self) -> bool:
        config = self.config
        is_cut = config.loader.global_batch_size > config.loader.batch_size
        varies = self.counts_vary or not config.data.wrap
        return is_cut and varies and config.algo.compat != "reference"

    def _full_tokens(self) -> int:
        """m."""
        row = self.valid_tokens(torch.ones(1, self.num_tokens))
        return self.config.loader.batch_size * int(row.sum())
