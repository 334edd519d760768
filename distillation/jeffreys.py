"""The gradient by which a one-step generator is trained, and the loss of the auxiliary
model that stands for the generator's own distribution.

Reference: Di[M]O (arXiv:2503.15457), generalised Jeffreys divergence.

Shapes: K classes; `...` is any leading shape.
"""

from torch import Tensor

# Values of `algo.divergence`: beta, None is `algo.jeffreys_beta`.
BETAS: dict[str, float | None] = {"fkl": 0.0, "rkl": 1.0, "jeffreys": None}


def jeffreys_gradient(log_psi: Tensor, log_phi: Tensor, beta: float) -> Tensor:
    """Gradient of a divergence with respect to the logits of p_psi, (..., K).

        D_beta = (1 - beta) KL(p_phi || p_psi) + beta KL(p_psi || p_phi)
        g = (1 - beta) (p_psi - p_phi)
          + beta p_psi (log p_psi - log p_phi - KL(p_psi || p_phi))

    Its sum over the classes is 0. Where the logits are divided by a temperature, it is
    the gradient with respect to the quotient, as published.

    Args:
        log_psi, log_phi: Log-probabilities of auxiliary model and teacher, (..., K).
        beta: 0 is the forward and 1 the reverse divergence; others mix both.
    """
    p_psi = log_psi.exp()
    forward = p_psi - log_phi.exp()
    if beta == 0:
        return forward
    gap = log_psi - log_phi
    reverse = p_psi * (gap - (p_psi * gap).sum(dim=-1, keepdim=True))
    return (1 - beta) * forward + beta * reverse


def surrogate(logits: Tensor, gradient: Tensor) -> Tensor:
    """|g|^2 / 2, whose gradient with respect to the logits is g, (..., K) -> (...).

    That of 1/2 |z - stop(z - g)|^2, without the difference, in which float32 loses the
    digits of g below the spacing of z.
    """
    gradient = gradient.detach()
    product = (logits * gradient).sum(dim=-1)
    return gradient.square().sum(dim=-1) / 2 + (product - product.detach())


def smoothed_cross_entropy(log_p: Tensor, x: Tensor, smoothing: float) -> Tensor:
    """-(1 - s) log p(x) - s mean_y log p(y), (..., K) and (...) -> (...), nats.

    Its optimum is (1 - s) q + s / K for tokens x ~ q.
    """
    hard = -log_p.gather(-1, x[..., None]).squeeze(-1)
    if smoothing == 0:
        return hard
    return (1 - smoothing) * hard - smoothing * log_p.mean(dim=-1)


def soft_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(targets / T) || softmax(logits / T)), (..., K) -> (...), nats.

    NOTE(compat): the published code takes the mean over the classes for the sum, so
    that the weight of this loss falls with their number.
    """
    log_p = (logits / temperature).log_softmax(dim=-1)
    log_q = (targets.detach() / temperature).log_softmax(dim=-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=-1)
