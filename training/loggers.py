"""The loggers that `logger` and the command line ask for."""

import configparser
import functools
import inspect
import logging
import netrc
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from utils import CONFIGS, ConfigError, printable, require

log = logging.getLogger(__name__)

WANDB = CONFIGS / "logger" / "wandb.yaml"


def build_loggers(config: DictConfig) -> list[Logger]:
    """Builds the loggers that `logger` and the command line ask for.

    Args:
        config: The run's config; `logger` has a node with a `_target_` for each. A
            node with `_partial_` gets this config as the argument `config`.
    """
    return [_build(node, config) for node in _nodes(config).values()]


def has_account() -> bool:
    """Whether wandb would find a key of an account, without setting wandb up.

    Once wandb is set up it asks for an account, whatever it is told afterwards.
    """
    names = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(name) for name in names):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    for folder in (os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"), "wandb"):
        with suppress(configparser.Error, OSError, UnicodeDecodeError):
            settings.read(Path(folder).expanduser() / "settings")
    section = settings["default"] if settings.has_section("default") else {}
    if section.get("api_key"):
        return True
    default = section.get("base_url", "https://api.wandb.ai")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or default).netloc
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in files:
        with suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
            found = netrc.netrc(Path(file).expanduser()).authenticators(host)
            return bool(found and found[2])
    return False


def logger_names(config: DictConfig) -> list[str]:
    """Names of the loggers that `build_loggers` would build.

    Raises:
        ConfigError: If `logger` holds something that is not a logger's node, or `wandb`
            a setting that there is not.
    """
    names = list(_nodes(config))
    if "wandb" in names:
        _check_settings(config.wandb)
    return names


def _check_settings(settings: DictConfig) -> None:
    import wandb

    known = {*inspect.signature(wandb.init).parameters}
    known |= {*inspect.signature(WandbLogger).parameters}
    for name in settings:
        require(name, known - {"kwargs"}, "key of wandb")


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
    # A node with keys becomes a dict; OmegaConf's types do not say so.
    settings = cast(dict[str, Any], OmegaConf.to_container(config.wandb, resolve=True))
    if settings["name"] is None:  # the default id is made from the name
        settings["id"] = None
    offline = settings.pop("offline", False)
    if not offline and "WANDB_MODE" not in os.environ and not has_account():
        log.info("no wandb account on this machine: logging offline")
        offline = True
    return WandbLogger(
        save_dir=config.checkpointing.save_dir,
        config=OmegaConf.to_container(config, resolve=True),
        offline=offline,
        **settings,
    )


class TensorBoard(TensorBoardLogger):
    """A logger to TensorBoard under the names of the CSV file, with samples as texts.

    One folder is one run: a run that goes on adds to it.

    Args:
        save_dir: Of the run.
        name: Of the folder in it.
    """

    def __init__(self, save_dir: str, name: str = "tensorboard") -> None:
        super().__init__(save_dir, name=name, version="", default_hp_metric=False)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[str]]) -> None:
        """Texts, one below the other, as they are.

        Args:
            key: NAME@global_stepN.
            columns: Names, which are not shown.
            data: Rows.
        """
        name, step = _named_step(key)
        # What is indented is shown as it is, where other text would be Markdown.
        texts = (
            printable(text).replace("\n", "\n    ") for row in data for text in row
        )
        text = "\n\n---\n\n".join(f"    {text}" for text in texts)
        self.experiment.add_text(name, text, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray]) -> None:
        """Images, each (H, W, 3) of bytes; `key` is as above."""
        name, step = _named_step(key)
        self.experiment.add_images(name, np.stack(images), step, dataformats="NHWC")


def _named_step(key: str) -> tuple[str, int]:
    name, _, step = key.partition("@global_step")
    return name, int(step or 0)
