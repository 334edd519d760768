"""What can be refused about a config before anything heavy starts, whatever the
algorithm: numbers out of range, keys without effect, devices, batch sizes.
"""

import math
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from checkpoints.about import adopt_network
from data.registry import check_splits
from models import validate_backbone
from report.console import report_config
from sampling.prompts import check_prompts
from training.loggers import logger_names
from utils import ConfigError, require, uses_cuda

CONFIGS = Path(__file__).parents[1] / "configs"

# Keys whose value must be a number: (type, smallest, largest).
NUMBERS = {
    "model.length": (int, 3, None),
    "model.hidden_size": (int, 1, None),
    "model.n_blocks": (int, 1, None),
    "model.n_heads": (int, 1, None),
    "model.dropout": (float, 0, 1),
    "algo.T": (int, 0, None),
    "algo.curriculum.gumbel_tau_log10_start": (float, -10, 3),
    "algo.curriculum.gumbel_tau_log10_end": (float, -10, 3),
    "algo.curriculum.start": (int, -1, None),
    "algo.curriculum.end": (int, -1, None),
    "algo.curriculum.top_k": (int, -1, None),
    "algo.curriculum.n_series_terms": (int, 1, 10_000),
    "algo.update_teacher_every": (int, 1, None),
    "algo.linear_growth_min": (float, 0, 1),
    "algo.linear_growth_max": (float, 0, 1),
    "noise.eps": (float, 1e-9, 0.5),
    "seed": (int, 0, None),
    "data.num_proc": (int, 1, None),
    "data.valid_documents": (int, 1, None),
    "data.shuffle_rows": (int, 1, None),
    "trainer.devices": (int, 1, None),
    "trainer.num_nodes": (int, 1, None),
    "trainer.max_steps": (int, 1, None),
    "loader.global_batch_size": (int, 1, None),
    "loader.batch_size": (int, 1, None),
    "loader.eval_batch_size": (int, 1, None),
    "loader.num_workers": (int, 0, None),
    "trainer.accumulate_grad_batches": (int, 1, None),
    "sampling.steps": (int, 1, None),
    "sampling.p_nucleus": (float, 0, 1),
    "sampling.stride_length": (int, 1, None),
    "sampling.num_strides": (int, 0, None),
    "sampling.psi.high_frac": (float, 0, 1),
    "sampling.psi.middle_frac": (float, 0, 1),
    "sampling.num_sample_batches": (int, 0, None),
    "sampling.num_sample_log": (int, 0, None),
    "training.ema": (float, 0, 1),
    "training.sampling_eps": (float, 1e-9, 0.5),
    "callbacks.checkpoint_every_n_steps.every_n_train_steps": (int, 0, None),
    "callbacks.checkpoint_every_n_steps.save_top_k": (int, -1, None),
    "eval.ngram_order": (int, 0, 62),
    "eval.perplexity_batch_size": (int, 1, None),
    "optim.lr": (float, 0, None),
}

# Keys that are True or False.
FLAGS = (
    "data.wrap",
    "data.streaming",
    "data.insert_train_eos",
    "data.insert_valid_eos",
    "data.keep_remainder",
    "training.antithetic_sampling",
    "training.compile",
    "training.activation_checkpointing",
    "eval.disable_ema",
    "sampling.use_float64",
    "sampling.semi_ar",
)
# Keys with a few values.
CHOICES = {
    **dict.fromkeys(FLAGS, (True, False)),
    "training.loss_compile": ("auto", True, False),
    "trainer.profiler": (None, "simple", "advanced"),
}


def check_values(config: DictConfig) -> None:
    """Refuses values of the wrong kind, key by key."""
    check_numbers(config)
    for key, choices in CHOICES.items():
        require(OmegaConf.select(config, key), choices, key)
    check_loss_chunk(config)


def check_numbers(config: DictConfig) -> None:
    """Refuses values that are no number, or out of range."""
    for key, (kind, low, high) in NUMBERS.items():
        value = OmegaConf.select(config, key)
        is_number = type(value) is int or (kind is float and type(value) is float)
        in_range = is_number and value >= low and (high is None or value <= high)
        if value is not None and not in_range:
            name = "whole number" if kind is int else "number"
            upper = "" if high is None else f" and at most {high}"
            raise ConfigError(
                f"{key}={value!r} is not a {name} of at least {low}{upper}."
            )


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


def check_loss_chunk(config: DictConfig) -> None:
    """Refuses a number of tokens that is none."""
    chunk = config.training.loss_chunk
    if chunk not in (None, "auto") and not (type(chunk) is int and chunk >= 1):
        raise ConfigError(
            f"training.loss_chunk={chunk!r} is not auto, null or a whole number of "
            "at least 1."
        )


# Keys that exist in published configs and change nothing in the published code. They
# are accepted at the published value; any other value is refused, not ignored.
INERT_KEYS = {
    "training.importance_sampling": False,
    "training.change_of_variables": False,
    "model.tie_word_embeddings": False,
    "model.vocab_lookup": True,
    "model.scale_by_sigma": True,
    "model.temb_strategy": "adaln",
    "prior.type": "none",
    "prior.latent_width": 0,
    "prior.latent_height": 0,
    "sampling.guid_weight": None,
    "algo.posterior_loss_weight": 0.0,
}


def check_inert_keys(config: DictConfig) -> None:
    """Refuses keys that would change nothing."""
    for key, value in INERT_KEYS.items():
        given = OmegaConf.select(config, key, default=value)
        if given != value:
            raise ConfigError(
                f"{key}={given!r} is not implemented; the only value is {value!r}."
            )


def algorithm_class(config: DictConfig) -> type[Any]:
    """The class that `algo=...` names, from here or from the user's own module.

    Raises:
        ConfigError: If there is no such class.
    """
    target = config.algo._target_
    try:
        return hydra.utils.get_class(target)
    except Exception:  # hydra raises ImportError, ValueError and others
        files = (CONFIGS / "algo").glob("*.yaml")
        choices = ", ".join(sorted(OmegaConf.load(file)._target_ for file in files))
        raise ConfigError(
            f"algo={config.algo.name}: there is no class {target}. "
            f"Classes in this version: {choices}."
        ) from None


# ---------------------------------------------------------------- checks


def settle(config: DictConfig) -> None:
    """Completes, checks and resolves the config, in place, and seeds the process."""
    validate_backbone(config)
    adopt_network(config)
    check_values(config)
    check_inert_keys(config)
    OmegaConf.resolve(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def prepare(config: DictConfig, splits: tuple[str, ...]) -> type[Any]:
    """The algorithm's class, once everything that can be refused early has been.

    Args:
        config: The run's config; printed and saved if nothing is wrong with it.
        splits: Splits of the data that the mode reads.
    """
    algorithm = algorithm_class(config)
    algorithm.validate_config(config)
    check_splits(config, splits)
    check_devices(config)
    check_batches(config)
    check_prompts(config, algorithm.is_autoregressive)
    logger_names(config)
    report_config(config)
    return algorithm
