"""Which operator `algo.curriculum` asks for."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from integral.approximations import (
    EdgeCorrected,
    Polynomials,
    PublishedEdgeCorrected,
    PublishedSigmoid,
    Series,
    Sigmoid,
)
from integral.tables import Interpolated, Nearest, Table, read_table
from integral.transform import GammaRange, Operator, Spectral, suggest_gammas
from utils import ConfigError, choose

log = logging.getLogger(__name__)

TABLE = "algo.curriculum.integral_cache_path"
SMALLEST_ALPHA = 1e-9  # at gamma_max: the network is conditioned on -log alpha


class Settings(NamedTuple):
    """What an operator is built from."""

    mode: str
    vocab_size: int
    gammas: GammaRange
    num_terms: int  # of the series
    cache_dir: str | None  # of fitted coefficients
    table_path: str | None
    as_published: bool  # algo.compat=reference

    @classmethod
    def of(cls, config: DictConfig, vocab_size: int) -> "Settings":
        """The settings in `algo.curriculum`.

        Args:
            config: The run's config.
            vocab_size: K.
        """
        curriculum = config.algo.curriculum
        return cls(
            mode=curriculum.mode,
            vocab_size=vocab_size,
            gammas=gamma_range(curriculum.gamma_min, curriculum.gamma_max, vocab_size),
            num_terms=curriculum.n_series_terms,
            cache_dir=curriculum.cache_dir,
            table_path=curriculum.integral_cache_path,
            as_published=config.algo.compat == "reference",
        )


def gamma_range(low: float | str, high: float | str, vocab_size: int) -> GammaRange:
    """The range, with `auto` ends where alpha is 0.97 and 0.03.

    Raises:
        ConfigError: If it is empty, or its ends are no numbers.
    """
    check_ends(low, high)
    if "auto" in (low, high):
        suggested = suggest_gammas(vocab_size)
        low = suggested.low if low == "auto" else low
        high = suggested.high if high == "auto" else high
    gammas = GammaRange(float(low), float(high))
    if not gammas.low < gammas.high:
        raise ConfigError(
            f"algo.curriculum.gamma_min={gammas.low} is not below "
            f"algo.curriculum.gamma_max={gammas.high}."
        )
    return gammas


def check_ends(low: float | str, high: float | str) -> None:
    """Refuses ends of the range of gamma that are neither numbers nor auto."""
    for name, value in {"gamma_min": low, "gamma_max": high}.items():
        if value != "auto" and type(value) not in (int, float):
            raise ConfigError(
                f"algo.curriculum.{name}={value!r} is neither a number nor auto."
            )


def build_operator(settings: Settings) -> Operator:
    """The operator of `algo.curriculum.mode`.

    Raises:
        ConfigError: If there is no such mode, or it does not fit vocabulary and range.
    """
    operators = PUBLISHED_OPERATORS if settings.as_published else OPERATORS
    kind = choose(operators, settings.mode, "algo.curriculum.mode")
    if settings.table_path is not None and kind not in TABULATED:
        tabulated = [name for name, x in operators.items() if x in TABULATED]
        raise ConfigError(
            f"algo.curriculum.integral_cache_path={settings.table_path!r} has no "
            f"effect with algo.curriculum.mode={settings.mode}; give null, or one of "
            f"the modes {', '.join(tabulated)}."
        )
    try:
        operator = kind(settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"algo.curriculum.gamma_min, gamma_max: {error}") from None
    _check_levels(operator, settings)
    return operator


def exact(settings: Settings) -> Operator:
    """The operator to machine precision, or from a table in a file."""
    path = settings.table_path
    if path is None:
        return Spectral(settings.vocab_size, settings.gammas)
    table = read_table(path, TABLE)
    if other := _of_another_vocabulary(table, settings):
        raise ConfigError(f"{other} Give null, which needs no table.")
    return Interpolated(table, settings.gammas, f"{TABLE}={path!r}")


def exact_as_published(settings: Settings) -> Operator:
    """`exact`, but a table is looked up as in published runs: `algo.compat=reference`.

    NOTE(compat): the nearest entry counts, and the table may be of another vocabulary.
    """
    if settings.table_path is None:
        return exact(settings)
    table = read_table(settings.table_path, TABLE)
    if other := _of_another_vocabulary(table, settings):
        log.warning("%s Used all the same, as published runs did.", other)
    return Nearest(table, settings.gammas)


def _of_another_vocabulary(table: Table, settings: Settings) -> str:
    """A sentence that says so, or nothing."""
    if table.vocab_size == settings.vocab_size:
        return ""
    return (
        f"{TABLE}={settings.table_path!r} is of {table.vocab_size} tokens, the model "
        f"of {settings.vocab_size}."
    )


def series(settings: Settings) -> Operator:
    return Series(settings.vocab_size, settings.gammas, settings.num_terms)


def fitted(kind: Callable[..., Operator], settings: Settings) -> Operator:
    return kind(
        settings.vocab_size,
        settings.gammas,
        cache_dir=settings.cache_dir,
    )


OPERATORS: dict[str, Callable[[Settings], Operator]] = {
    "simple": exact,
    "efficient_cached": exact,
    "series": series,
    "sigmoid": functools.partial(fitted, Sigmoid),
    "sigmoid-edge-corrected": functools.partial(fitted, EdgeCorrected),
    "poly3": functools.partial(fitted, functools.partial(Polynomials, 3)),
    "poly5": functools.partial(fitted, functools.partial(Polynomials, 5)),
    "poly7": functools.partial(fitted, functools.partial(Polynomials, 7)),
    "poly9": functools.partial(fitted, functools.partial(Polynomials, 9)),
}


# The same of published runs: `algo.compat=reference`.
PUBLISHED_OPERATORS: dict[str, Callable[[Settings], Operator]] = {
    **OPERATORS,
    "simple": exact_as_published,
    "efficient_cached": exact_as_published,
    "sigmoid": functools.partial(fitted, PublishedSigmoid),
    "sigmoid-edge-corrected": functools.partial(fitted, PublishedEdgeCorrected),
}
TABULATED = (exact, exact_as_published)  # operators that may come from a table


def _check_levels(operator: Operator, settings: Settings) -> None:
    """Refuses levels that leave (0, 1), where losses would be NaN."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = operator(t).alpha_t
    if not bool(((alpha > SMALLEST_ALPHA) & (alpha < 1)).all()):
        low, high = settings.gammas
        raise ConfigError(
            f"algo.curriculum.mode={settings.mode}: from gamma_min={low} to "
            f"gamma_max={high} alpha_t leaves (0, 1) for {settings.vocab_size} tokens; "
            "choose a narrower range (auto suggests one), or mode=efficient_cached."
        )
