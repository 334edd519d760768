"""Command lines of MDLM's code, in the words of this one.

Words are translated one by one before Hydra sees them, and each translation is said
once. A command that says two different things in the two dialects is refused.
`docs/from_mdlm.md` is the table for users.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from checkpoints.mdlm import (
    ALGORITHMS,
    BACKBONES,
    CAUSAL,
    DEFAULT,
    MODELS,
    MOVED,
    NOISES,
    OTHER_NOISES,
    OWN_PARAMETERIZATIONS,
    PARAMETERIZATION,
    UNREAD,
    UNREAD_OF_LOGLINEAR,
)
from sampling.registry import ALIASES
from utils import ConfigError, require

log = logging.getLogger(__name__)

_OVERRIDE = re.compile(r"\+{0,2}([\w.]+)=(.*)", re.DOTALL)
_QUOTES = "'\""
REMOVAL = "sampling.noise_removal"
PREDICTOR = "sampling.predictor"
# What True means, where it is not the argmax.
DRAWN = ("analytic", "first_hitting")
# Widths of MDLM's models that have another one under the same name here.
WIDTHS: Mapping[str, int] = {"tiny": 512}
# Keys that keep their names, and those of their values that do not.
VALUES: Mapping[str, Mapping[str, str]] = {
    "model": MODELS,
    "noise": NOISES,
    "noise.type": NOISES,
    PREDICTOR: ALIASES,
}
# Algorithms that are told the time here if nothing else is said.
CONDITIONED = {"d3pm", "sedd"}
# The same, of names that have another meaning here: only where all is MDLM's.
OTHERS: Mapping[str, Mapping[str, str]] = {
    "noise": OTHER_NOISES,
    "noise.type": OTHER_NOISES,
}
TOP = (PARAMETERIZATION, *MOVED, *UNREAD)


class Override(NamedTuple):
    """A word of the command line, KEY=VALUE, and its values, several of a sweep."""

    word: str
    key: str
    values: tuple[str, ...]


class Given:
    """What a command line says, by key; of a key that is there twice, the last.

    Args:
        words: Of the command line.
        is_sweep: Whether commas may stand between the values of several jobs.
    """

    def __init__(self, words: list[str], is_sweep: bool) -> None:
        self.overrides = [_parsed(word, is_sweep) for word in words]
        found = [override for override in self.overrides if override is not None]
        self.values = {override.key: override.values for override in found}
        self.has_experiment = "experiment" in self.values
        self.algo = self.values.get("algo")
        # Whether nothing in it is of this dialect alone.
        self.is_all_theirs = self.algo is None and not self.has_experiment

    def get(self, key: str) -> tuple[str, ...]:
        return self.values.get(key, ())

    def shown(self, key: str) -> str:
        return f"{key}={','.join(self.values[key])}"

    def translations(self) -> Iterator[str]:
        """Keys with a spelling of MDLM's."""
        for key, values in self.values.items():
            if key in TOP or any(value in VALUES.get(key, ()) for value in values):
                yield key
        if self.has_flag_of_removal():
            yield REMOVAL

    def others(self, key: str) -> Mapping[str, str]:
        """Names of values of a key that have another meaning here."""
        return OTHERS.get(key, {}) if self.is_all_theirs else {}

    def is_unread(self, key: str) -> bool:
        """Whether a key of MDLM's default schedule is given that it never reads."""
        is_key = key.partition("noise.")[2] in UNREAD_OF_LOGLINEAR
        is_loglinear = {*self.get("noise"), *self.get("noise.type")} <= NOISES.keys()
        return is_key and is_loglinear and self.is_all_theirs

    def has_flag_of_removal(self) -> bool:
        """Whether noise removal is True or False, and the predictor is known."""
        flags = {value.lower() for value in self.get(REMOVAL)} & {"true", "false"}
        has_predictor = PREDICTOR in self.values or not self.has_experiment
        one = len(self.get(PREDICTOR)) <= 1
        return bool(flags) and has_predictor and one


def _parsed(word: str, is_sweep: bool) -> Override | None:
    found = _OVERRIDE.fullmatch(word)
    if found is None:
        return None
    values = found[2].split(",") if is_sweep else [found[2]]
    plain = tuple(value.strip().strip(_QUOTES) for value in values)
    return Override(word, found[1], plain)


def from_mdlm(words: list[str], is_sweep: bool = False) -> list[str]:
    """The words of a command line, those of MDLM's dialect in the words of this one.

    Args:
        words: Overrides and flags, in any order.
        is_sweep: Whether commas may stand between the values of several jobs.

    Raises:
        ConfigError: If it says two things at once.
    """
    given = Given(words, is_sweep)
    if not any(given.translations()):
        return words
    refuse_contradictions(given)
    said: dict[str, str] = {}
    result = []
    for override, word in zip(given.overrides, words, strict=True):
        if override is None:
            result.append(word)
            continue
        own = _own_word(override, given)
        if own != word:
            said[word.lstrip("+")] = own or _instead(override.key, given)
        result += [own] if own else []
    more = list(_meant(given))
    for older, own in said.items():
        log.warning("%s is MDLM's spelling: %s", older, own)
    for own in more:
        log.warning("%s is what MDLM's dialect means where nothing else is given", own)
    return [*result, *more]


