"""Closed forms of the noise schedules at chosen points."""

import math

import pytest
import torch

from models.noise import SCHEDULES, Cosine, LogLinear


def test_registry_names():
    assert SCHEDULES["log-linear"] is LogLinear
    assert SCHEDULES["cosine"] is Cosine


def test_log_linear_values():
    alpha_t, dalpha_t = LogLinear(1e-3)(torch.tensor([0.0, 0.5, 1.0]).double())
    torch.testing.assert_close(alpha_t, torch.tensor([1, 0.5005, 0.001]).double())
    assert dalpha_t.tolist() == pytest.approx([-0.999] * 3)


def test_cosine_values():
    """alpha = 1 - cos(pi/2 (1 - s)); the derivative has its factor (1 - eps)."""
    eps, t = 0.1, 0.4
    s = (1 - eps) * t
    alpha_t, dalpha_t = Cosine(eps)(torch.tensor([t]).double())
    assert float(alpha_t) == pytest.approx(1 - math.cos(math.pi / 2 * (1 - s)))
    slope = -(1 - eps) * math.pi / 2 * math.sin(math.pi / 2 * (1 - s))
    assert float(dalpha_t) == pytest.approx(slope)


def test_inverses_include_eps():
    """With a large eps, an inverse that forgot it would be far off."""
    for schedule in (LogLinear(0.5), Cosine(0.5)):
        t = torch.tensor([0.8]).double()
        assert float(schedule.inverse(schedule(t).alpha_t)) == pytest.approx(0.8)
