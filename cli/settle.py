"""The last steps from a composed config to a run: what a checkpoint says is taken over,
values that depend on this machine are filled in, and what only the algorithm or the
devices can tell is checked. Afterwards nobody writes to the config.
"""

import logging
import math
from typing import Any

import hydra
import lightning
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from checkpoints.about import NETWORK, adopt
from checkpoints.outline import read_about
from cli.budget import steps_of
from cli.differences import differences
from cli.known_keys import refuse_arguments
from cli.modality import check_removal
from cli.values import check_kinds, check_values
from models.device import keep_freed_memory
from models.registry import is_sharded
from report.console import report_config
from sampling.prompts import check_prompts
from training.lightning_state import share_paths
from training.loggers import logger_names
from training.processes import check_processes, check_tasks, is_first
from utils import CONFIGS, ConfigError, require, uses_cuda

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)


def settle(config: DictConfig) -> None:
    """Completes and resolves a checked config, in place, and seeds the process.

    From here on the config is read only.

    Args:
        config: The composed config, after `cli.checks.check`.

    Raises:
        ConfigError: If a value that this machine or a checkpoint gives has no meaning.
    """
    keep_freed_memory()
    share_paths()
    refuse_arguments(config)
    adopt_network(config)
    if config.mode == "train" and config.training.flops is not None:
        config.trainer.max_steps = steps_of(config, algorithm_class(config))
    OmegaConf.resolve(config)
    check_kinds(config)
    check_values(config)  # again, now that every value is there
    OmegaConf.set_readonly(config, True)
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def adopt_network(config: DictConfig) -> None:
    """With `algo.backbone=hf_dit` the checkpoint says how large the network is.

    Args:
        config: Changed in place: `model`, but for its length. In training without
            `training.finetune_path` that becomes `eval.checkpoint_path`.

    Raises:
        ConfigError: If there is no checkpoint, or its attention is of the other kind.
    """
    if config.algo.backbone != "hf_dit":
        return
    key = "eval.checkpoint_path"
    if config.mode == "train":
        if not config.training.finetune_path:
            config.training.finetune_path = config.eval.checkpoint_path
        key = "training.finetune_path"
    path = OmegaConf.select(config, key)
    if not path:
        raise ConfigError(
            f"{key} is empty: algo.backbone=hf_dit takes the network from there; give "
            "a Hugging Face folder or hub id, or use algo.backbone=dit."
        )
    trusted = config.checkpointing.trusted_classes
    about = read_about(path, key, trusted)
    adopt(config, about, NETWORK)
    causal = about.setting("algo.causal_attention")
    if causal not in (None, config.algo.causal_attention):
        raise ConfigError(
            f"{key}={path!r} is of a network with causal={causal}, which "
            f"algo={config.algo.name} cannot use."
        )


def prepare(config: DictConfig) -> type[Any]:
    """The algorithm's class, once everything that can be refused early has been.

    Args:
        config: The run's config; printed and saved if nothing is wrong with it.
    """
    algorithm = algorithm_class(config)
    algorithm.validate_config(config)
    check_removal(config, algorithm.has_mask)
    check_devices(config)
    if config.mode != "prepare_data":  # of which others wait for the one that packs
        check_processes(config)
        check_tasks()
    check_batches(config)
    check_prompts(config, algorithm.is_autoregressive)
    logger_names(config)
    if not is_first(config) and not getattr(rank_zero_only, "rank", 0):
        # Of NODE_RANK alone: not 0, which writes, until the trainer knows it.
        vars(rank_zero_only)["rank"] = 1
    report_config(config, differences(config))
    return algorithm


def algorithm_class(config: DictConfig) -> type[Any]:
    """The class that `algo=...` and `algo.compat` name, ours or the user's own.

    Raises:
        ConfigError: If there is no such class.
    """
    target = config.algo._target_
    try:
        algorithm: type[Any] = hydra.utils.get_class(target)
    except Exception:  # hydra raises ImportError, ValueError and others
        files = (CONFIGS / "algo").glob("*.yaml")
        choices = ", ".join(sorted(OmegaConf.load(file)._target_ for file in files))
        raise ConfigError(
            f"algo={config.algo.name}: there is no class {target}. "
            f"Classes in this version: {choices}."
        ) from None
    return algorithm.as_published() if config.algo.compat == "reference" else algorithm


CUDA_PRECISIONS = ("16", "16-mixed", "bf16-true")


def check_devices(config: DictConfig) -> None:
    """Refuses accelerators and strategies that this machine cannot run."""
    accelerator = config.trainer.accelerator
    require(accelerator, ("auto", "cpu", "cuda", "gpu", "mps"), "trainer.accelerator")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator!r}: no CUDA device is visible; "
            "choose auto or cpu."
        )
    precision = str(config.trainer.precision)
    if precision in CUDA_PRECISIONS and not uses_cuda(accelerator):
        raise ConfigError(
            f"trainer.precision={precision!r} needs CUDA, which is not in use: choose "
            "32 or bf16-mixed."
        )
    if is_sharded(config):
        check_sharding(config)


WIDE = ("32", "32-true", "bf16", "bf16-mixed")  # precisions with float32 weights


def check_sharding(config: DictConfig) -> None:
    """Refuses what `strategy=fsdp` does not do."""
    trainer = config.trainer
    if config.mode in ("sample_eval", "fid_eval"):
        raise ConfigError(
            f"strategy=fsdp splits weights for training; mode={config.mode} splits "
            "samples over devices: choose strategy=ddp."
        )
    if str(trainer.precision) not in WIDE:
        raise ConfigError(
            f"trainer.precision={trainer.precision!r}: strategy=fsdp keeps weights in "
            "float32 and computes in float32 or bfloat16; choose 32 or bf16-mixed."
        )
    if trainer.accelerator == "mps" or (
        torch.backends.mps.is_available() and trainer.accelerator != "cpu"
    ):
        raise ConfigError(
            f"trainer.accelerator={trainer.accelerator!r}: Apple GPUs do not split "
            "weights; choose strategy=ddp."
        )
    if trainer.devices * trainer.num_nodes == 1:
        warn("strategy=fsdp has one device and splits nothing: strategy=ddp is faster")


def check_batches(config: DictConfig) -> None:
    """Refuses batch sizes whose product is not the global batch."""
    loader, trainer = config.loader, config.trainer
    factors = {
        "loader.batch_size": loader.batch_size,
        "trainer.devices": trainer.devices,
        "trainer.num_nodes": trainer.num_nodes,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
    }
    product = math.prod(factors.values())
    if product != loader.global_batch_size:
        terms = " x ".join(f"{key}={value}" for key, value in factors.items())
        raise ConfigError(
            f"loader.global_batch_size={loader.global_batch_size} does not divide: "
            f"{terms} is {product}."
        )
