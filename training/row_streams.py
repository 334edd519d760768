"""Random numbers by row: what is drawn for a row does not depend on the rows beside it.

A counter-based generator (Philox; Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011) is a function of a key and of a counter. The key is of a purpose, at
some update of a run; every row has a range of counters of its own. So however rows are
dealt out to processes and batches, one call draws those at hand.

Shapes: B rows.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Of the draws of training and validation. A checkpoint says which one its run had; one
# that does not say has version 1, the generators of each rank and micro-batch.
NOISE_VERSION = 2

_WORDS = 4  # of 64 bits that one counter gives


class RowStream:
    """Draws of some rows, on the host. Each call goes on where the last one ended.

    Args:
        entropy: Numbers that make the key, at least 0.
        rows: Indices of the rows, at least 0; B of them.
    """

    def __init__(self, entropy: Sequence[int], rows: range) -> None:
        self.rows = rows
        self._key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        self._calls = 0

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1), multiples of 2^-53, (B, *shape) float64."""
        words = self._words(shape) >> np.uint64(11)
        return torch.from_numpy(words.view(np.int64)).double().mul_(2.0**-53)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform on 0, ..., high - 1 to a part high 2^-53, (B, *shape)."""
        return self.uniform(*shape).mul_(high).long()

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) from u = (j + 1/2) 2^-52 through Phi^-1, (B, *shape) float64."""
        words = self._words(shape) >> np.uint64(12)
        u = torch.from_numpy(words.view(np.int64)).double().add_(0.5).mul_(2.0**-52)
        return torch.special.ndtri(u)

    def seeds(self) -> list[int]:
        """One of each row, for draws elsewhere."""
        return (self._words(()) >> np.uint64(1)).tolist()

    def generators(
        self, device: torch.device | str = "cpu"
    ) -> Iterator[torch.Generator]:
        """One generator that is each row's in turn."""
        return seeded(self.seeds(), device)

    def _words(self, shape: Sequence[int]) -> np.ndarray:
        """Random bits, (B, *shape) uint64."""
        size, rows = math.prod(shape), self.rows
        counters = -(-size // _WORDS)  # of a row
        parts = [rows] if rows.step == 1 else [range(i, i + 1) for i in rows]
        words = [
            np.random.Philox(
                key=self._key, counter=[part.start * counters, 0, 0, self._calls]
            ).random_raw(len(part) * counters * _WORDS)
            for part in parts
        ]
        self._calls += 1
        table = np.concatenate(words).reshape(len(rows), counters * _WORDS)
        return np.ascontiguousarray(table[:, :size]).reshape(len(rows), *shape)


def seeded(
    seeds: Iterable[int], device: torch.device | str
) -> Iterator[torch.Generator]:
    """One generator on a device, with each seed in turn."""
    generator = torch.Generator(device)
    for seed in seeds:
        yield generator.manual_seed(seed)
