"""Held-out text under the measures of samples: where their frontiers are compared."""

import math
from typing import Any

import numpy as np
import torch

from data.rows import TokenRows
from metrics.ngrams import NGramModel
from metrics.samples import mean_and_error, sample_entropy

MOST = 4096  # rows that are measured, evenly spaced


def held_out(rows: TokenRows, ngrams: NGramModel | None) -> dict[str, Any]:
    """Entropy of validation rows and their perplexity under the n-gram model.

    Args:
        rows: Of the validation; those with padding are left out, because samples have
            none.
        ngrams: The judge of the samples, if it is such a model.

    Returns:
        rows, and entropy (nats), ngram_ppl and their standard errors under NAME_stderr;
        None where there are none.
    """
    ids, num_valid = rows.ids, rows.num_valid
    full = np.arange(len(rows))
    if num_valid is not None:
        full = full[num_valid == ids.shape[1]]
    some = full[np.linspace(0, len(full) - 1, min(len(full), MOST)).astype(int)]
    names = ("entropy", "entropy_stderr", "ngram_ppl", "ngram_ppl_stderr")
    found: dict[str, Any] = {"rows": len(some), **dict.fromkeys(names)}
    if not len(some):
        return found
    x = np.asarray(ids[some]).astype(np.int64)
    found["entropy"], found["entropy_stderr"] = mean_and_error(
        sample_entropy(torch.from_numpy(x)).tolist()
    )
    if ngrams is not None:
        nll, error = mean_and_error(ngrams.nll(x).mean(axis=1).tolist())
        found["ngram_ppl"] = ppl = math.exp(nll)
        found["ngram_ppl_stderr"] = None if error is None else ppl * error
    return found
