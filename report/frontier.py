"""Samplers at the same entropy, from evaluations of `mode=sample_eval`.

A sampler trades quality for diversity: at a lower temperature its perplexity falls, and
so does the entropy of its samples. Its runs at several temperatures are points of a
curve, its frontier; samplers compare where their curves have the entropy of held-out
text.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from checkpoints.schema import leaves
from report.formats import short_paths
from report.runs import Evaluation, ngram_judge

PPL = ("ppl", "ngram_ppl")  # metrics of an evaluation; the first that there is
# Keys of `sampling` that draw a curve: the first that has several values.
ALONG = (
    *(("temperature",), ("p_nucleus",)),
    ("psi.high_mode", "psi.middle_mode", "psi.low_mode"),
    *(("gamma",), ("order_noise",), ("guid_weight",), ("steps",)),
)
# Samples compare where these are the same; they are no matter of the sampler.
_OF_TEXT = (
    "semi_ar",
    "num_strides",
    "stride_length",
    "num_blocks",
    "prompt",
    "prompt_file",
    "infill",
)
SETTING = ("tokenizer", "length", *_OF_TEXT, "complete")
_UNSAID = (
    *("predictor", "corrector", "num_sample_batches", "labels", "block_cache"),
    *_OF_TEXT,
)
# Keys that set how many network evaluations a sampler takes, in words.
COSTS = {"steps": "{} steps", "gamma": "gamma={}"}
STEPLESS = ("first_hitting", "entropy_bound", "one_step")  # predictors


class Point(NamedTuple):
    """A run, or several that differ in their seeds alone; with standard errors."""

    beside: str  # the value that draws the curve
    entropy: float  # nats
    entropy_error: float | None
    ppl: float
    ppl_error: float | None
    evaluations: float | None = None  # of the network, for a sample
    samples: int = 0
    files: tuple[str, ...] = ()


class Matched(NamedTuple):
    """A sampler's perplexity at some entropy."""

    ppl: float | None
    error: float | None = None  # standard error
    why: str = ""  # there is none


class Sampler(NamedTuple):
    """A curve."""

    name: str
    line: str  # the name without what sets its network evaluations, steps or gamma
    budget: int | None  # network evaluations that its steps ask for; None: it has none
    is_for_all: bool  # stands beside samplers of any budget, as AR does
    points: list[Point]  # in the order of their entropy
    differs: str = ""  # why it does not compare with most others

    @property
    def evaluations(self) -> float | None:
        """The mean over its runs."""
        some = [x.evaluations for x in self.points if x.evaluations is not None]
        return sum(some) / len(some) if some else None


class Text(NamedTuple):
    """Held-out text, at whose entropy samplers are compared; with standard errors."""

    entropy: float  # nats
    entropy_error: float | None = None
    ppl: float | None = None  # under the judge of the samples
    ppl_error: float | None = None


class Frontier(NamedTuple):
    """What the table and the picture show."""

    samplers: list[Sampler]
    text: Text | None
    judge: str
    along: str  # the key that draws the curves, or empty
    tokenizer: str
    length: int
    left_out: int  # files without perplexity or entropy


# ---------------------------------------------------------------- matched entropy


def matched(points: Sequence[Point], entropy: float) -> Matched:
    """The perplexity of a curve at an entropy, between the two nearest runs.

    With H entropy and l log-perplexity of runs a and b, H_a <= H <= H_b,

        w = (H - H_a) / (H_b - H_a),  s = (l_b - l_a) / (H_b - H_a)
        l = (1 - w) l_a + w l_b
        var l = (1 - w)^2 (var l_a + s^2 var H_a) + w^2 (var l_b + s^2 var H_b)

    to first order, the errors being independent. H is taken as given: its own error is
    the same for all samplers. Nothing is said beyond the ends of a curve.

    Args:
        points: Of a sampler.
        entropy: H, nats.
    """
    points = sorted(points, key=lambda x: x.entropy)
    if len(points) < 2:
        return Matched(None, None, "one run is no curve")
    least, most = points[0].entropy, points[-1].entropy
    if entropy < least:
        return Matched(None, None, f"extrapolation: its lowest entropy is {least:.3f}")
    if entropy > most:
        return Matched(None, None, f"extrapolation: its highest entropy is {most:.3f}")
    a, b = next(pair for pair in pairwise(points) if entropy <= pair[1].entropy)
    width = b.entropy - a.entropy
    w = (entropy - a.entropy) / width if width else 0.5
    slope = math.log(b.ppl / a.ppl) / width if width else 0.0
    ppl = math.exp((1 - w) * math.log(a.ppl) + w * math.log(b.ppl))
    errors = []
    for share, x in ((1 - w, a), (w, b)):
        if x.ppl_error is None or x.entropy_error is None:
            return Matched(ppl)
        errors += [share * x.ppl_error / x.ppl, share * slope * x.entropy_error]
    return Matched(ppl, ppl * math.hypot(*errors))


