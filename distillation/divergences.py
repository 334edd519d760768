"""Divergences between a student's and a teacher's distributions of a token.

All are functions of raw logits, (..., K) each -> (...); below p_s and p_t are the
distributions of student and teacher. The two of log-probabilities need distributions
without a token that neither ever gives: `without_column`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def kl_forward(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_t || p_s), nats."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


def kl_backward(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_s || p_t), nats."""
    return kl_forward(teacher, student)


def square_of_logs(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the vocabulary of (log p_s - log p_t)^2, nats^2."""
    return (student.log_softmax(-1) - teacher.log_softmax(-1)).square().mean(dim=-1)


def distance_of_logs(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over the vocabulary of |log p_s - log p_t|, nats."""
    return (student.log_softmax(-1) - teacher.log_softmax(-1)).abs().sum(dim=-1)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the sum over the vocabulary of |p_s - p_t|, in [0, 1]."""
    return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(dim=-1) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl-fwd": kl_forward,
    "kl-bwd": kl_backward,
    "mse": square_of_logs,
    "tvd-log": distance_of_logs,
    "tvd-prob": total_variation,
}


def without_column(logits: Tensor, index: int) -> Tensor:
    """Logits without those of one token, (..., K) -> (..., K - 1).

    A view if the token is the last one.
    """
    if index == logits.shape[-1] - 1:
        return logits[..., :-1]
    return torch.cat([logits[..., :index], logits[..., index + 1 :]], dim=-1)
