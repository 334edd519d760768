"""The arithmetic of training: FLOP of a step, and how many steps a budget buys.

A product of (n, D) and (D, K) takes 2 n D K FLOP. Counted are matrix products: those
of the trunk, those of attention, and the head's. Norms, softmax, losses, the optimiser,
and what acts once a row (the embedding of noise levels, the maps of adaptive norms) are
not. Backward takes twice as much as forward.

Shapes: L length, K vocabulary, D hidden size.
"""

import math
from typing import NamedTuple

from omegaconf import DictConfig

from models.network import Network
from utils import ConfigError

UNIT = 1e18  # FLOP of `training.flops`


class Passes(NamedTuple):
    """How often a token goes through the parts of the network, forward, in a step of
    training; a mean over what is drawn."""

    trunk: float
    head: float


class Compute(NamedTuple):
    """What training a network takes."""

    parameters: int  # without the rows of the input and without the head
    token_flops: float  # FLOP of a step, for each token of it
    step_tokens: int  # tokens of a step

    @property
    def step_flops(self) -> float:
        return self.token_flops * self.step_tokens

    def steps(self, budget: float) -> int:
        """How many whole steps a budget (FLOP) buys."""
        return math.floor(budget / self.step_flops * (1 + 1e-12))


def train_flops(network: Network, tokens: float, scored: float, length: int) -> float:
    """FLOP of a train step, forward and backward.

        3 (trunk_flops(L) tokens + 2 D K scored)

    Only tokens with a loss need the head; what a step does beyond this is waste. Rows
    of the input are looked up, not multiplied.

    Args:
        network: With `trunk_flops`, and a head that is a matrix.
        tokens: That go through the trunk.
        scored: That go through the head.
        length: L.
    """
    head = 2 * network.output_embedding.weight.numel()
    return 3 * (network.trunk_flops(length) * tokens + head * scored)


def num_parameters(network: Network) -> int:
    """Parameters but for the rows of the input and for the head, its bias included."""
    head = network.output_embedding.parameters()
    others = {id(x): x.numel() for x in (network.input_embedding, *head)}
    every = {id(x): x.numel() for x in network.parameters()}
    return sum(every.values()) - sum(others.values())


def compute_of(config: DictConfig, network: Network, passes: Passes) -> Compute:
    """What a run's training takes.

    Args:
        config: The run's config.
        network: The one that it trains; its weights are not read.
        passes: Of its algorithm.

    Raises:
        ConfigError: If the network does not say what its trunk takes.
    """
    if type(network).trunk_flops is Network.trunk_flops:
        raise ConfigError(
            f"training.flops={config.training.flops}: the FLOP of algo.backbone="
            f"{config.algo.backbone} are not counted (trunk_flops of the network); "
            "give trainer.max_steps instead."
        )
    length = config.model.length
    flops = train_flops(network, passes.trunk, passes.head, length)
    tokens = config.loader.global_batch_size * length
    return Compute(num_parameters(network), flops, tokens)
