"""Draws from categorical distributions, and what is done to the probabilities before:
a temperature and truncation to the nucleus.

Rows need not be normalised unless said. Shapes: K vocabulary.
"""

import torch
from torch import Tensor

NUCLEUS_CANDIDATES = 1024  # tokens looked at before a whole row is sorted


def inverse_cdf(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws from the last axis with one uniform per row, (..., K) -> (...).

        argmin_i  sum_{j <= i} p_j > u sum_j p_j,   u ~ U[0, 1)

    Exact to the resolution of u, which in float64 is 2^-53; tokens of probability 0
    are never drawn. Much cheaper than noise for every token.
    """
    return at_quantile(probs, _uniform(probs[..., :1], generator).squeeze(-1))


def at_quantile(probs: Tensor, u: Tensor) -> Tensor:
    """`inverse_cdf` for given uniform numbers u, (..., K) and (...) -> (...)."""
    cdf = probs.cumsum(dim=-1)
    u = u[..., None].to(cdf.dtype)
    # u <= 1 - 2^-53, so the product rounds to below the total: the index is valid. Not
    # so with NaN, which has no index; a device would not survive the one behind all.
    index = torch.searchsorted(cdf, u * cdf[..., -1:], right=True).squeeze(-1)
    return index.clamp(max=probs.shape[-1] - 1)


def exponential_race(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """argmax p / E with E ~ Exp(1) for every token, (..., K) -> (...).

    The draw of published samplers. In float32 the noise is cut off at 2^-24, which
    makes rare tokens rarer than they should be: samples look better to a judge model
    and are less diverse (arXiv:2409.02908). `sampling.use_float64=False` repeats that.
    """
    u = _uniform(probs, generator)
    return (probs / (1e-10 - (u + 1e-10).log())).argmax(dim=-1)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform on [0, 1), drawn in the type of `like`: a cast would not widen it."""
    return torch.rand(
        like.shape, dtype=like.dtype, device=like.device, generator=generator
    )


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """log p / temperature, normalised, (..., K); at temperature 1 the input as it is.

    At temperature 0 the most likely token has probability 1, of equals the first one.

    Args:
        logits: log p up to a constant of each row; -inf is allowed.
        temperature: At least 0.
    """
    if temperature == 1:
        return logits
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    # The largest is 0 before the division, so that nothing overflows.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return (shifted / temperature).log_softmax(dim=-1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of tokens with mass above top_p, renormalised, (..., K).

    The most likely token always stays. Rows must be normalised.
    """
    if top_p >= 1.0:
        return probs
    rows = probs.flatten(0, -2)
    top = rows.topk(min(rows.shape[-1], NUCLEUS_CANDIDATES), dim=-1)
    kept = _keep(*top, rows, top_p)
    if top.values.shape != rows.shape:
        # Their sets may go beyond the candidates.
        wide = (top.values.sum(dim=-1) <= top_p).nonzero().squeeze(-1)
        if len(wide):
            whole = rows[wide]
            kept[wide] = _keep(*whole.sort(dim=-1, descending=True), whole, top_p)
    return kept.view_as(probs)


def _keep(values: Tensor, tokens: Tensor, rows: Tensor, top_p: float) -> Tensor:
    """Rows of the sorted values that have at most top_p before them."""
    mass_before = values.cumsum(dim=-1) - values
    values = values.masked_fill(mass_before > top_p, 0)
    values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(rows).scatter(-1, tokens, values)
