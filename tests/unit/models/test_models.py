"""Backbones by name."""

import pytest

from models.dit import DIT
from models.registry import BACKBONES, build_backbone
from utils import ConfigError


def test_the_configured_backbone_is_built(compose):
    backbone = build_backbone(compose("algo=mdlm", "model.n_blocks=3"), vocab_size=9)
    assert isinstance(backbone, DIT)
    assert len(backbone.blocks) == 3
    assert backbone.head.__self__.output_layer.linear.out_features == 9
    assert not backbone.causal


def test_the_autoregressive_backbone_is_causal(compose):
    assert build_backbone(compose("algo=ar"), vocab_size=9).causal


def test_an_unknown_backbone_is_refused(compose):
    config = compose("algo=mdlm", "algo.backbone=dti")
    with pytest.raises(ConfigError, match=r"algo\.backbone='dti'.*Did you mean 'dit'"):
        build_backbone(config, vocab_size=9)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_a_model_of_another_kind_is_refused(compose, backbone):
    config = compose("algo=mdlm", f"algo.backbone={backbone}", "model.type=resnet")
    with pytest.raises(ConfigError, match=r"model\.type='resnet'") as error:
        build_backbone(config, vocab_size=9)
    assert "\n" not in str(error.value)