def _own_word(override: Override, given: Given) -> str:
    """A word in this dialect; empty if it says nothing here."""
    key, values = override.key, override.values
    if key in UNREAD:
        return ""
    if given.is_unread(key):
        return ""
    if key == PARAMETERIZATION:
        is_said = given.algo is not None
        return "" if is_said else _joined("algo", map(ALGORITHMS.__getitem__, values))
    if key in MOVED:
        if f"algo.{key}" in given.values:
            return ""  # which says the same
        return _joined(f"algo.{key}", (BACKBONES.get(x, x) for x in values))
    if key == PREDICTOR and given.is_all_theirs and _algorithms(given) == (CAUSAL,):
        return f"{key}=ancestral"  # there, AR never reads it
    if key == REMOVAL and given.has_flag_of_removal():
        return _joined(key, map(partial(_removal, given.get(PREDICTOR)), values))
    names = {**VALUES.get(key, {}), **given.others(key)}
    if any(value in names for value in values):
        return _joined(key, (names.get(x, x) for x in values))
    return override.word


def _instead(key: str, given: Given) -> str:
    """What is said of a word that is left out."""
    if key in UNREAD or given.is_unread(key):
        return "nothing here reads it"
    own = "algo" if key == PARAMETERIZATION else f"algo.{key}"
    return f"{given.shown(own)}, which is given as well"


def _joined(key: str, values: Iterable[str]) -> str:
    return f"{key}={','.join(values)}"


def _removal(predictor: tuple[str, ...], value: str) -> str:
    """The name of what True and False mean."""
    drawn = "ancestral" if predictor and predictor[0] in DRAWN else "greedy"
    return {"true": drawn, "false": "none"}.get(value.lower(), value)


def _meant(given: Given) -> Iterator[str]:
    """What a command in MDLM's dialect means that does not say it, as far as it makes
    another model; of one that names an experiment of ours, a causal model alone."""
    algorithms = _algorithms(given)
    is_said = given.algo is not None or PARAMETERIZATION in given.values
    if not is_said and (given.is_all_theirs or _causal(given)):
        yield _joined("algo", algorithms)
    if not given.is_all_theirs:
        return
    conditions = {"time_conditioning", "algo.time_conditioning"}
    if conditions.isdisjoint(given.values) and CONDITIONED & {*algorithms}:
        yield "algo.time_conditioning=False"
    models = {MODELS.get(x, x) for x in given.get("model")}
    for name in WIDTHS.keys() & models if len(models) == 1 else ():
        if "model.hidden_size" not in given.values:
            yield f"model.hidden_size={WIDTHS[name]}"


def _algorithms(given: Given) -> tuple[str, ...]:
    """The algorithms that a command in MDLM's dialect means, without `algo=`."""
    if PARAMETERIZATION in given.values:
        return tuple(ALGORITHMS[x] for x in given.get(PARAMETERIZATION))
    return (CAUSAL,) if _causal(given) else (ALGORITHMS[DEFAULT],)


def _causal(given: Given) -> str:
    """The word that asks for a network of AR; empty if there is none."""
    if CAUSAL in given.get("backbone"):
        return given.shown("backbone")
    return given.shown("model") if {*given.get("model")} & MODELS.keys() else ""


# ---------------------------------------------------------------- contradictions


def refuse_contradictions(given: Given) -> None:
    """Refuses what says two things at once, and values that MDLM's keys do not have.

    Raises:
        ConfigError: In one line that names both words.
    """
    for value in given.get(PARAMETERIZATION):
        require(value, ALGORITHMS.keys(), PARAMETERIZATION)
    for key, only in UNREAD.items():
        for value in given.get(key):
            require(value, (only,), key)
    for key in MOVED:
        own = f"algo.{key}"
        if key in given.values and own in given.values:
            older = tuple(BACKBONES.get(x, x) for x in given.get(key))
            if _plain(older) != _plain(given.get(own)):
                raise _two_things(given.shown(key), given.shown(own))
    algorithms = given.algo or _algorithms(given)
    if PARAMETERIZATION in given.values:
        named = _algorithms(given)
        if named != algorithms:
            raise _two_things(given.shown(PARAMETERIZATION), given.shown("algo"))
        own = "algo.parameterization"
        meant = tuple(OWN_PARAMETERIZATIONS[x] for x in named)
        if own in given.values and given.get(own) != meant:
            raise _two_things(given.shown(PARAMETERIZATION), given.shown(own))
    if (causal := _causal(given)) and algorithms != (CAUSAL,):
        key = "algo" if given.algo else PARAMETERIZATION
        raise _two_things(causal, given.shown(key))


def _plain(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value.lower() for value in values)


def _two_things(older: str, other: str) -> ConfigError:
    return ConfigError(
        f"{older} and {other} contradict each other: one is MDLM's spelling, and both "
        "choose the model; leave one out (docs/from_mdlm.md)."
    )
