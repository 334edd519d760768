"""The last steps from a composed config to a run: what a checkpoint says is taken over,
values that depend on this machine are filled in, and what only the algorithm or the
devices can tell is checked. Afterwards nobody writes to the config.
"""

import math
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from checkpoints.about import adopt_network
from cli.checks import check_values
from models.device import keep_freed_memory
from report.console import report_config
from sampling.prompts import check_prompts
from training.loggers import logger_names
from utils import ConfigError, require, uses_cuda

CONFIGS = Path(__file__).parents[1] / "configs"


def settle(config: DictConfig) -> None:
    """Completes and resolves a checked config, in place, and seeds the process.

    Args:
        config: The composed config, after `cli.checks.check`.

    Raises:
        ConfigError: If a value that this machine or a checkpoint gives has no meaning.
    """
    keep_freed_memory()
    adopt_network(config)
    OmegaConf.resolve(config)
    check_values(config)  # again, now that every value is there
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def prepare(config: DictConfig) -> type[Any]:
    """The algorithm's class, once everything that can be refused early has been.

    Args:
        config: The run's config; printed and saved if nothing is wrong with it.
    """
    algorithm = algorithm_class(config)
    algorithm.validate_config(config)
    check_devices(config)
    check_batches(config)
    check_prompts(config, algorithm.is_autoregressive)
    logger_names(config)
    report_config(config)
    return algorithm


def algorithm_class(config: DictConfig) -> type[Any]:
    """The class that `algo=...` and `algo.compat` name, ours or the user's own.

    Raises:
        ConfigError: If there is no such class.
    """
    target = config.algo._target_
    try:
        algorithm = hydra.utils.get_class(target)
    except Exception:  # hydra raises ImportError, ValueError and others
        files = (CONFIGS / "algo").glob("*.yaml")
        choices = ", ".join(sorted(OmegaConf.load(file)._target_ for file in files))
        raise ConfigError(
            f"algo={config.algo.name}: there is no class {target}. "
            f"Classes in this version: {choices}."
        ) from None
    return algorithm.as_published() if config.algo.compat == "reference" else algorithm


def check_devices(config: DictConfig) -> None:
    """Refuses accelerators and strategies that this machine cannot run."""
    accelerator = config.trainer.accelerator
    require(accelerator, ("auto", "cpu", "cuda", "gpu", "mps"), "trainer.accelerator")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator!r}: no CUDA device is visible; "
            "choose auto or cpu."
        )
    is_sharded = "fsdp" in config.strategy._target_.lower()
    if is_sharded and config.mode == "sample_eval":
        raise ConfigError(
            "strategy=fsdp shards weights for training; mode=sample_eval splits "
            "samples over devices: choose strategy=ddp."
        )
    if is_sharded and not uses_cuda(accelerator):
        raise ConfigError(
            "strategy=fsdp needs CUDA devices, and none is in use; choose strategy=ddp."
        )


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