# ---------------------------------------------------------------- from evaluations


def frontier(
    evaluations: Iterable[Evaluation], entropy: float | None = None
) -> Frontier | None:
    """Samplers as curves; None if no evaluation has perplexity and entropy.

    Args:
        evaluations: Those of other modes are passed over.
        entropy: Where samplers are compared, nats; None: that of held-out text, where
            a file has it.
    """
    every = [one for one in evaluations if one.mode == "sample_eval"]
    metric = next((x for x in PPL if any(x in one.numbers for one in every)), "")
    runs = [one for one in every if {metric, "entropy"} <= one.numbers.keys()]
    runs = [one for one in runs if one.numbers[metric][0] > 0]
    if not runs:
        return None
    settings = [_setting(one, metric) for one in runs]
    usual = Counter(map(_key, settings)).most_common(1)[0][0]
    first = next(x for x in settings if _key(x) == usual)
    chosen = {id(one): _sampling(one) for one in runs}
    kinds: dict[str, list[Evaluation]] = {}
    for one, name in zip(runs, _kinds(runs), strict=True):
        kinds.setdefault(name, []).append(one)
    along = _along([[chosen[id(one)] for one in some] for some in kinds.values()])
    found: dict[tuple[str, str], tuple[Sampler, dict[str, list[Evaluation]]]] = {}
    for kind, some in kinds.items():
        keys = _differing([chosen[id(one)] for one in some])
        for one in some:
            own, setting = chosen[id(one)], _setting(one, metric)
            keys = [key for key in keys if key not in along]
            told = [_told(own, key) for key in keys if key not in COSTS]
            line = ", ".join([kind, *told])
            costs = [COSTS[key].format(own[key]) for key in keys if key in COSTS]
            name = ", ".join([line, *costs])
            differs = "" if _key(setting) == usual else _differs(setting, first)
            is_ar = one.settings["algo"] == "ar"
            budget = None if "steps" in along else _budget(one, own)
            new = Sampler(name, line, budget, is_ar, [], differs)
            _, by_value = found.setdefault((name, differs), (new, {}))
            beside = " / ".join(f"{own[key]}" for key in along if key in own)
            by_value.setdefault(beside, []).append(one)
    samplers = []
    for sampler, by_value in found.values():
        points = [_point(x, metric, some) for x, some in by_value.items()]
        points.sort(key=lambda x: x.entropy)
        samplers.append(sampler._replace(points=points))
    texts = [_text(one, metric) for one in runs if _key(_setting(one, metric)) == usual]
    known = Counter(x for x in texts if x is not None).most_common(1)
    text = known[0][0] if known else None
    if entropy is not None:
        text = text if text and text.entropy == entropy else Text(entropy)
    return Frontier(
        samplers,
        text,
        first["judge"],
        "/".join(key.split(".")[-1] for key in along),
        PurePosixPath(first["tokenizer"]).name,
        first["length"],
        len(every) - len(runs),
    )


def _sampling(one: Evaluation) -> dict[str, Any]:
    """What a sampler was told, by its key, as far as it has a meaning; texts."""
    found = {
        key: f"{value:g}" if isinstance(value, float) else f"{value}"
        for key, value in leaves(one.settings["sampling"])
        if key not in _UNSAID
    }
    found.setdefault("temperature", "1")  # of files that are older than the key
    if one.settings["algo"] == "ar" or one.settings["predictor"] in STEPLESS:
        found.pop("steps", None)
    found["weights"] = one.settings["weights"] or "unknown"
    return found


