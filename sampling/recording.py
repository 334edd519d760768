"""What happens to samples while they are drawn, step by step, for those who want to see
it: ids and changes, never anything of shape (L, K).

A sampler tells its `Chain`, and the chain tells a `Recorder` if it was given one: which
tokens it drew from which predictions (`drew`), and what x_t is after each step
(`note`). Nothing is drawn, and nothing is computed, for its sake in the network.

Shapes: B batch, L length, K vocabulary, n tokens of a chunk.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sampling.reverse_process import Tokens
from sampling.trajectory import (
    NO_PROBABILITY,
    NOTHING,
    PER_BIT,
    RAREST,
    Trajectory,
)


def code_of(p: Tensor) -> Tensor:
    """Probabilities as whole numbers, round(-16 log2 p) up to 254: each is known to
    2.2 %."""
    bits = -p.clamp(min=torch.finfo(p.dtype).tiny).log2()
    return (PER_BIT * bits).round().clamp(0, RAREST).to(torch.uint8)


class Recorder:
    """Keeps the trajectories of one call of a sampler, in the memory of the host.

    With it a step waits for the device; the tokens of a seed stay as they are. The
    windows or blocks of one sample are recorded one after the other, each from its
    `start`, and of those `rows` that are still drawn.
    """

    def __init__(self) -> None:
        self._ids = np.zeros((0, 0), np.int64)  # the present ones, (B, length)
        self._steps: list[tuple[np.ndarray, ...]] = []  # row, position, id, code, H

    def begin_samples(self, tokens: Tensor, known: Tensor) -> None:
        """Whole samples, where windows are drawn: what is given of them.

        Args:
            tokens: Ids, (B, length).
            known: Which of them are given, (B, length) bool.
        """
        self._given = known.cpu().numpy().copy()
        self._first = np.where(self._given, tokens.cpu().numpy(), NOTHING)
        self._ids = self._first.copy()
        self.move(0)

    def move(self, start: int, rows: Tensor | None = None) -> None:
        """The next window starts there, in all samples or in some, (b,)."""
        self._start = start
        every = np.arange(len(self._ids))
        self._rows = every if rows is None else rows.cpu().numpy()

    def begin(
        self, xt: Tensor, free: Tensor, belief: Callable[[Tokens], Tensor]
    ) -> None:
        """A window that is drawn from here on, or all of the samples.

        Args:
            xt: What it starts from, (b, L), NOTHING where there is no token yet.
            free: Positions that may change, (b, L) bool.
            belief: From tokens to the model's probabilities of clean ones, (n, K).
        """
        if not len(self._ids):
            self.begin_samples(xt, ~free)
        self.belief = belief
        self._expect(xt)
        if self._steps:
            self.note(xt)
            return
        where = np.ix_(self._rows, self._start + np.arange(xt.shape[1]))
        self._first[where] = self._ids[where] = xt.cpu().numpy()

    def drew(self, tokens: Tokens, x: Tensor) -> None:
        """Tokens x (n,) were drawn; whether they stay, the next `note` says."""
        self.drew_from(self.belief(tokens), x, tokens.rows, tokens.columns)

    def drew_from(self, p: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> None:
        """The same of the model's own probabilities p, (n, K), before temperature and
        nucleus."""
        drawn = p.gather(-1, x[:, None]).squeeze(-1)
        H = torch.special.entr(p).sum(dim=-1)
        self._drawn[rows, columns] = x
        self._codes[rows, columns] = code_of(drawn)
        self._sums.index_add_(0, rows, H.to(self._sums.dtype))
        self._asked.index_add_(0, rows, torch.ones_like(rows))

    def note(self, xt: Tensor) -> None:
        """A step has led to x_t, (B, L), or to its first columns, (B, l)."""
        length = xt.shape[1]
        new = xt.cpu().numpy()
        drawn, codes = (x[:, :length].cpu().numpy() for x in (self._drawn, self._codes))
        local, columns = np.nonzero(new != self._there(length))
        ids = new[local, columns]
        is_drawn = drawn[local, columns] == ids
        code = np.where(is_drawn, codes[local, columns], NO_PROBABILITY)
        entropy = np.full(len(self._ids), np.nan, np.float32)
        with np.errstate(invalid="ignore"):  # 0 / 0 where nothing was asked
            sums, asked = (x.cpu().numpy() for x in (self._sums, self._asked))
            entropy[self._rows] = sums / asked
        rows, positions = self._rows[local], columns + self._start
        self._ids[rows, positions] = ids
        self._steps.append((rows, positions, ids, code, entropy))
        self._forget()

    def end(self, x0: Tensor) -> None:
        """The window is drawn: whatever was done last is a step if it changed x_t."""
        if (x0.cpu().numpy() != self._there(x0.shape[1])).any():
            self.note(x0)

    def end_samples(self, tokens: Tensor) -> None:
        """All is drawn; what was set behind an end is a step, too, (B, length)."""
        self.move(0)
        self._expect(tokens)
        self.end(tokens)

    def _expect(self, like: Tensor) -> None:
        """Room for what is drawn in a window."""
        self._drawn = torch.full_like(like, NOTHING)
        self._codes = torch.zeros_like(like, dtype=torch.uint8)
        self._sums = torch.zeros_like(like[:, 0], dtype=torch.float32)
        self._asked = torch.zeros_like(like[:, 0])

    def _there(self, length: int) -> np.ndarray:
        """The present ids of the window's first columns, (b, length)."""
        return self._ids[np.ix_(self._rows, self._start + np.arange(length))]

    def _forget(self) -> None:
        """Nothing was drawn since the last note."""
        self._drawn.fill_(NOTHING)
        for x in (self._codes, self._sums, self._asked):
            x.zero_()

    def trajectories(self) -> list[Trajectory]:
        """One of each sample."""
        of_steps = [
            [rows == row for rows, *_ in self._steps] for row in range(len(self._first))
        ]
        return [self._of(row, where) for row, where in enumerate(of_steps)]

    def _of(self, row: int, where: list[np.ndarray]) -> Trajectory:
        kept = [
            [x[is_own] for x in step[1:4]]
            for step, is_own in zip(self._steps, where, strict=True)
        ]
        positions, ids, codes = (
            np.concatenate([np.zeros(0, np.int64), *(x[part] for x in kept)])
            for part in range(3)
        )
        return Trajectory(
            self._first[row],
            self._given[row],
            np.array([len(x[0]) for x in kept], np.int64),
            positions,
            ids,
            codes.astype(np.uint8),
            np.array([step[4][row] for step in self._steps], np.float32),
        )
