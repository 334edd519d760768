"""What a backbone is to whoever runs it: its hidden states, and its head apart."""

from typing import Any, ClassVar, Self

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import KVCache
from models.conditioning import ClassEmbedding
from models.head import Head
from models.registry import Backbone, SoftInput


class Network(nn.Module):
    """Base class of the backbones.

    `trunk` and `head` can be called apart, so that losses and samplers get hidden
    states without logits of all tokens. Shapes: B batch, L length, K vocabulary, D
    hidden size.

    `output_embedding` is the head's weight (K, D) and bias, for losses that apply it
    a few tokens at a time; `input_embedding` has the rows of the tokens, (K, D). A
    network whose head is a function has neither, and overrides `head`, `head_of` and
    `head_weight`.

    The class attributes say what a network can do beyond that; what it cannot is
    refused before a run begins. This is the base of what `models.registry.Backbone`
    asks for.
    """

    takes_soft_inputs: ClassVar[bool] = False  # whether `trunk` takes a `SoftInput`
    can_be_causal: ClassVar[bool] = (
        False  # with algo.causal_attention=True, for algo=ar
    )
    takes_blocks: ClassVar[bool] = False  # whether it has `blockwise`

    output_embedding: nn.Linear
    input_embedding: nn.Parameter
    num_classes: int | None = None  # of labels; None: the network takes none
    cond_map: ClassEmbedding  # of a network with classes
    checkpointing = False  # whether backward computes the inside of blocks again
    half_parts = False  # whether `parts` compute with bfloat16 weights under autocast

    @classmethod
    def from_config(cls, config: DictConfig, vocab_size: int) -> Self:
        """Builds the network that `config.model` and `config.algo` describe."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor | SoftInput,
        sigma: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits over clean tokens, (B, L, K). Arguments as for `trunk`."""
        return self.head(self.trunk(x, sigma, labels=labels))

    def trunk(
        self,
        x: Tensor | SoftInput,
        sigma: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L), given the noise level (B,).

        A causal network takes no noise level. It, and one that is causal by blocks,
        takes a cache of the tokens before x. One with classes takes labels (B,), of
        which `num_classes` means none; so does None.
        """
        raise NotImplementedError

    def blockwise(
        self,
        x: Tensor | SoftInput,
        x0: Tensor,
        sigma: Tensor,
        block_size: int | Tensor,
        labels: Tensor | None = None,
        *,
        sigma_0: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of noisy blocks, given the clean ones before.

        Args:
            x, labels: As for `trunk`.
            x0: Clean ids, (B, L).
            sigma: Noise level of each token (B, L), of each block, or of a row (B, 1).
            block_size: Tokens of a block; or of each row, (B,).
            sigma_0: That of clean tokens, (B,); None: as that of the others, (B, 1).
        """
        raise NotImplementedError

    def with_classes(self, embedding: Tensor, labels: Tensor | None) -> Tensor:
        """An embedding of noise levels (B, E) with that of classes (B,), if any."""
        if self.num_classes is None:
            return embedding
        return self.cond_map(embedding, labels)

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """A block, of which backward computes the inside again where that is asked."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., D) -> (..., K)."""
        return self.output_embedding(hidden)

    def head_of(self, hidden: Tensor) -> Head:
        """Hidden states (..., D) with what makes logits of them."""
        linear = self.output_embedding
        return Head(hidden, linear.weight, linear.bias)

    @property
    def head_weight(self) -> Tensor:
        """A tensor of the type and on the device in which the head is computed."""
        return self.output_embedding.weight

    def trunk_flops(self, length: int) -> float:
        """FLOP of the trunk's matrix products, forward, for a token of a row.

        A network that does not override it is refused with `training.flops`.

        Args:
            length: L of the row.
        """
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        """Modules that `trunk` calls, whose weights `strategy=fsdp` gathers one after
        the other; a network that does not override it is refused there.
        """
        raise NotImplementedError

    def compile_blocks(self) -> None:
        """Compiles what is compiled of it, in place; names of parameters stay.

        A network that does not override it is refused with training.compile=True.
        """
        raise NotImplementedError


_OF_NETWORKS: type[Backbone] = Network  # has all that is asked for, mypy says
