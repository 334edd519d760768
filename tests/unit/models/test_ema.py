"""What the moving average refuses."""

import pytest
import torch
from torch import nn

from models.ema import ExponentialMovingAverage


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_0_and_1_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        ExponentialMovingAverage([nn.Parameter(torch.zeros(2))], decay)


@pytest.mark.parametrize("shapes", [[(3,)], [(2,), (2,)], []])
def test_weights_of_another_model_are_refused(shapes):
    ema = ExponentialMovingAverage([nn.Parameter(torch.zeros(2))], 0.9)
    other = ExponentialMovingAverage([nn.Parameter(torch.ones(s)) for s in shapes], 0.9)
    with pytest.raises(ValueError, match="another network"):
        ema.load_state_dict(other.state_dict())
    assert not ema.shadow_params[0].any()


def test_another_number_of_parameters_is_refused():
    ema = ExponentialMovingAverage([nn.Parameter(torch.zeros(2))], 0.9)
    with pytest.raises(ValueError, match="zip"):
        ema.update([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))])
