"""Block diffusion: a row is written block after block, each by diffusion.

    log p(x) = sum_b log p(x^b | x^(<b))

with N = L / L' blocks of L' tokens. Each factor has the bound of the algorithm, whose
network sees the noisy block and the clean ones before it; forward process, objective
and schedule are those of the algorithm, at a time of each block. All blocks of a row
are evaluated in one pass (`models.blocks`).

Shapes: B batch, L length, N blocks, D hidden size.

Reference: BD3-LM (arXiv:2503.09573), equations 3 to 5; with uniform noise
arXiv:2606.02241.
"""

from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion.gaussian import SoftTokens
from models.device import to_device, widened
from models.flops import Passes
from models.noise import Noise
from models.registry import block_sizes_of
from trainer_base import TrainerBase
from utils import ConfigError


class Blocks(NamedTuple):
    """How a batch's rows are cut into blocks, and in which order these take times."""

    length: int  # L
    size: int | Tensor  # L', or of each row (B,), on the host
    keys: Tensor  # uniform numbers of a row's blocks, (B, most blocks), on the host

    def stratified(self, u: Tensor) -> Tensor:
        """Uniform numbers of a row (B,) spread over its blocks, for each token (B, L).

            u_b = (pi(b) + u) / N

        with pi a random order of the row's N blocks: they take each of N equal parts of
        [0, 1) once, and are stratified over the batch where u is.
        """
        which, number = self._where()
        is_block = torch.arange(self.keys.shape[1]) < number
        order = self.keys.where(is_block, torch.inf).argsort(dim=-1)
        return (order.gather(1, which) + u[:, None]) / number

    def independent(self) -> Tensor:
        """A uniform number of each block by itself, for each token, (B, L)."""
        return self.keys.gather(1, self._where()[0])

    def _where(self) -> tuple[Tensor, Tensor]:
        """The block of each token, (B, L), and how many a row has, (B, 1)."""
        size = torch.as_tensor(self.size).reshape(-1, 1)
        which = (torch.arange(self.length) // size).expand(len(self.keys), -1)
        return which, which[:, -1:] + 1


class BlockWise(TrainerBase):
    """What a diffusion model's network sees with `algo.block_size`."""

    noise: Noise
    levels: Noise
    is_told_the_time: bool
    time_conditioning: bool
    antithetic_sampling: bool

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.block_sizes = block_sizes_of(config)

    @classmethod
    def passes(cls, config: DictConfig) -> Passes:
        if config.algo.get("block_size") is not None:
            raise ConfigError(
                f"training.flops={config.training.flops}: what algo.block_size takes "
                "is not counted; give trainer.max_steps instead."
            )
        return super().passes(config)

    @property
    def block_size(self) -> int | None:
        """L', the tokens of a block; None: the whole row, whatever its length."""
        return self.block_sizes[0] if self.block_sizes else None

    @property
    def eos_index(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    def size_for(self, length: int) -> int | None:
        """L' for rows of a length; None where that is one block."""
        size = self.block_size
        return None if size is None or size >= length else size

    def sample_blocks(self, x0: Tensor, batch_idx: int) -> Blocks | None:
        """The blocks of a batch (B, L); None if each row is one block."""
        batch_size, length = x0.shape
        is_drawn = self.training and len(self.block_sizes) > 1
        size: int | Tensor | None = self.size_for(length)
        rows = self.row_indices(batch_size, batch_idx)
        stream = self.row_stream("blocks", rows)
        if is_drawn:
            index = stream.integers(len(self.block_sizes))
            size = torch.tensor(self.block_sizes)[index]
        if size is None:
            return None
        return Blocks(length, size, stream.uniform(self._most_blocks(length)))

    def block_keys(
        self, batch_size: int, length: int, generator: torch.Generator
    ) -> Tensor:
        """`Blocks.keys` of as many blocks as a row can have."""
        shape = (batch_size, self._most_blocks(length))
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    def _most_blocks(self, length: int) -> int:
        return -(-length // min(self.block_sizes))

    def spread(self, u: Tensor, blocks: Blocks) -> Tensor:
        """Uniform numbers of rows (B,) made those of their blocks, (B, L) by token."""
        if self.antithetic_sampling:
            return blocks.stratified(u)
        return blocks.independent()

    def hidden_of(
        self,
        x: Tensor | SoftTokens,
        x0: Tensor,
        sigma: Tensor,
        block_size: int | Tensor | None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of noisy tokens given clean blocks before theirs, (B, L, D).

        Args:
            x: Noisy tokens, (B, L) ids or soft ones.
            x0: Clean ids, (B, L).
            sigma: Total noise, (B, L) or (B, 1).
            block_size: L'; of each row (B,), on the host; or None: no blocks.
            labels: As for `hidden`.
        """
        if block_size is None:
            return self.hidden(x, sigma, labels)
        sigma_0 = None
        told = self.told(sigma).float()
        if self.time_conditioning:
            sigma_0 = self.told(self.clean_sigma(len(x0))).squeeze(-1).float()
        else:
            told = told[:, :1]
        if isinstance(block_size, Tensor):
            block_size = to_device(block_size, x0.device)
        elif told.shape[1] > 1:
            told = told[:, ::block_size]
        return self.network.blockwise(
            x, x0, told, block_size, labels=labels, sigma_0=sigma_0
        )

    def clean_sigma(self, batch_size: int) -> Tensor:
        """Total noise at t = 0, (B, 1), which clean blocks are seen with."""
        alpha_0 = self.noise(torch.zeros(batch_size, 1, dtype=torch.float64)).alpha_t
        return widened(-torch.log(alpha_0), self.device)

    def condition(self, sigma: Tensor) -> Tensor:
        """What the backbone is told of the noise, (B, 1) -> (B,).

        sigma; the time of its level with `training.change_of_variables`; zeros
        without `algo.time_conditioning`.
        """
        return self.told(sigma).mean(dim=-1).float()

    def told(self, sigma: Tensor) -> Tensor:
        """The same of each level, in the shape of sigma."""
        if self.is_told_the_time:
            sigma = self.levels.inverse(torch.exp(-sigma))
        return sigma if self.time_conditioning else torch.zeros_like(sigma)

    def hidden(
        self, xt: Tensor | SoftTokens, sigma: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Hidden states of whole rows, (B, L, D)."""
        raise NotImplementedError
