"""Backbones by name, and what is asked of one; the module of one is imported when it is
chosen.

To add one: a module with a subclass of `models.network.Network`, and an entry here; or,
from a module outside of the repository, `duo.backbone` (docs/extending.md).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

from omegaconf import DictConfig, ListConfig

from utils import CHANNELS, ConfigError, choose, imported, require

if TYPE_CHECKING:  # names can be checked without torch, which takes a second
    from torch import Tensor
    from torch.nn import Module

    from models.attention import KVCache
    from models.head import Head
    from models.network import Network


class SoftInput(Protocol):
    """What a backbone's trunk takes beside ids: averages of embedding rows."""

    def embed(self, embedding: Tensor) -> Tensor:
        """(K, D) -> (B, L, D), differentiable in the embedding."""
        ...


class Backbone(Protocol):
    """What algorithms and samplers ask of a backbone, beside being a `torch.nn.Module`.

    `models.network.Network` has all of it but `from_config` and `trunk`. Shapes: B
    batch, L length, K vocabulary, D hidden size.
    """

    takes_soft_inputs: ClassVar[bool]  # whether `trunk` takes a `SoftInput`, too
    can_be_causal: ClassVar[bool]  # whether algo=ar can have it
    takes_blocks: ClassVar[bool]  # whether it has `blockwise`, for algo.block_size
    num_classes: int | None  # of labels that `trunk` takes; None: it takes none
    checkpointing: bool  # whether it heeds training.activation_checkpointing

    @classmethod
    def from_config(cls, config: DictConfig, vocab_size: int) -> Self:
        """Builds the network that `config.model` describes, for K tokens."""
        ...

    def trunk(
        self,
        x: Tensor | SoftInput,
        sigma: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L) at noise levels -log(alpha_t), (B,).

        Only a network that is causal, by tokens or by blocks, is given a cache, and
        only one with classes labels (B,); others need not have these arguments.
        """
        ...

    def blockwise(
        self,
        x: Tensor | SoftInput,
        x0: Tensor,
        sigma: Tensor,
        block_size: int | Tensor,
        labels: Tensor | None = None,
        *,
        sigma_0: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of noisy blocks, each given the clean ones before."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., D) -> (..., K), token by token."""
        ...

    def head_of(self, hidden: Tensor) -> Head:
        """Hidden states with what makes logits of them, for a chunk at a time."""
        ...

    @property
    def head_weight(self) -> Tensor:
        """A tensor of the type and on the device in which the head is computed."""
        ...

    half_parts: bool  # whether `parts` compute with bfloat16 weights under autocast

    def parts(self) -> list[Module]:
        """Modules within `trunk`, of which `strategy=fsdp` gathers one at a time."""
        ...

    def compile_blocks(self) -> None:
        """Compiles what is compiled of it, in place, for training.compile=True."""
        ...


