"""Backbones by name."""

import inspect

import pytest
from torch import nn

from cli.settle import algorithm_class
from models.dit import DIT
from models.network import Network
from models.registry import BACKBONES, Backbone, BackboneSpec, build_backbone
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


# ---------------------------------------------------------------- what each can do


class Plain(Network):
    """A network with nothing beyond what is needed."""

    def __init__(self):
        super().__init__()
        self.output_embedding = nn.Linear(4, 9)

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls()


@pytest.fixture
def plain(monkeypatch) -> tuple[str, ...]:
    monkeypatch.setitem(BACKBONES, "plain", BackboneSpec(Plain, "plain"))
    return ("algo.backbone=plain", "model.type=plain", "model.name=plain")


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_network_has_what_is_asked_of_one(name):
    network = BACKBONES[name].network()
    methods = [x for x in vars(Backbone) if inspect.isfunction(vars(Backbone)[x])]
    assert {"trunk", "head", "head_of", "compile_blocks"} <= set(methods)
    for member in (*methods, "from_config", "head_weight", *Backbone.__annotations__):
        assert hasattr(network, member), member
    assert network.compile_blocks is not Network.compile_blocks
    assert network.parts is not Network.parts


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algo=duo"], "averages of embeddings, and algo.backbone=plain takes ids"),
        (["algo=dimo"], "algo=dimo gives its network averages of embeddings"),
        (["algo=ar"], "algo=ar needs a causal network, which algo.backbone=plain is"),
        (["algo=mdlm", "training.compile=True"], "plain has no compile_blocks"),
        (["algo=mdlm", "strategy=fsdp"], "algo.backbone=plain has no parts"),
    ],
)
def test_what_a_network_cannot_is_refused_before_it_is_built(
    plain, compose, overrides, said
):
    config = compose(*overrides, *plain)
    with pytest.raises(ConfigError) as refused:
        algorithm_class(config).validate_config(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=mdlm"],
        ["algo=duo_base"],
        ["algo=sdtt"],
        ["algo=distillation"],
        ["algo=duo", "mode=ppl_eval"],
        ["algo=duo", "algo.curriculum.start=-1", "algo.curriculum.end=0"],
        ["algo=dimo", "algo.noise_emb_perturb=fix_0"],
    ],
)
def test_what_needs_nothing_more_takes_any_network(plain, compose, overrides):
    config = compose(*overrides, *plain)
    algorithm_class(config).validate_config(config)


def test_checkpointing_that_a_network_does_not_heed_is_refused(plain, compose):
    words = ("algo=mdlm", *plain, "training.activation_checkpointing=True")
    with pytest.raises(ConfigError, match=r"activation_checkpointing=True: .*plain"):
        build_backbone(compose(*words), vocab_size=9)
