"""The loggers that `logger` and the command line ask for."""

import functools
import logging
import os
import re
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from utils import CONFIGS, ConfigError

log = logging.getLogger(__name__)

WANDB = CONFIGS / "logger" / "wandb.yaml"


def build_loggers(config: DictConfig) -> list[Logger]:
    """Builds the loggers that `logger` and the command line ask for.

    Args:
        config: The run's config; `logger` has a node with a `_target_` for each. A
            node with `_partial_` gets this config as the argument `config`.
    """
    return [_build(node, config) for node in _nodes(config).values()]


def logger_names(config: DictConfig) -> list[str]:
    """Names of the loggers that `build_loggers` would build.

    Raises:
        ConfigError: If `logger` holds something that is not a logger's node.
    """
    return list(_nodes(config))


def _nodes(config: DictConfig) -> dict[str, DictConfig]:
    """Node of each logger, by name; a wandb key on the command line adds wandb."""
    chosen = OmegaConf.select(config, "logger", default={})  # logger=[] has no node
    if isinstance(chosen, str):
        raise ConfigError(
            f"logger={chosen!r} in a config file is a value, and loggers are a group: "
            f"write `override /logger: {chosen}` into its defaults."
        )
    nodes = dict(chosen.items())
    for name, node in nodes.items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ConfigError(f"logger.{name}={node} has no _target_ to build it from.")
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    is_asked_for = any(re.match(r"\+*wandb\.", override) for override in overrides)
    if is_asked_for and "wandb" not in nodes:
        nodes["wandb"] = OmegaConf.load(WANDB).wandb
    return nodes


def _build(node: DictConfig, config: DictConfig) -> Logger:
    built: Any = hydra.utils.instantiate(node)
    return built(config=config) if isinstance(built, functools.partial) else built


def wandb_logger(config: DictConfig) -> WandbLogger:
    """A logger to Weights & Biases, as `wandb` of the config says.

    It is offline if it is asked to be, or if this machine has no account.
    """
    import wandb

    # A node with keys becomes a dict; OmegaConf's types do not say so.
    settings = cast(dict[str, Any], OmegaConf.to_container(config.wandb, resolve=True))
    if settings["name"] is None:  # the default id is made from the name
        settings["id"] = None
    offline = settings.pop("offline", False)
    if not offline and "WANDB_MODE" not in os.environ and not wandb.api.api_key:
        log.info("no wandb account on this machine: logging offline")
        offline = True
    return WandbLogger(
        save_dir=config.checkpointing.save_dir,
        config=OmegaConf.to_container(config, resolve=True),
        offline=offline,
        **settings,
    )
