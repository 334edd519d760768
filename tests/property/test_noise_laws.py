"""Laws of every noise schedule in SCHEDULES."""

import pytest
import torch

from models.noise import SCHEDULES

GRID = torch.linspace(0, 1, 2001, dtype=torch.float64)


@pytest.fixture(params=[1e-3, 1e-5])
def schedule(request, schedule_name):
    return SCHEDULES[schedule_name](request.param)


def test_time_zero_is_clean(schedule):
    alpha_t, _ = schedule(torch.zeros(1, dtype=torch.float64))
    assert float(alpha_t) == pytest.approx(1.0, abs=1e-12)


def test_time_one_keeps_next_to_nothing_but_not_nothing(schedule):
    """alpha_1 is small, and above 0 so that sigma = -log(alpha_1) is finite."""
    alpha_t, _ = schedule(torch.ones(1, dtype=torch.float64))
    assert 0 < float(alpha_t) <= 1.01 * schedule.eps


def test_alpha_falls_within_0_and_1(schedule):
    alpha_t, dalpha_t = schedule(GRID)
    assert bool((alpha_t.diff() < 0).all())
    assert bool(((alpha_t >= 0) & (alpha_t <= 1)).all())
    assert bool((dalpha_t <= 0).all())


def test_dalpha_is_the_derivative_of_alpha(schedule):
    t = GRID.clone().requires_grad_()
    alpha_t, dalpha_t = schedule(t)
    (expected,) = torch.autograd.grad(alpha_t.sum(), t)
    torch.testing.assert_close(dalpha_t.detach(), expected, rtol=1e-12, atol=1e-12)


def test_inverse_undoes_the_schedule(schedule):
    t = schedule.inverse(schedule(GRID).alpha_t)
    torch.testing.assert_close(t, GRID, rtol=0, atol=1e-9)


def test_the_schedule_undoes_its_inverse(schedule):
    alpha_t = schedule(GRID).alpha_t
    again = schedule(schedule.inverse(alpha_t)).alpha_t
    torch.testing.assert_close(again, alpha_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_follow_t(schedule, dtype):
    t = torch.rand(3, 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = t.clone()
    for value in (*schedule(t), schedule.inverse(schedule(t).alpha_t)):
        assert value.shape == t.shape
        assert value.dtype == dtype
    assert torch.equal(t, before)
