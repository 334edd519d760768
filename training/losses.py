"""From a model's hidden states to the losses of its tokens, through the chunked head.

Shapes: B batch, L length, K vocabulary, D hidden size, N tokens, n tokens of a chunk.
"""

from collections.abc import Sequence

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor

from models.device import wide_dtype
from models.head import (
    Head,
    LossOfLogits,
    Precision,
    TokenNLL,
    chunk_size,
    chunked_loss,
    is_compiled,
    logits_of,
)
from models.network import Network


class HeadLosses(lightning.LightningModule):
    """The head of a model's backbone, in the precision that the config asks for."""

    config: DictConfig
    vocab_size: int  # K
    backbone: Network

    @property
    def network(self) -> Network:
        """The one that hidden states are of."""
        return self.backbone

    def head_loss(
        self,
        hidden: Tensor,
        token_loss: LossOfLogits,
        weights: Tensor | None,
        *,
        others: Sequence[Head] = (),
        scored: Tensor | None = None,
        **inputs: Tensor,
    ) -> TokenNLL:
        """Losses of tokens from their hidden states, a chunk at a time.

        Args:
            hidden: (B, L, D).
            token_loss: From logits (n, K), one of each head, and `inputs`, (n,) each,
                to losses (n,).
            weights: As for `nll`.
            others: Further heads, with hidden states (B, L, D), in their own precision.
            scored: Flat positions to score, (N,); the others lose 0. None is all.
            inputs: (B, L) or (B, 1) each.
        """
        shape, device = hidden.shape[:2], hidden.device
        if weights is None:
            weights = torch.ones(shape, device=device)

        def rows(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return x if scored is None else x.index_select(0, scored)

        training = self.config.training
        heads = [self._head(hidden), *others]
        precision = self.loss_precision()
        total, nll = chunked_loss(
            [head._replace(hidden=rows(head.hidden)) for head in heads],
            token_loss,
            {name: rows(x.expand(shape)) for name, x in inputs.items()},
            rows(weights),
            precision=precision,
            products=[precision.product, *(_product_type(head) for head in others)],
            chunk=chunk_size(training.loss_chunk, self.vocab_size, device.type),
            compiled=is_compiled(training.loss_compile, device.type),
        )
        if scored is not None:
            nll = nll.new_zeros(shape.numel()).index_copy(0, scored, nll)
        return TokenNLL(total, nll.unflatten(0, shape))

    def logits_for_loss(self, hidden: Tensor) -> Tensor:
        """The head in the precision that `training.loss_precision` asks for."""
        return logits_of(self._head(hidden), self.loss_precision())

    def loss_precision(self) -> Precision:
        weight = self.network.head_weight
        return Precision.of(
            self.config.training.loss_precision, weight, wide_dtype(weight.device)
        )

    def autocast(self) -> torch.autocast:
        """The precision of `trainer.precision`, also outside of a Lightning trainer."""
        half = {"bf16": torch.bfloat16, "16": torch.float16}
        dtype = half.get(str(self.config.trainer.precision).removesuffix("-mixed"))
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _head(self, hidden: Tensor) -> Head:
        return self.network.head_of(hidden)


def _product_type(head: Head) -> torch.dtype:
    return head.hidden.dtype if head.weight is None else head.weight.dtype
