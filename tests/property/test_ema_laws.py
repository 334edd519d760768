"""Laws of the exponential moving average of weights."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from models.ema import ExponentialMovingAverage


def parameters(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))
        for shape in ((3, 2), (4,))
    ]


def move(params, seed):
    """An optimiser update: other values in the same tensors."""
    with torch.no_grad():
        for parameter, other in zip(params, parameters(seed), strict=True):
            parameter.copy_(other)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("ramp", [True, False])
def test_the_recursion(decay, ramp):
    """shadow <- shadow - (1 - d)(shadow - p), d = min(decay, (1 + n) / (10 + n))."""
    params = parameters()
    ema = ExponentialMovingAverage(params, decay, use_num_updates=ramp)
    expected = [p.detach().clone() for p in params]
    for n in range(1, 40):
        move(params, seed=n)
        ema.update(params)
        d = min(decay, (1 + n) / (10 + n)) if ramp else decay
        expected = [
            s - (1 - d) * (s - p) for s, p in zip(expected, params, strict=True)
        ]
    for got, want in zip(ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-12)


def test_update_leaves_the_parameters_alone():
    params = parameters()
    ema = ExponentialMovingAverage(params, 0.9)
    move(params, seed=1)
    before = [p.detach().clone() for p in params]
    ema.update(params)
    assert all(map(torch.equal, params, before))


def test_frozen_parameters_are_left_out():
    params = parameters()
    params[0].requires_grad_(False)
    ema = ExponentialMovingAverage(params, 0.9)
    assert len(ema.shadow_params) == 1
    move(params, seed=1)
    ema.update(params)
    with ema.applied(params):
        assert torch.equal(params[0], parameters(1)[0])
        assert torch.equal(params[1], ema.shadow_params[0])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_raw_weights_come_back(error):
    """Also after an exception; inside, the shadow is in place, in the same tensors."""
    params = parameters()
    ema = ExponentialMovingAverage(params, 0.9)
    move(params, seed=1)
    raw = [p.detach().clone() for p in params]
    shadow = [s.clone() for s in ema.shadow_params]
    with pytest.raises(error) if error else nullcontext(), ema.applied(params):
        inside = [p.detach().clone() for p in params]
        if error:
            raise error
    assert all(map(torch.equal, inside, shadow))
    assert not torch.equal(inside[0], raw[0])
    assert all(map(torch.equal, params, raw))
    assert all(map(torch.equal, ema.shadow_params, shadow))


def test_gradients_flow_to_the_same_parameters_after_a_swap():
    params = parameters()
    ema = ExponentialMovingAverage(params, 0.9)
    with ema.applied(params):
        pass
    (params[0].sum() * 2).backward()
    assert torch.equal(params[0].grad, torch.full((3, 2), 2.0, dtype=torch.float64))


def test_loading_keeps_the_configured_decay():
    """Shadow and count come from the file, the decay from the run's own config."""
    params = parameters()
    saved = ExponentialMovingAverage(params, 0.5)
    for n in range(1, 20):
        move(params, seed=n)
        saved.update(params)
    loaded = ExponentialMovingAverage(parameters(7), 0.9999)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.decay == 0.9999
    assert loaded.num_updates == 19
    assert all(map(torch.equal, loaded.shadow_params, saved.shadow_params))
    loaded.shadow_params[0].zero_()  # a copy: the state it came from stands
    assert saved.shadow_params[0].any()


def test_saving_and_loading_changes_nothing_to_come():
    params = parameters()
    ema = ExponentialMovingAverage(params, 0.9)
    for n in range(1, 5):
        move(params, seed=n)
        ema.update(params)
    copy = ExponentialMovingAverage(params, 0.9)
    copy.load_state_dict(ema.state_dict())
    move(params, seed=9)
    for average in (ema, copy):
        average.update(params)
    assert all(map(torch.equal, ema.shadow_params, copy.shadow_params))
