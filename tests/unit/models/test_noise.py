"""Closed forms of the noise schedules at chosen points."""

import math
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused

from models.noise import SCHEDULES, Cosine, LogLinear, build_noise, settings_of


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


def test_mdlm_values():
    """sigma of its cosines, of the linear and of the geometric schedule at t = 0.5."""
    half, eps = torch.tensor([0.5]).double(), 0.1
    cosine = math.cos(math.pi / 4)
    alphas = {
        "cosine-mdlm": (eps + 0.9 * cosine, {"eps": eps}),
        "cosinesqr": (eps + 0.9 * 0.5, {"eps": eps}),
        "linear": (math.exp(-1.55), {"sigma_min": 0.1, "sigma_max": 3.0}),
        "geometric": (math.exp(-(0.3**0.5)), {"sigma_min": 0.1, "sigma_max": 3.0}),
    }
    for name, (expected, settings) in alphas.items():
        noise = build_noise(OmegaConf.create({"type": name, **settings}))
        assert float(noise(half).alpha_t) == pytest.approx(expected), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_a_file_with_its_settings(compose, name):
    node = compose(f"noise={name}").noise
    assert set(node) == {"type", *settings_of(SCHEDULES[name])}
    assert isinstance(build_noise(node), SCHEDULES[name])
    assert SCHEDULES[name]().state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"type": "liner"}, ["noise.type='liner'", "linear"]),
        ({"type": "linear", "eps": 1e-3}, ["noise.sigma_min", "noise=linear"]),
        ({"type": "cosinesqr", "sigma_min": 1e-3}, ["noise.eps", "noise=cosinesqr"]),
        (
            {"type": "geometric", "sigma_min": 2.0, "sigma_max": 2.0},
            ["noise.sigma_min=2.0", "noise.sigma_max=2.0"],
        ),
    ],
)
def test_settings_that_make_no_schedule_are_refused(settings, parts):
    refused(partial(build_noise, OmegaConf.create(settings)), *parts)


def test_settings_of_another_schedule_are_left_alone():
    """A checkpoint's schedule replaces that of the command line, key by key."""
    node = OmegaConf.create(
        {"type": "linear", "eps": 0.1, "sigma_min": 0.5, "sigma_max": 3}
    )
    noise = build_noise(node)
    assert (noise.sigma_min, noise.sigma_max) == (0.5, 3)
