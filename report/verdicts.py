"""How a measurement compares with the published number of its cell.

A measurement is compared only where its settings are those of the published number; a
setting that differs is named instead. Verdicts are by `verdict`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.about import ALIKE
from report.runs import Evaluation, ngram_judge
from report.tables import METHODS, MODELS, ONE_STEP, PREDICTORS, TABLES, Published
from sampling.registry import ALIASES

RELATIVE = 0.01  # of the published value
NOISY = 0.1  # of the published value: two standard errors beyond this tell nothing
# Of a checkpoint of the papers' budget, 1M updates; AR and the second stage of Duo have
# 500K of their own.
FEWEST_STEPS = 450_000
RULE = (
    "Rule: a measurement agrees if it differs from the paper by no more than two of "
    "its standard errors, or than half a unit of the paper's last digit plus 1 %; "
    "undecided: within two standard errors, which are more than 10 % of the paper's "
    "value; else a lower perplexity is better. Perplexities of diffusion models are "
    "upper bounds."
)

UNPUBLISHED = "no published"  # what a reason begins with that says no more than that
# Both low: less than these of the published perplexity and entropy.
LOW_PPL, LOW_ENTROPY = 0.7, 0.98
SIGNATURE = (
    "perplexity and entropy are both low, as with float32 draws (public samples of "
    "MDLM in 1000 such steps: 40.7 / 5.28, published in float64: 104.85 / 5.63), a "
    "temperature below 1 or a nucleus"
)

# ---------------------------------------------------------------- comparing


class Row(NamedTuple):
    """A line of the report: a published number, a measured one, or both."""

    table: str
    cell: tuple[str, ...]  # model, data set, steps, round, metric
    published: Published | None
    evaluation: Evaluation | None
    verdict: str
    reason: str = ""
    note: str = ""  # what the measurement depends on, where no published number says
    fits: bool = False  # whether its settings are those of the table

    @property
    def measured(self) -> tuple[float, float | None] | None:
        """Value and standard error."""
        return self.evaluation and self.evaluation.numbers.get(self.cell[-1])

    @property
    def judge(self) -> str | None:
        """Whose perplexity it is, in words."""
        settings = self.evaluation.settings if self.evaluation else {}
        if self.cell[-1] == "ngram_ppl":
            return ngram_judge(settings.get("ngram_order"))
        if self.cell[-1] == "ppl" and settings.get("judge"):
            return Path(settings["judge"]).name
        return None

    @property
    def setting(self) -> tuple[Any, ...]:
        """Measurements of one metric and data set compare where this is the same."""
        if self.evaluation is None:
            return ()
        values = (self.evaluation.settings.get(name) for name in _SETTINGS)
        is_bound = self.evaluation.mode == "ppl_eval"  # which distilling makes worse
        distilled = is_bound and self.evaluation.settings["distilled"]
        return (*values, distilled, self.judge, self.note)

    def record(self) -> dict[str, Any]:
        """The row of report.csv, and `fits`; None: an empty cell."""
        value, error = self.measured or (None, None)
        published, paper = self.published, None
        if published is not None:
            paper = published.value
        difference = None
        if value is not None and paper is not None:
            difference = value - float(paper)
        names = ("table", "model", "dataset", "steps", "round", "metric")
        return dict(zip(names, (self.table, *self.cell), strict=True)) | {
            "paper": paper,
            "source": published and published.source,
            "note": published.note if published else self.note,
            "measured": value,
            "stderr": error,
            "difference": difference,
            "verdict": self.verdict,
            "reason": self.reason,
            "file": self.evaluation and self.evaluation.path,
            "fits": self.fits,
            "judge": self.judge,
            "setting": self.setting,
        }


_SETTINGS = (
    *("tokenizer", "length", "wrap", "insert_valid_eos", "limit_val_batches", "sha256"),
    *("use_float64", "p_nucleus", "semi_ar", "prompt", "prompt_file", "infill"),
    "complete",
)


def tolerance(paper: str) -> float:
    """Half a unit of the last digit, and 1 %."""
    digits = len(paper.partition(".")[2])
    return 0.5 * 10.0**-digits + RELATIVE * float(paper)


def verdict(measured: float, error: float | None, paper: str, metric: str) -> str:
    """agrees, better, worse (entropy: higher, lower) or undecided; see `RULE`.

    Args:
        measured: Perplexity, or entropy in nats.
        error: Its standard error; None: unknown, the tolerance alone counts.
        paper: The published value, as written.
        metric: ppl or entropy.
    """
    difference = measured - float(paper)
    slack = 1e-9 * float(paper)  # 25.2 + 0.302 in binary
    noise = 2 * (error or 0) + slack
    if abs(difference) <= tolerance(paper) + slack:
        return "agrees"
    if abs(difference) <= noise:
        return "undecided" if noise > NOISY * float(paper) else "agrees"
    names = {"ppl": ("worse", "better"), "entropy": ("higher", "lower")}
    return names[metric][difference < 0]


def differing(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What is not as wanted, in words. Tokenizers may be folders or other ids."""
    lines = []
    for key, value in wanted.items():
        got = settings.get(key)
        if key in ("tokenizer", "judge") and isinstance(got, str):
            got = Path(got).name
        if got != value:
            lines.append(f"{key} is {got}, not {value}")
    return lines


