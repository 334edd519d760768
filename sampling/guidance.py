"""Classifier-free guidance of posteriors. Shapes: K vocabulary."""

import torch
from torch import Tensor


def guided_posterior(q_cond: Tensor, q_uncond: Tensor, weight: float | None) -> Tensor:
    """Classifier-free guidance: softmax(w log q_cond + (1 - w) log q_uncond).

    Args:
        q_cond: Posterior with the label, (..., K), normalised.
        q_uncond: Posterior without, (..., K), normalised.
        weight: w. None or 0 is unconditional, 1 conditional only; tokens that either
            posterior excludes are excluded otherwise. Where none is left, which only
            the nucleus does, the conditional posterior stands.

            NOTE(compat): every token is equally likely there in the published code.

    Returns:
        (..., K), normalised.

    Reference: UDLM (arXiv:2412.10193), discrete classifier-free guidance.
    """
    if not weight:
        return q_uncond
    if weight == 1:
        return q_cond
    possible = (q_cond > 0) & (q_uncond > 0)
    log_q = weight * q_cond.log() + (1 - weight) * q_uncond.log()
    # Finite, so that a row without a common token is not NaN.
    mixed = log_q.masked_fill(~possible, -1e6).softmax(dim=-1)
    return torch.where(possible.any(dim=-1, keepdim=True), mixed, q_cond)
