"""The head of image networks: a truncated discretised logistic over pixel values.

Shapes: K values, `...` pixels: (B, L) or (n,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-6  # in the logarithm of a bin's mass, with which published weights were made


def logistic_logits(hidden: Tensor, *, vocab_size: int, fix_logistic: bool) -> Tensor:
    """Log-mass of each of K bins of [-1, 1] under a logistic distribution, (..., K).

        inv = exp(2 - l),  r_v, l_v = (edge above, below bin v - mu) inv
        log mass of v = log sigmoid(r_v) + log(1 - sigmoid(l_v) / sigmoid(r_v) + FLOOR)

    Bins have width 2 / K, and their order is that of the ids. The masses do not sum to
    1, as the distribution goes beyond [-1, 1]; a softmax over them does.

    NOTE(compat): FLOOR keeps the logarithm finite, and sets a floor of about log(FLOOR)
    under every bin above mu. Published weights were trained with it, so it stays.
    `fix_logistic` takes the smaller one of this and of the same seen from the other
    tail, in which the floor is under the bins below mu.

    Args:
        hidden: Location mu in [-1, 1] and log-scale l of each pixel, (..., 2).
        vocab_size: K.
        fix_logistic: See above.

    Reference: D3PM (arXiv:2107.03006), appendix on the truncated logistic head.
    """
    mu, log_scale = hidden.unbind(dim=-1)
    inverse_scale = torch.exp(2 - log_scale)
    step = torch.arange(vocab_size + 1, dtype=hidden.dtype, device=hidden.device)
    edges = step * (2 / vocab_size) - 1  # (K + 1,)
    z = (edges - mu[..., None]) * inverse_scale[..., None]  # (..., K + 1)
    logits = _log_difference(F.logsigmoid(z))
    if fix_logistic:
        other = _log_difference(F.logsigmoid(-z).flip(-1)).flip(-1)
        logits = torch.minimum(logits, other)
    return logits


def _log_difference(log_cdf: Tensor) -> Tensor:
    """log(exp(a) - exp(b) + FLOOR exp(a)) of ascending neighbours b < a.

    Args:
        log_cdf: (..., K + 1).

    Returns:
        (..., K).
    """
    below, above = log_cdf[..., :-1], log_cdf[..., 1:]
    return above + torch.log1p(FLOOR - torch.exp(below - above))
