"""Divergences between a student's and a teacher's distributions of a token."""

from collections.abc import Callable

from torch import Tensor


def kl_forward(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_teacher || p_student) of raw logits, (..., K) each -> (...)."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)


def kl_backward(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_student || p_teacher) of raw logits, (..., K) each -> (...)."""
    return kl_forward(teacher, student)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl-fwd": kl_forward,
    "kl-bwd": kl_backward,
}