def objections(one: Evaluation, model: str) -> list[str]:
    """Why an evaluation is comparable with no published number of a model."""
    settings, lines = one.settings, []
    algo, trained_as = settings["algo"], settings["trained_as"]
    alike = any({algo, trained_as} <= names for names in ALIKE)
    if trained_as not in (None, algo) and not alike:
        lines.append(f"the checkpoint is of {trained_as}, evaluated as {algo}")
    if settings["weights"] == "raw":
        lines.append("raw weights, not EMA")
    if one.mode == "ppl_eval":
        rows = settings["rows"]
        if settings["distilled"]:
            lines.append("a distilled model's likelihood is not comparable")
        if settings["expected_sha256"] not in (None, settings["sha256"]):
            lines.append("the rows are not those of the published data set")
        if settings["published_documents"] not in (None, settings["documents"]):
            lines.append(
                f"{settings['documents']} documents, the published set has "
                f"{settings['published_documents']}"
            )
        if settings["limit_val_batches"] not in (None, 1.0):
            lines.append(f"limit_val_batches is {settings['limit_val_batches']}")
        elif (measured := settings["measured_rows"] or rows) < rows:
            lines.append(f"{measured} of {rows} rows were measured")
        return lines
    if one.mode == "fid_eval":
        return lines
    wanted = PREDICTORS.get(model.partition(",")[0], ("ancestral",))
    predictor = ALIASES.get(settings["predictor"], settings["predictor"])
    if model != "AR" and predictor not in wanted:
        lines.append(f"predictor is {predictor}, not {wanted[0]}")
    if model != "AR" and removal_of(settings) not in ("ancestral", "greedy"):
        lines.append(f"noise_removal is {removal_of(settings)}")
    if settings["temperature"] not in (None, 1):
        lines.append(f"temperature is {settings['temperature']}")
    if settings["corrector"] is not None:
        lines.append(f"corrector is {settings['corrector']}")
    if settings["distilled"] and round_of(one) == "?":
        lines.append(f"step {settings['step']} is not the end of a round")
    return lines


def removal_of(settings: Mapping[str, Any]) -> str:
    """`sampling.noise_removal` by its name, also where it is MDLM's True or False."""
    given = settings["noise_removal"]
    if given is True:
        return "ancestral" if settings["predictor"] == "analytic" else "greedy"
    return given or "none"


def model_of(one: Evaluation) -> str:
    """The published model that an evaluation is of."""
    settings = one.settings
    name = one.model or of_blocks(settings)
    if one.mode == "ppl_eval" or one.model:
        return name
    if settings["distilled"]:
        method = METHODS.get(settings["trained_as"] or settings["algo"], "DCD")
        name += f"+{method}" + ", EMA teacher" * bool(settings["teacher_ema"])
    is_greedy = removal_of(settings) == "greedy" and name != "AR"
    return name + ", greedy tail" * is_greedy


def of_blocks(settings: Mapping[str, Any]) -> str:
    """The published name of an algorithm's model, with the tokens of its blocks."""
    name: str = MODELS.get(settings["algo"], settings["algo"])
    size = settings.get("block_size")
    size = size[0] if isinstance(size, list) and size else size
    if not isinstance(size, int) or size >= settings["length"]:
        return name
    return f"{'BD3-LM' if name == 'MDLM' else name} L'={size}"


