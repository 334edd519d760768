"""Laws of every noise schedule in SCHEDULES, and of those in a uniform order of
log(1 - alpha)."""

import math

import pytest
import torch

from models.noise import SCHEDULES, LogUniform, SigmaRange

GRID = torch.linspace(0, 1, 2001, dtype=torch.float64)
ENDS = {1e-3: (1e-3, 7.0), 1e-5: (1e-5, 12.0)}  # sigma at t = 0 and 1
TIMED = {x: cls for x, cls in SCHEDULES.items() if cls.has_log_uniform}


def built(name, eps):
    schedule = SCHEDULES[name]
    return schedule(*(ENDS[eps] if issubclass(schedule, SigmaRange) else (eps,)))


def first_sigma(schedule):
    """-log(alpha_0): 0 unless it is a setting."""
    return getattr(schedule, "sigma_min", 0.0)


@pytest.fixture(params=ENDS)
def schedule(request, schedule_name):
    return built(schedule_name, request.param)


@pytest.fixture(params=[(name, eps) for name in TIMED for eps in ENDS], ids=str)
def timed(request):
    """A schedule whose times may be drawn by their weight."""
    return built(*request.param)


def test_time_zero_is_clean(schedule):
    alpha_t, _ = schedule(torch.zeros(1, dtype=torch.float64))
    alpha_0 = math.exp(-first_sigma(schedule))
    assert float(alpha_t) == pytest.approx(alpha_0, abs=1e-12)


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


def test_levels_beyond_the_schedule_have_finite_times(schedule):
    """Alpha of 1, and a little below alpha_1: as rounding or a user may give them."""
    alpha_1 = schedule(torch.ones(1, dtype=torch.float64)).alpha_t
    t = schedule.inverse(torch.cat([torch.ones_like(alpha_1), alpha_1 * (1 - 1e-7)]))
    assert float(t[0]) == pytest.approx(0, abs=1e-12)
    assert float(t[1]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_follow_t(schedule, dtype):
    t = torch.rand(3, 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = t.clone()
    for value in (*schedule(t), schedule.inverse(schedule(t).alpha_t)):
        assert value.shape == t.shape
        assert value.dtype == dtype
    assert torch.equal(t, before)


# ---------------------------------------------------------------- times by weight


def test_the_logarithm_of_the_masked_part_is_linear(timed):
    levels = timed.log_uniform()
    alpha_t, dalpha_t = levels(GRID)
    f = torch.log(1 - alpha_t)
    expected = levels.f_0 + GRID * (levels.f_1 - levels.f_0)
    torch.testing.assert_close(f, expected, rtol=0, atol=1e-10)
    weight = dalpha_t / (1 - alpha_t)
    constant = torch.full_like(GRID, levels.f_0 - levels.f_1)
    torch.testing.assert_close(weight, constant, rtol=1e-9, atol=0)


def test_times_by_weight_have_the_density_of_the_weight(timed):
    """du / dt = w(t) / (f_1 - f_0), w = -dalpha_t / (1 - alpha_t)."""
    levels = timed.log_uniform()
    u = GRID[1:-1].clone().requires_grad_()
    t = timed.inverse(levels(u).alpha_t)
    (dt_du,) = torch.autograd.grad(t.sum(), u)
    alpha_t, dalpha_t = timed(t.detach())
    weight = -dalpha_t / (1 - alpha_t)
    rate = torch.full_like(weight, levels.f_1 - levels.f_0)
    torch.testing.assert_close(weight * dt_du, rate, rtol=1e-7, atol=0)


def test_times_by_weight_reach_the_ends_of_the_schedule(timed):
    """From sigma_min, which is eps where the schedule has none, to sigma_max."""
    levels = timed.log_uniform()
    sigma = -torch.log(levels(GRID[[0, -1]]).alpha_t)
    first = first_sigma(timed) or timed.eps
    expected = torch.tensor([first, -math.log(timed.eps)]).double()
    torch.testing.assert_close(sigma, expected, rtol=1e-7, atol=0)


def test_their_order_is_undone(timed):
    levels = timed.log_uniform()
    t = levels.inverse(levels(GRID).alpha_t)
    torch.testing.assert_close(t, GRID, rtol=0, atol=1e-9)
    beyond = levels.inverse(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert beyond.tolist() == [0, 1]
    assert isinstance(levels, LogUniform)
