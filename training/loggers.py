"""The loggers that `logger` and the command line ask for."""

import logging
import os
import re

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, ListConfig, OmegaConf

from utils import require

log = logging.getLogger(__name__)


def build_loggers(config: DictConfig) -> list[Logger]:
    """The loggers that `logger` and the command line ask for."""
    return [LOGGERS[name](config) for name in logger_names(config)]


def logger_names(config: DictConfig) -> list[str]:
    """Names of `logger`; giving any wandb key on the command line adds wandb."""
    names = config.logger if isinstance(config.logger, ListConfig) else [config.logger]
    names = [name for name in names if name not in (None, "none")]
    for name in names:
        require(name, LOGGERS, "logger")
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    asked = any(re.match(r"\+*wandb\.", override) for override in overrides)
    return names + ["wandb"] * (asked and "wandb" not in names)


def csv_logger(config: DictConfig) -> Logger:
    """CSV files under `checkpointing.save_dir`/csv."""
    return CSVLogger(config.checkpointing.save_dir, name="csv")


def wandb_logger(config: DictConfig) -> Logger:
    """Weights & Biases; offline if asked to, or if this machine has no account."""
    import wandb

    settings = OmegaConf.to_container(config.wandb, resolve=True)
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


LOGGERS = {"csv": csv_logger, "wandb": wandb_logger}