def steps_of(one: Evaluation, model: str) -> int:
    """Steps of a sample; an autoregressive model takes one a token."""
    settings = one.settings
    if settings["algo"] in ONE_STEP:
        return 1 + (settings["refine_steps"] or 0)
    return settings["length" if model == "AR" else "steps"]


def round_of(one: Evaluation) -> str:
    """The round that a distilled checkpoint is the end of; '?' if it is of none."""
    if one.settings["algo"] in ONE_STEP:
        return ""
    step, every = one.settings["step"], one.settings["round_steps"]
    if not step or not every:
        return "5"  # released ones do not say
    return "?" if step % every else str(step // every)


def place(one: Evaluation, asked: str | None) -> tuple[str, list[str], list[str]]:
    """The table and columns that fit an evaluation best, and what does not fit.

    Args:
        one: The evaluation.
        asked: `report.table`.
    """
    if one.mode == "fid_eval":
        return "fid", [one.settings["dataset"]], ["published ones are in figures only"]
    is_distilled = bool(one.settings["distilled"]) or "+" in (one.model or "")
    sampled = "distillation" if is_distilled else "gen_ppl"
    names = ("test_ppl", "zero_shot") if one.mode == "ppl_eval" else (sampled,)
    found: list[tuple[int, str, list[str], list[str]]] = []
    for name in names:
        for column, wanted in TABLES[name].columns.items():
            lines = differing(one.settings, wanted)
            is_other = (
                one.mode == "ppl_eval" and wanted["valid"] != one.settings["valid"]
            )
            if not is_other:
                found.append((len(lines), name, [column], lines))
    if not found:
        table = asked if asked is not None and asked in names else names[0]
        valid = one.settings["valid"]
        return table, [valid], [f"no published number for data {valid!r}"]
    found.sort(key=lambda entry: entry[0])
    _, table, columns, lines = found[0]
    if one.mode == "sample_eval" and is_of_another_kind(lines):
        name = Path(one.settings["tokenizer"]).name
        column = f"tokenizer {name}, length {one.settings['length']}"
        return table, [column], lines
    same = (entry[2] for entry in found[1:] if entry[1] == table and entry[3] == lines)
    return table, columns + [x for column in same for x in column], lines


def is_of_another_kind(lines: Iterable[str]) -> bool:
    """Whether numbers of samples are on another scale than the published ones."""
    return any(line.startswith(("tokenizer is ", "length is ")) for line in lines)


def rows_of(
    one: Evaluation,
    table: str,
    columns: Sequence[str],
    lines: Sequence[str],
    published: Iterable[Published],
) -> list[Row]:
    """An evaluation beside the published numbers of its cells.

    Args:
        one: The evaluation.
        table, columns, lines: From `place`.
        published: From `read_published`.
    """
    model, steps, number = model_of(one), "", ""
    if one.mode != "ppl_eval":
        steps = str(steps_of(one, model))
        number = round_of(one) if table == "distillation" else ""
    found = [x for x in published if x.table == table and x.model == model]
    every = [*lines, *objections(one, model)]
    alike = (x for x in found if x.dataset in columns and x.round == number)
    hint = signature(one, [x for x in alike if _is_near(x.steps, steps)])
    rows = []
    for metric, (value, error) in one.numbers.items():
        # Entropy is of the samples alone, and an n-gram model is a judge of its own.
        is_judged = one.mode != "sample_eval" or metric == "ppl"
        why = [line for line in every if is_judged or not line.startswith("judge is ")]
        cells = [(model, column, steps, number, metric) for column in columns]
        beside = [x for x in found if x.cell in cells]
        if not beside:
            none = f"{UNPUBLISHED} {metric} of {model} with these settings"
            reasons = [*why, *hint] or [none]
            rows.append(
                Row(
                    *(table, cells[0], None, one),
                    "not comparable" if why else "unpublished",
                    "; ".join(reasons),
                    depends_on(one),
                    not why,
                )
            )
        for x in beside:
            reasons = why + _other_training(one, x)
            word = "not comparable"
            if not reasons:
                word = verdict(value, error, x.value, metric)
                reasons = unknowns(one)
            reasons = reasons + hint
            fits = word != "not comparable"
            rows.append(Row(table, x.cell, x, one, word, "; ".join(reasons), fits=fits))
    return rows


def signature(one: Evaluation, beside: Iterable[Published]) -> list[str]:
    """A known sign that samples were not drawn as the published ones, in words.

    Args:
        one: The evaluation.
        beside: Published numbers of the same model and data in about as many steps.
    """
    published: dict[str, float] = {}
    for x in beside:  # of several sources the first
        published.setdefault(x.metric, float(x.value))
    limits = {"ppl": LOW_PPL, "entropy": LOW_ENTROPY}
    if not limits.keys() <= published.keys() & one.numbers.keys():
        return []
    is_low = all(one.numbers[x][0] < y * published[x] for x, y in limits.items())
    return [SIGNATURE] if is_low else []


def _is_near(steps: str, others: str) -> bool:
    """Whether two numbers of steps differ by a tenth at most."""
    if not steps or not others:
        return False
    return abs(int(steps) - int(others)) <= 0.1 * int(steps)


def depends_on(one: Evaluation) -> str:
    """What else the numbers of images depend on; two of them compare if it is equal."""
    if one.mode != "fid_eval":
        return ""
    settings = one.settings
    guidance = settings["guidance"]
    return ", ".join(
        (
            "no guidance" if not guidance else f"guidance {guidance:g}",
            settings["predictor"],
            settings["noise"],
            f"{settings['images']} images beside {settings['real_images']}",
            f"global batch {settings['global_batch']}",
            f"extractor {settings['extractor'][:8]}",
        )
    )


def _other_training(one: Evaluation, published: Published) -> list[str]:
    """Whether a number is of a training budget that the checkpoint has not had."""
    step = one.settings["step"]
    shown = "an unknown number of" if step is None else step
    if published.training_steps:
        wanted = int(published.training_steps)
        is_same = step is not None and abs(step - wanted) <= 0.1 * wanted
        return [] if is_same else [f"trained for {shown} steps, not {wanted}"]
    if published.table == "distillation" or step is None or step >= FEWEST_STEPS:
        return []
    return [f"trained for {shown} steps, less than the paper's"]


def unknowns(one: Evaluation) -> list[str]:
    """What the file does not say and the verdict relies on."""
    names = {
        "distilled": "whether the checkpoint was distilled",
        "weights": "whether the weights are EMA",
    }
    return [f"not stated {x}" for key, x in names.items() if one.settings[key] is None]


def compare(
    evaluations: Iterable[Evaluation],
    published: Sequence[Published],
    asked: str | None = None,
) -> list[Row]:
    """Every measured number beside every published one of its cell, by table.

    Args:
        evaluations: What was measured.
        published: From `read_published`.
        asked: `report.table`: of this table alone, with what was not measured.
    """
    rows: list[Row] = []
    for one in evaluations:
        table, columns, lines = place(one, asked)
        if asked in (None, table):
            rows += rows_of(one, table, columns, lines, published)
    seen = {row.published for row in rows}
    for x in published:
        if x.table == asked and x not in seen:
            rows.append(Row(asked, x.cell, x, None, "not measured"))
    order: dict[Published | None, int] = {x: i for i, x in enumerate(published)}
    tables = list(TABLES)
    return sorted(
        rows,
        key=lambda row: (
            tables.index(row.table),
            order.get(row.published, len(published)),
        ),
    )


def curves(rows: Sequence[Row], published: Iterable[Published]) -> list[Row]:
    """What belongs to the curves of samples that were measured, at other steps."""

    def line(x: Published) -> tuple[str, ...]:
        return x.table, x.model, x.dataset, x.round, x.source

    seen = {row.published for row in rows if row.published is not None}
    lines = {line(x) for x in seen if x.steps}
    others = [x for x in published if line(x) in lines and x not in seen]
    return [Row(x.table, x.cell, x, None, "not measured") for x in others]


def other_rows(rows: Iterable[Row]) -> list[str]:
    """Where evaluations of one column were not on the same rows of data."""
    hashes: dict[str, set[str]] = {}
    for row in rows:
        if row.evaluation and "sha256" in row.evaluation.settings:
            short = row.evaluation.settings["sha256"][:16]
            hashes.setdefault(row.cell[1], set()).add(short)
    return [
        f"{name}: the files are of different rows of data (sha256 "
        f"{', '.join(sorted(found))}), so compare them with the paper alone."
        for name, found in hashes.items()
        if len(found) > 1
    ]