def num_groups(channels: int) -> int:
    """Groups of a group norm over as many channels."""
    return max(1, min(channels // 4, 32))


def block_sizes_of(config: DictConfig) -> list[int]:
    """`algo.block_size` as a list; empty where a row is one block.

    Of several one is drawn for each row in training; else the first is meant.
    """
    given = config.algo.get("block_size")  # only algorithms with blocks have it
    several = given if isinstance(given, ListConfig) else [given]
    return [x for x in several if x is not None]


def block_size_of(config: DictConfig) -> int | None:
    """L', tokens of the blocks that are meant; None: a row is one block."""
    return next(iter(block_sizes_of(config)), None)


def check_unet(config: DictConfig) -> None:
    """Refuses sizes of `config.model` that make no U-Net."""
    model = config.model
    if config.algo.causal_attention:
        raise ConfigError(
            f"algo.backbone=unet is not causal, as algo={config.algo.name} needs it; "
            "choose another algorithm."
        )
    side, factor = math.isqrt(model.size), 2 ** (model.num_scales - 1)
    if side * side != model.size or side % factor:
        raise ConfigError(
            f"model.size={model.size}: the U-Net takes square images whose side is a "
            f"multiple of {factor} (model.num_scales={model.num_scales})."
        )
    if model.length != CHANNELS * model.size:
        raise ConfigError(
            f"model.length={model.length}: an image of model.size={model.size} pixels "
            f"has {CHANNELS * model.size} values."
        )
    multiples = model.ch_mult
    if not (
        isinstance(multiples, ListConfig)
        and all(type(x) is int and x >= 1 for x in multiples)
        and len(multiples) == model.num_scales
    ):
        raise ConfigError(
            f"model.ch_mult={multiples}: model.num_scales={model.num_scales} levels "
            "need as many whole numbers of at least 1, in brackets."
        )
    level = model.scale_count_to_put_attn
    if level >= model.num_scales:
        raise ConfigError(
            f"model.scale_count_to_put_attn={level}: model.num_scales="
            f"{model.num_scales} levels are numbered from 0; -1 has attention in the "
            "middle alone."
        )
    if model.time_embed_dim % 2:
        raise ConfigError(
            f"model.time_embed_dim={model.time_embed_dim} is not even: half of it are "
            "sines, half cosines."
        )
    for multiple in (1, *multiples):
        channels = model.ch * multiple
        if channels % num_groups(channels):
            raise ConfigError(
                f"model.ch={model.ch}, model.ch_mult={multiples}: {channels} channels "
                f"do not divide into {num_groups(channels)} groups; give a multiple of "
                "4 channels, of 32 from 128 on."
            )


SCANS = ("auto", "torch", "mamba_ssm")  # of `models.scan`


def check_dimamba(config: DictConfig) -> None:
    """Refuses what DiMamba cannot be asked for."""
    model = config.model
    if config.algo.causal_attention:
        raise ConfigError(
            f"algo.backbone=dimamba sees both directions, and algo={config.algo.name} "
            "needs a causal network; choose another algorithm."
        )
    require(model.scan, SCANS, "model.scan")
    if model.scan != "mamba_ssm":
        return
    if importlib.util.find_spec("mamba_ssm") is None:
        raise ConfigError(
            "model.scan='mamba_ssm' needs the mamba-ssm package, which is not "
            "installed; choose auto or torch."
        )
    if config.trainer.accelerator == "cpu":
        raise ConfigError(
            "model.scan='mamba_ssm' runs on CUDA only, and trainer.accelerator='cpu'; "
            "choose auto or torch."
        )


class BackboneSpec(NamedTuple):
    """A backbone's class or where it is, and which `model.type` describes it."""

    target: str | type[Any]
    model_type: str
    check: Callable[[DictConfig], None] = lambda config: None  # refuses sizes

    def network(self) -> type[Network]:
        """The class, imported now."""
        target = self.target
        return imported(target) if isinstance(target, str) else target


# By `algo.backbone`.
BACKBONES = {
    "dit": BackboneSpec("models.dit.DIT", "ddit"),
    "hf_dit": BackboneSpec("models.dit.DIT", "ddit"),  # sizes are those of a checkpoint
    "unet": BackboneSpec("models.unet.UNet", "unet", check_unet),
    "dimamba": BackboneSpec("models.dimamba.DiMamba", "dimamba", check_dimamba),
}


def validate_backbone(config: DictConfig) -> BackboneSpec:
    """The entry that `algo.backbone` names.

    Raises:
        ConfigError: If there is none, or `model` describes another kind of network.
    """
    backbone = choose(BACKBONES, config.algo.backbone, "algo.backbone")
    kind, needed = config.model.type, backbone.model_type
    if kind != needed:
        others = [name for name, x in BACKBONES.items() if x.model_type == kind]
        cure = f" or algo.backbone={others[0]}" if others else ""
        raise ConfigError(
            f"model={config.model.name} (model.type={kind!r}) is not for algo.backbone="
            f"{config.algo.backbone}, which needs {needed!r}: choose another model"
            f"{cure}."
        )
    backbone.check(config)
    return backbone


def is_sharded(config: DictConfig) -> bool:
    """Whether weights are split over devices, by `strategy=fsdp`."""
    return str(config.strategy._target_).endswith(".FullySharded")


def check_abilities(config: DictConfig, needs_soft_inputs: bool) -> None:
    """Refuses a backbone that cannot do what a run needs of it.

    Args:
        config: The run's config.
        needs_soft_inputs: Whether the algorithm gives it averages of embeddings.

    Raises:
        ConfigError: With the key, and what the backbone lacks.
    """
    network = validate_backbone(config).network()
    name, training = f"algo.backbone={config.algo.backbone}", config.training
    if needs_soft_inputs and not network.takes_soft_inputs:
        raise ConfigError(
            f"algo={config.algo.name} gives its network averages of embeddings, and "
            f"{name} takes ids alone (takes_soft_inputs of its class); choose another "
            "backbone, or an algorithm without soft inputs, such as duo_base."
        )
    if config.algo.causal_attention and not network.can_be_causal:
        raise ConfigError(
            f"algo={config.algo.name} needs a causal network, which {name} is not "
            "(can_be_causal of its class); choose another algorithm or backbone."
        )
    if config.algo.get("block_size") is not None and not network.takes_blocks:
        raise ConfigError(
            f"algo.block_size={config.algo.block_size}: {name} sees whole rows alone "
            "(takes_blocks of its class); the only value is null, or choose "
            "algo.backbone=dit."
        )
    if training.compile and network.compile_blocks is _base().compile_blocks:
        raise ConfigError(
            f"training.compile=True: {name} has no compile_blocks, which says what is "
            "compiled of it; the only value is False."
        )
    if is_sharded(config) and network.parts is _base().parts:
        raise ConfigError(
            f"strategy=fsdp: {name} has no parts, which says what is gathered at a "
            "time; choose strategy=ddp."
        )


def _base() -> type[Network]:
    return imported("models.network.Network")


def build_backbone(config: DictConfig, vocab_size: int) -> Network:
    """The network that `algo.backbone` and `model` describe.

    Args:
        config: The run's config.
        vocab_size: K, a mask entry included where there is one.
    """
    network = validate_backbone(config).network().from_config(config, vocab_size)
    num_classes = config.data.get("num_classes")
    if network.num_classes != num_classes:
        raise ConfigError(
            f"data.num_classes={num_classes}: algo.backbone={config.algo.backbone} "
            "takes no classes; the only value is null."
        )
    if config.training.activation_checkpointing and not network.checkpointing:
        raise ConfigError(
            f"training.activation_checkpointing=True: algo.backbone="
            f"{config.algo.backbone} keeps all of its blocks (checkpointing of the "
            "network); the only value is False."
        )
    return network
