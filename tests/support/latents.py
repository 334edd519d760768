"""Draws for latents of tests, which need many of them from one generator."""

import torch

from diffusion.gaussian import TopDraws


def top_draws(
    shape: torch.Size, vocab_size: int, k: int, generator: torch.Generator
) -> TopDraws:
    """Of tokens of any shape, as those of one row."""
    row = torch.Size([1, shape.numel()])
    host = torch.device("cpu")
    draws = TopDraws.draw(row, vocab_size, k, [generator], host)
    return TopDraws(*(x[0].view(*shape, *x.shape[2:]) for x in draws))
