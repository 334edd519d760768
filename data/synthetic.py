"""Synthetic sequences of known entropy."""

import numpy as np


def synthetic_rows(
    num_rows: int, length: int, vocab_size: int, seed: int
) -> np.ndarray:
    """Sequences of known entropy: bos, a chain written from right to left, eos.

    The chain starts at a uniform draw from 0 .. K - 3; after x comes x // 4, and
    after 0 a new draw. NOTE(compat): same numbers as the reference's, which loops
    over tokens with numpy's legacy generator and, after a row that ends on 0, draws
    once more in vain.

    Args:
        num_rows: N.
        length: L, bos and eos included.
        vocab_size: K; bos is K - 2, eos K - 1.
        seed: Of numpy's legacy generator.

    Returns:
        (N, L).
    """
    size = length - 2  # tokens of the chain in a row
    random = np.random.RandomState(seed)
    draws = np.empty(0, dtype=np.int64)
    ends = np.empty(0, dtype=np.int64)  # ends[k]: tokens of the first k + 1 draws
    starts = np.empty(num_rows, dtype=np.int64)  # a row's first token in the stream
    row, draw = 0, 0
    while True:
        more = random.randint(vocab_size - 2, size=max(1024, num_rows * size // 3))
        draws = np.concatenate([draws, more])
        ends = np.cumsum(_chain_lengths(draws))
        while row < num_rows:
            start = ends[draw - 1] if draw else 0
            last = int(np.searchsorted(ends, start + size))
            if last + 1 >= len(ends):
                break  # more draws are needed
            starts[row] = start
            draw = last + 1 + int(ends[last] == start + size)
            row += 1
        if row == num_rows:
            break
    lengths = _chain_lengths(draws)
    digit = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    stream = np.repeat(draws, lengths) >> (2 * digit)
    rows = np.empty((num_rows, length), dtype=np.min_scalar_type(vocab_size))
    rows[:, 0], rows[:, -1] = vocab_size - 2, vocab_size - 1
    rows[:, 1:-1] = stream[starts[:, None] + np.arange(size)][:, ::-1]
    return rows


def _chain_lengths(draws: np.ndarray) -> np.ndarray:
    """Tokens from a draw down to 0: 1 for 0, else 1 + the number of base-4 digits."""
    lengths = np.ones_like(draws)
    while (draws > 0).any():
        lengths += draws > 0
        draws = draws // 4
    return lengths


def synthetic_entropy(length: int, vocab_size: int) -> float:
    """Exact entropy of a synthetic row, nats per sequence.

    log(K - 2) times the expected number of draws among L - 2 tokens, by the renewal
    equation m(n) = 1 + E[m(n - chain length)].
    """
    size = length - 2
    lengths, counts = np.unique(
        _chain_lengths(np.arange(vocab_size - 2)), return_counts=True
    )
    p = counts / counts.sum()
    m = np.zeros(size + 1)
    for n in range(1, size + 1):
        m[n] = 1 + np.dot(p, m[np.maximum(n - lengths, 0)])
    return float(np.log(vocab_size - 2) * m[size])