def _kinds(runs: Sequence[Evaluation]) -> list[str]:
    """Model, predictor and corrector of each run; which checkpoint, if of several."""
    names = [
        one.model or one.settings["trained_as"] or one.settings["algo"] for one in runs
    ]
    files: dict[str, list[str]] = {}
    for name, one in zip(names, runs, strict=True):
        files.setdefault(name, []).append(one.settings["checkpoint"])
    short: dict[tuple[str, str], str | None] = {}
    for name, paths in files.items():
        unique = list(dict.fromkeys(paths))
        parts = short_paths(unique) if len(unique) > 1 else [None]
        short |= {(name, path): part for path, part in zip(unique, parts, strict=True)}
    kinds = []
    for name, one in zip(names, runs, strict=True):
        settings = one.settings
        parts = [name, short[name, settings["checkpoint"]]]
        if settings["algo"] != "ar":
            parts.append(settings["predictor"])
        text = ", ".join(part for part in parts if part)
        corrector = settings["corrector"]
        kinds.append(f"{text} + {corrector}" if corrector else text)
    return kinds


def _differing(some: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys of which runs have several values."""
    keys = dict.fromkeys(key for own in some for key in own)
    return [key for key in keys if len({own.get(key) for own in some}) > 1]


def _along(kinds: Iterable[Sequence[Mapping[str, str]]]) -> tuple[str, ...]:
    """The keys that draw the curves; none if there are no curves."""
    differing = {key for some in kinds for key in _differing(some)}
    return next((keys for keys in ALONG if differing & set(keys)), ())


def _told(own: Mapping[str, str], key: str) -> str:
    return f"{key.split('.')[-1]}={own.get(key)}"


def _budget(one: Evaluation, own: Mapping[str, str]) -> int | None:
    """Network evaluations that steps ask for, those of a corrector among them."""
    if "steps" not in own:
        return None
    sweeps = one.settings["corrector_steps"] if one.settings["corrector"] else 0
    return one.settings["steps"] * (1 + (sweeps or 0))


def _setting(one: Evaluation, metric: str) -> dict[str, Any]:
    """What samples must share to be compared."""
    settings = one.settings
    found = {key: settings.get(key) for key in SETTING}
    found |= {key: settings["sampling"].get(key) for key in _OF_TEXT}
    judge = PurePosixPath(settings["judge"] or "?").name
    if metric == "ngram_ppl":
        judge = ngram_judge(settings["ngram_order"])
    return found | {"judge": judge}


def _key(setting: Mapping[str, Any]) -> str:
    return repr(sorted(setting.items()))


def _differs(setting: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """How a setting differs, in words."""
    names = [key for key in setting if setting[key] != usual[key]]
    return "; ".join(f"{key} is {setting[key]}, not {usual[key]}" for key in names)


def _text(one: Evaluation, metric: str) -> Text | None:
    """What a file says of held-out text."""
    own = one.settings
    entropy = own["held_out_entropy"]
    if entropy is None or not math.isfinite(entropy):
        return None
    ppl: tuple[float | None, float | None] = (None, None)
    if metric == "ngram_ppl":
        ppl = own["held_out_ngram_ppl"], own["held_out_ngram_ppl_stderr"]
    return Text(entropy, own["held_out_entropy_stderr"], *ppl)


def _point(beside: str, metric: str, some: Sequence[Evaluation]) -> Point:
    """One of runs with several seeds: the mean of entropies and of log-perplexities."""
    ppl = [one.numbers[metric] for one in some]
    entropy = [one.numbers["entropy"] for one in some]
    mean = math.exp(sum(math.log(value) for value, _ in ppl) / len(some))
    relative = [None if error is None else error / value for value, error in ppl]
    ppl_error = _of_mean(relative)
    evaluations = [one.settings["evaluations"] for one in some]
    known = [x for x in evaluations if x is not None]
    return Point(
        beside,
        sum(value for value, _ in entropy) / len(some),
        _of_mean([error for _, error in entropy]),
        mean,
        None if ppl_error is None else mean * ppl_error,
        sum(known) / len(known) if known else None,
        sum(one.settings["samples"] for one in some),
        tuple(one.path for one in some),
    )


def _of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean of independent values."""
    known = [x for x in errors if x is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None
