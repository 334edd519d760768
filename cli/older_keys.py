"""Older spellings of keys: what published commands say, and what it is called now.

The words of the command line are translated before Hydra sees them, so that a config
has one name for each value. A config file with an older key beside the node that
replaced it is refused, because the key would change nothing.

A key of wandb may be given with `+` whether or not an experiment has it.
"""

import logging
import re
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from utils import ConfigError

log = logging.getLogger(__name__)

CURRICULUM = "algo.curriculum"
OLDER_KEYS: Mapping[str, str] = {
    "algo.gumbel_tau_log10_start": f"{CURRICULUM}.gumbel_tau_log10_start",
    "algo.gumbel_tau_log10_end": f"{CURRICULUM}.gumbel_tau_log10_end",
    "algo.curriculum_start": f"{CURRICULUM}.start",
    "algo.curriculum_end": f"{CURRICULUM}.end",
    "algo.gamma_min": f"{CURRICULUM}.gamma_min",
    "algo.gamma_max": f"{CURRICULUM}.gamma_max",
    "algo.integral_cache_path": f"{CURRICULUM}.integral_cache_path",
}
# Whole words: a group takes no null.
# Added or changed, whether or not an experiment has the key: wandb has many of them.
_WANDB = re.compile(r"\+(?=wandb\.)")
OLDER_WORDS: Mapping[str, str] = {
    "logger=null": "logger=none",
    "callbacks=null": "callbacks=[]",
}

_OVERRIDE = re.compile(r"\+{0,2}([\w.]+)=(.*)", re.DOTALL)


def translated(words: list[str]) -> list[str]:
    """The words of a command line with the newer spellings of keys.

    The newer keys are in the configs, so the prefixes + and ++ of older ones are
    dropped. A key that is given in both spellings has the value of the newer one. Each
    translation is said once, in a line of the log.

    Args:
        words: Overrides and flags, in any order.
    """
    given = {found[1] for word in words if (found := _OVERRIDE.fullmatch(word))}
    said, result = set(), []
    for word in (OLDER_WORDS.get(word, word) for word in words):
        word = _WANDB.sub("++", word, count=1) if _WANDB.match(word) else word
        found = _OVERRIDE.fullmatch(word)
        if found is None or found[1] not in OLDER_KEYS:
            result.append(word)
            continue
        older = found[1]
        newer = OLDER_KEYS[older]
        if newer not in given:
            result.append(f"{newer}={found[2]}")
        if older not in said:
            said.add(older)
            wins = ", which is given as well and wins" if newer in given else ""
            log.warning("%s is an older spelling of %s%s", older, newer, wins)
    return result


def refuse_older_keys(config: DictConfig) -> None:
    """Refuses an older key from a config file, which nothing would read.

    Args:
        config: The composed config. One whose algorithm has no `curriculum` may use
            the names for something else.

    Raises:
        ConfigError: With the newer spelling.
    """
    if OmegaConf.select(config, CURRICULUM) is None:
        return
    for older, newer in OLDER_KEYS.items():
        group, _, name = older.rpartition(".")
        if name in OmegaConf.select(config, group).keys():  # noqa: SIM118
            raise ConfigError(f"{older} is an older spelling: write {newer} instead.")
