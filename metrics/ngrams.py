"""An n-gram model of the training data, as a judge of samples that needs no download.

Shapes: N rows, L length, K vocabulary.
"""

import numpy as np

from utils import ConfigError


class NGramModel:
    """Interpolated n-gram probabilities with Witten and Bell's smoothing.

        p_n(w | h) = (c(h w) + T(h) p_{n-1}(w | h')) / (c(h) + T(h)),  p_0 = 1 / K

    with c a count, T(h) the number of different tokens after h, and h' the history h
    without its first token. A history that was never seen leaves p_{n-1}.

    Reference: Witten and Bell, IEEE Trans. Information Theory 37(4), 1991, method C.

    Args:
        rows: Token ids to count, (N, L); none follows from another row's.
        order: n, the tokens of history and prediction together.
        vocab_size: K.

    Raises:
        ConfigError: If order or vocabulary is too large for K^n to be a number.
    """

    def __init__(self, rows: np.ndarray, order: int, vocab_size: int) -> None:
        largest = largest_order(vocab_size)
        if not 1 <= order <= largest:
            raise ConfigError(
                f"eval.ngram_order={order} is not from 1 to {largest}, the largest for "
                f"{vocab_size} tokens (0: no such judge)."
            )
        self.order, self.vocab_size = order, vocab_size
        rows = np.asarray(rows)
        self._levels = [self._count(rows, n) for n in range(1, order + 1)]

    def nll(self, rows: np.ndarray) -> np.ndarray:
        """-log p of each token given up to n - 1 before it in its row, nats, (N, L)."""
        rows = np.asarray(rows, dtype=np.int64)
        p = np.full(rows.shape, 1 / self.vocab_size)
        for n, level in enumerate(self._levels, start=1):
            if rows.shape[1] < n:
                break
            windows = self._codes(rows, n)
            count, total, kinds = level.look_up(windows, windows // self.vocab_size)
            known = np.where(total > 0, total + kinds, 1)
            there = np.where(
                total > 0, (count + kinds * p[:, n - 1 :]) / known, p[:, n - 1 :]
            )
            p[:, n - 1 :] = there
        return -np.log(p)

    def _count(self, rows: np.ndarray, n: int) -> "_Counts":
        codes = self._codes(np.asarray(rows, dtype=np.int64), n)
        windows, counts = np.unique(codes, return_counts=True)
        return _Counts(windows, counts, windows // self.vocab_size)

    def _codes(self, rows: np.ndarray, n: int) -> np.ndarray:
        """Each window of n tokens as one number, (N, L - n + 1)."""
        length = max(rows.shape[1] - n + 1, 0)
        codes = np.zeros((len(rows), length), dtype=np.int64)
        for i in range(n):
            codes = codes * self.vocab_size + rows[:, i : i + length]
        return codes


class _Counts:
    """How often windows and their histories occur.

    Args:
        windows: Codes that occur, sorted.
        counts: Of each.
        histories: Code of each without its last token.
    """

    def __init__(
        self, windows: np.ndarray, counts: np.ndarray, histories: np.ndarray
    ) -> None:
        self.windows, self.counts = windows, counts
        self.histories, first = np.unique(histories, return_index=True)
        self.totals = np.add.reduceat(counts, first) if len(first) else counts
        self.kinds = np.diff(np.append(first, len(windows)))

    def look_up(
        self, windows: np.ndarray, histories: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """c(h w), c(h) and T(h), 0 where there is none."""
        count = _find(self.windows, windows, self.counts)
        total = _find(self.histories, histories, self.totals)
        return count, total, _find(self.histories, histories, self.kinds)


def _find(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values where a sorted key is wanted, else 0."""
    if len(keys) == 0:
        return np.zeros(wanted.shape, dtype=np.int64)
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)


def largest_order(vocab_size: int) -> int:
    """The largest n for which K^n is a number of 63 bits."""
    order = 1
    while vocab_size ** (order + 1) < 2**63:
        order += 1
    return order
