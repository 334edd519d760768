"""Learning rates as functions of the number of updates."""

import math

import hydra
import pytest
import torch

from training.schedules import CosineDecayWarmupLRScheduler, LRHalveScheduler
from utils import ConfigError


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, num_updates):
    """Rate of updates 0 .. num_updates - 1."""
    got = []
    for _ in range(num_updates):
        got.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return got


def cosine(**kwargs):
    settings = {"t_initial": 8, "warmup_t": 4, "warmup_lr_init": 0.1, "lr_min": 0.2}
    return CosineDecayWarmupLRScheduler(optimizer(), **(settings | kwargs))


def test_cosine_warms_up_decays_and_rests():
    got = rates(cosine(), 16)
    assert got[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    decay = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert got[4:12] == pytest.approx(decay)
    assert got[12:] == [0.2] * 4


def test_without_prefix_the_warmup_replaces_the_beginning():
    got = rates(cosine(warmup_prefix=False), 12)
    assert got[4] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 4 / 8)))
    assert got[8:] == [0.2] * 4


def test_cosine_without_warmup_starts_at_the_peak():
    assert rates(cosine(warmup_t=0), 1) == [1.0]


def test_epochs_are_refused():
    with pytest.raises(ConfigError, match=r"lr_scheduler\.t_in_epochs=True"):
        cosine(t_in_epochs=True)


def test_cosine_resumes_where_it_was():
    whole = rates(cosine(), 10)
    first = cosine()
    rates(first, 6)
    second = cosine()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr()[0] == whole[6]


def test_halving():
    factor = LRHalveScheduler(warmup_steps=4, n_halve_steps=3)
    assert [factor(k) for k in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert [factor(k) for k in range(4, 12)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant_warmup", [0.0, 1.0]),
        ("step_scheduler", [0.0, 1.0]),
        ("cosine_decay_warmup", [1e-6, 1.0]),
    ],
)
def test_configured_schedules_start_low_and_reach_the_peak(compose, name, expected):
    """The rate of the first update is that of step 0, as in the published runs."""
    config = compose(f"lr_scheduler={name}", "trainer.max_steps=5000")
    scheduler = hydra.utils.instantiate(config.lr_scheduler, optimizer=optimizer())
    got = rates(scheduler, 2600)
    assert [got[0], max(got)] == pytest.approx(expected)
