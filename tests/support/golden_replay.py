"""Replays recorded random draws in place of torch.rand, torch.randint and of what is
drawn by row."""

from typing import Any

import torch
from torch import Tensor

from diffusion.base import Diffusion
from training.row_streams import RowStream


class Replay:
    """Queues of recorded draws, handed out in the order in which they are asked for.

    A test fills them with `uniforms` and `integers`; the `replay` fixture puts
    `rand` and `randint` in torch's place. Shapes and ranges must fit, and nothing
    may be drawn that was not recorded.
    """

    def __init__(self) -> None:
        self.uniforms: list[Tensor] = []
        self.integers: list[Tensor] = []

    def rand(
        self, *size: Any, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        """The next recorded uniforms, in the type that the caller asked for."""
        drawn = self._next(self.uniforms, size, "torch.rand")
        return drawn.to(dtype or torch.get_default_dtype())

    def randint(self, high: int, size: Any, **options: Any) -> Tensor:
        """The next recorded integers of [0, high)."""
        if self.integers and tuple(size[1:]) == tuple(self.integers[0].shape[1:]):
            self.integers[:1] = self.integers[0].split(size[0])  # asked for by row
        drawn = self._next(self.integers, (size,), "torch.randint")
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < high, f"a recorded draw is outside [0, {high})"
        return drawn.clone()

    def row_uniform(self, stream: RowStream, *shape: int) -> Tensor:
        """The next recorded uniforms: of the stream's rows, or of a global batch."""
        assert self.uniforms, f"{shape} of rows: nothing is left of the recorded draws"
        drawn = self.uniforms.pop(0).double()
        if len(drawn) != len(stream.rows):
            drawn = drawn[list(stream.rows)]
        assert tuple(drawn.shape) == (len(stream.rows), *shape)
        return drawn

    def row_integers(self, stream: RowStream, high: int, *shape: int) -> Tensor:
        return self.randint(high, (len(stream.rows), *shape))

    @staticmethod
    def published_uniforms(model: Diffusion, purpose: str, rows: range) -> Tensor:
        """Published validations have their times stratified over the batch."""
        n = len(rows)
        index = torch.arange(n, dtype=torch.float64)
        return (model.row_stream(purpose, rows).uniform() / n + index / n) % 1

    def assert_all_used(self) -> None:
        left = len(self.uniforms), len(self.integers)
        assert left == (0, 0), f"(uniform, integer) draws recorded but not used: {left}"

    @staticmethod
    def _next(queue: list[Tensor], size: tuple, name: str) -> Tensor:
        shape = tuple(size) if isinstance(size[0], int) else tuple(size[0])
        assert queue, f"{name}({shape}): nothing is left of the recorded draws"
        drawn = queue.pop(0)
        assert tuple(drawn.shape) == shape, f"{name}{shape}: {tuple(drawn.shape)} next"
        return drawn
