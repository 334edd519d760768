"""Models that are larger than a device: every process holds its part of all weights,
gradients, moments and averages, and gathers a block's weights while it runs.

Reference: PyTorch FSDP (arXiv:2304.11277), as `torch.distributed.fsdp.fully_shard`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from models.network import Network
from models.shards import collected, split_as


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy, over all devices alike, with the files of one device.

    A checkpoint is that of a run on one device: its tensors are whole. The first
    process collects them on its host and writes them; every process reads the file and
    takes its parts. So a run may go on with any number of devices and any strategy.

    Args:
        reshard_after_forward: Whether a block's weights are freed after it has run and
            gathered again in backward. Else they stay until then, which sends a third
            less and holds the weights of all blocks.
        timeout: How long processes wait for each other.
        process_group_backend: Of torch.distributed; None: nccl on CUDA, gloo on CPUs.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        timeout: timedelta = default_pg_timeout,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto": nodes
        super().setup_environment()

    def split(self, network: Network) -> None:
        """Splits a network's weights over all processes, in place.

        Each of its `parts` is gathered while it runs. What is left, embeddings and head
        above all, is gathered when `trunk` begins, and stays until backward has passed
        it: losses apply the head after `trunk`. The same holds for `blockwise`.

        Args:
            network: Whole, and the same on every process. Nothing computes with it
                but through these two.
        """
        mesh = self.device_mesh["data_parallel"]
        is_half = self.precision_plugin.precision == "bf16-mixed" and network.half_parts
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if is_half else None,
            reduce_dtype=torch.float32 if is_half else None,
            cast_forward_inputs=False,  # autocast knows what stays wide
        )
        for part in network.parts():
            fully_shard(
                part,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=self.reshard_after_forward,
            )
        fully_shard(network, mesh=mesh, reshard_after_forward=False)
        for name in ("trunk", "blockwise") if network.takes_blocks else ("trunk",):
            register_fsdp_forward_method(network, name)

    # ---- checkpoints. Lightning's strategy would write and read them by itself;
    # these do as those of whole models, whose files `CheckpointFiles` knows.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = ParallelStrategy.lightning_module_state_dict(self)
        for name, value in state.items():
            state[name] = collected(value, self.is_global_zero)
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = ParallelStrategy.optimizer_state(self, optimizer)
        return {key: collected(x, self.is_global_zero) for key, x in state.items()}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(
        self, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        module: nn.Module = self.lightning_module  # type: ignore[assignment]
        own = module.state_dict()
        state = {
            name: split_as(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            groups = optimizer.param_groups
            parameters = [p for group in groups for p in group["params"]]
            split = {
                i: {name: _moment(x, parameters[i]) for name, x in of_one.items()}
                for i, of_one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": split})


def _moment(x: Any, parameter: Tensor) -> Any:
    """What an optimiser keeps of a parameter, split as that where it has its shape."""
    is_like = isinstance(x, Tensor) and x.shape == parameter.shape
    return split_as(x, parameter) if is_like else x


@contextmanager
def gathered(networks: Sequence[Network], frees: bool) -> Iterator[None]:
    """Has every process hold all weights of networks that are split.

    Within it processes compute without each other: how often a sampler calls the
    network, and how many batches of a validation a process has, may differ.

    Args:
        networks: From `FullySharded.split`.
        frees: `FullySharded.reshard_after_forward`, which holds again afterwards.
    """
    roots: list[nn.Module] = list(networks)
    pieces = [x for n in roots for x in n.modules() if isinstance(x, FSDPModule)]
    with torch.inference_mode(False), torch.no_grad():  # training uses them, too
        for piece in pieces:
            piece.reshard()  # weights may have been set since they were gathered
            piece.unshard()
            piece.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for piece in pieces:
            is_root = any(piece is root for root in roots)
            piece.set_reshard_after_forward(frees and not is_root, recurse=False)
            piece.reshard()
