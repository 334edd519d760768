"""`report.table=isoflop`: the best size of a network for a budget of FLOP.

Runs of one budget and several sizes have a smallest loss between those that are too
small and those that have seen too little. A parabola in the logarithm of the size finds
it, and a power law relates the best sizes of several budgets (arXiv:2203.15556,
approach 2).

Units: losses in nats a token, budgets in FLOP, sizes in non-embedding parameters.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from report.compute import FILE
from report.runs import files_called
from utils import ConfigError, first_line, open_file

LEAST_SIZES = 3  # of a parabola
# What runs must share for their losses to be compared.
SHARED = ("data", "train_data", "tokenizer", "length", "global_batch_size", "weights")
_NUMBERS = ("budget", "flops", "parameters", "tokens", "steps", "nll", "nll_stderr")
_TEXTS = ("algo", "data", "train_data", "tokenizer", "model", "weights")
_WHOLE = ("length", "global_batch_size", "seed")


class Trained(NamedTuple):
    """A complete run."""

    path: str
    curve: str  # what the runs of its curves are called
    budget: float
    parameters: float
    tokens: float
    nll: float
    nll_error: float  # standard error
    settings: dict[str, Any]


class Optimum(NamedTuple):
    """The runs of a budget, and the size at which their parabola is lowest."""

    budget: float
    runs: list[Trained]  # by size
    coefficients: tuple[float, ...] = ()  # of 1, u, u^2 with u = log N - centre
    centre: float = 0.0
    parameters: float | None = None
    log_error: float | None = None  # standard error of the logarithm of the size
    tokens: float | None = None
    nll: float | None = None
    why: str = ""  # there is no optimum

    def at(self, parameters: float) -> float:
        """The parabola's loss at a size."""
        u = math.log(parameters) - self.centre
        a, b, c = self.coefficients
        return a + b * u + c * u * u


class Law(NamedTuple):
    """y = factor C^exponent."""

    exponent: float
    error: float | None  # standard error of the exponent
    log_factor: float

    def at(self, budget: float) -> float:
        return math.exp(self.log_factor + self.exponent * math.log(budget))


class Family(NamedTuple):
    """One algorithm and loss, with all of its budgets."""

    name: str
    optima: list[Optimum]  # by budget
    of_size: Law | None
    of_tokens: Law | None


# ---------------------------------------------------------------- reading


def read_trained(runs: Sequence[tuple[str | None, str]]) -> list[Trained]:
    """Runs that `report.runs` names: their folders, folders of these, or compute.json.

    Args:
        runs: (what the user calls them, or None; path, local or on fsspec).

    Raises:
        ConfigError: If a path leads to none, a file cannot be read, or losses do not
            compare.
    """
    found: dict[str, Trained] = {}
    for name, path in runs:
        files = files_called(FILE, path)
        if not files:
            raise ConfigError(
                f"report.runs={path!r}: no {FILE} is there, which a run with "
                "training.flops writes when its last step is validated."
            )
        found |= {file: _trained(file, name) for file in files}
    every = list(found.values())
    for key in SHARED:
        others = [x for x in every if x.settings[key] != every[0].settings[key]]
        if others:
            here, there = every[0], others[0]
            raise ConfigError(
                f"report.runs: {there.path} has {key}={there.settings[key]}, "
                f"{here.path} {key}={here.settings[key]}: their losses do not compare."
            )
    return every


def _trained(path: str, name: str | None) -> Trained:
    try:
        with open_file(path, "r", encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        line = (
            f"report.runs: {path} cannot be read ({first_line(error)}); leave it out."
        )
        raise ConfigError(line) from None
    content = content if isinstance(content, dict) else {}
    numbers = {key: _number(content, key, path) for key in _NUMBERS}
    kinds = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_WHOLE, int)}
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise _no_record(path, key, content)
    loss = content.get("loss_type")
    curve = content["algo"] + (f", {loss}" if loss not in (None, "elbo") else "")
    return Trained(
        path,
        name or curve,
        numbers["budget"],
        numbers["parameters"],
        numbers["tokens"],
        numbers["nll"],
        numbers["nll_stderr"],
        {key: content[key] for key in kinds},
    )


def _number(content: Mapping[str, Any], key: str, path: str) -> float:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _no_record(path, key, content)
    if not 0 <= value < 1e300:
        raise _no_record(path, key, content)
    return float(value)


def _no_record(path: str, key: str, content: Mapping[str, Any]) -> ConfigError:
    shown = f"{content.get(key)!r}"[:40]
    return ConfigError(f"report.runs: {path} is no {FILE}: it has {key}={shown}.")


# ---------------------------------------------------------------- fitting


def isoflop(runs: Sequence[Trained]) -> list[Family]:
    """The optima of all curves, and their power laws.

    Raises:
        ConfigError: If no budget has runs of enough sizes.
    """
    curves: dict[str, dict[float, list[Trained]]] = {}
    for run in runs:
        curves.setdefault(run.curve, {}).setdefault(run.budget, []).append(run)
    families = [_family(name, curves[name]) for name in sorted(curves)]
    if not any(x.coefficients for family in families for x in family.optima):
        raise ConfigError(
            f"report.table=isoflop needs runs of {LEAST_SIZES} sizes or more with the "
            "same training.flops; no budget has them."
        )
    return families


def _family(name: str, budgets: Mapping[float, Sequence[Trained]]) -> Family:
    optima = [parabola(budget, budgets[budget]) for budget in sorted(budgets)]
    variance = scatter(optima)
    optima = [with_minimum(x, variance) for x in optima]
    return Family(
        name,
        optima,
        law_of([(x.budget, x.parameters, x.log_error) for x in optima]),
        law_of([(x.budget, x.tokens, _tokens_error(x)) for x in optima]),
    )


def parabola(budget: float, runs: Sequence[Trained]) -> Optimum:
    """loss = a + b u + c u^2 by least squares, u = log N - mean log N."""
    runs = sorted(runs, key=lambda x: x.parameters)
    sizes = {x.parameters for x in runs}
    if len(sizes) < LEAST_SIZES:
        number = "1 size" if len(sizes) == 1 else f"{len(sizes)} sizes"
        why = f"{number}, and a parabola needs {LEAST_SIZES}"
        return Optimum(budget, runs, why=why)
    log_sizes = np.log([x.parameters for x in runs])
    centre = float(log_sizes.mean())
    design = np.vander(log_sizes - centre, 3, increasing=True)
    found = np.linalg.lstsq(design, np.array([x.nll for x in runs]), rcond=None)[0]
    return Optimum(budget, runs, tuple(map(float, found)), centre)


def scatter(optima: Sequence[Optimum]) -> float | None:
    """Variance of losses around their parabolas, pooled over the budgets of a curve.

    Sum of squares over the number of runs that are more than three a budget; None
    without such runs.
    """
    fitted = [x for x in optima if x.coefficients]
    free = sum(len(x.runs) - 3 for x in fitted)
    squares = sum((r.nll - x.at(r.parameters)) ** 2 for x in fitted for r in x.runs)
    return squares / free if free else None


def with_minimum(fit: Optimum, variance: float | None) -> Optimum:
    """The lowest point of a parabola, if it has one between the sizes of its runs.

        log N* = centre - b / 2c
        var log N* = g' (X' X)^-1 g variance,  g = (0, -1 / 2c, b / 2c^2)

    with X of the columns 1, u, u^2, to first order.

    Args:
        fit: Of `parabola`.
        variance: Of `scatter`.
    """
    if not fit.coefficients:
        return fit
    _, b, c = fit.coefficients
    if c <= 0:
        return fit._replace(why="no minimum: the parabola opens downwards")
    log_size = fit.centre - b / (2 * c)
    least, most = (math.log(fit.runs[i].parameters) for i in (0, -1))
    if not least <= log_size <= most:
        end = "smallest" if log_size < least else "largest"
        return fit._replace(
            why=f"outside: the parabola falls beyond the {end} size, "
            f"{math.exp(least if end == 'smallest' else most):.3g}"
        )
    u = np.array([math.log(x.parameters) - fit.centre for x in fit.runs])
    design = np.vander(u, 3, increasing=True)
    gradient = np.array([0, -1 / (2 * c), b / (2 * c * c)])
    error = None
    if variance is not None:
        of_fit = gradient @ np.linalg.inv(design.T @ design) @ gradient
        error = math.sqrt(float(of_fit) * variance)
    size = math.exp(log_size)
    return fit._replace(
        parameters=size,
        log_error=error,
        tokens=math.exp(_log_tokens(fit, log_size)),
        nll=fit.at(size),
    )


def _log_tokens(fit: Optimum, log_size: float) -> float:
    """log D at a size, between the two nearest runs."""
    log_sizes = np.log([x.parameters for x in fit.runs])
    return float(np.interp(log_size, log_sizes, np.log([x.tokens for x in fit.runs])))


def _tokens_error(fit: Optimum) -> float | None:
    """Standard error of log D*, from that of log N* and the slope between runs."""
    if fit.parameters is None or fit.log_error is None:
        return None
    x, h = math.log(fit.parameters), 1e-3
    slope = (_log_tokens(fit, x + h) - _log_tokens(fit, x - h)) / (2 * h)
    return abs(slope) * fit.log_error


def law_of(
    points: Sequence[tuple[float, float | None, float | None]],
) -> Law | None:
    """A power law by least squares of logarithms; None of fewer than two points.

    Points are weighted by 1 / error^2, and the exponent's error is propagated from
    theirs, where all have one.

    Args:
        points: Budget; value or None; standard error of the value's logarithm or None.
    """
    known = [(math.log(c), math.log(y), e) for c, y, e in points if y is not None]
    if len(known) < 2:
        return None
    x, y = (np.array([point[i] for point in known]) for i in (0, 1))
    errors = [e for _, _, e in known if e]
    is_weighted = len(errors) == len(known)
    weights = 1 / np.square(errors) if is_weighted else np.ones(len(known))
    mean_x, mean_y = (float(np.average(z, weights=weights)) for z in (x, y))
    spread = float(weights @ (x - mean_x) ** 2)
    exponent = float(weights @ ((x - mean_x) * (y - mean_y))) / spread
    error = 1 / math.sqrt(spread) if is_weighted else None
    return Law(exponent, error, mean_y - exponent * mean_x)
