"""`mode=report`: reads evaluations, makes those that are missing, and says where they
agree with the published numbers, as tables, CSV and a picture.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from checkpoints.about import DISTILLED
from metrics.numbers import measured
from report.console import cell
from report.jobs import Job, make
from report.plots import draw
from report.runs import read_runs
from report.tables import (
    BERT,
    GPT2,
    MODELS,
    PREDICTORS,
    TABLES,
    TableSpec,
    read_published,
)
from report.verdicts import RULE, Row, compare, curves, other_rows, place
from utils import ConfigError, RunStopped, choose, path_exists, printable, whole_file

COLUMNS = (
    *("table", "model", "dataset", "steps", "round", "metric"),
    *("paper", "source", "note", "measured", "stderr", "difference", "verdict"),
    *("reason", "file"),
)

# ---------------------------------------------------------------- the mode


def report(config: DictConfig) -> dict[str, int]:
    """Reads, evaluates, compares, prints and saves, as `report` of the config says.

    Returns:
        How many rows have which verdict.

    Raises:
        ConfigError: If there is nothing to compare, or a key has no meaning.
        RunStopped: If evaluations failed; the rest is reported before.
    """
    asked = config.report.table
    if asked is not None:
        choose(TABLES, asked, "report.table")
    published = read_published()
    runs = texts(config, "runs")
    folder = here(config.report.path)
    failed: list[str] = []
    if jobs := jobs_of(config):
        files, failed = make(jobs, f"{folder}/runs/{asked}")
        runs += files
    elif not runs:
        raise ConfigError(
            "report.runs=[] and report.checkpoints={}: give files or folders of "
            "evaluations, or +report.checkpoints.duo=FILE."
        )
    models = {x.model for x in published}
    evaluations = read_runs([_named(entry, models) for entry in runs])
    rows = compare(evaluations, published, asked)
    if not any(row.evaluation for row in rows):
        others = sorted({place(one, asked)[0] for one in evaluations})
        raise ConfigError(
            f"report.table={asked!r}: the evaluations are of {', '.join(others)}."
        )
    save(rows, curves(rows, published), folder)
    if failed:
        raise RunStopped(
            f"{len(failed)} of {len(jobs)} evaluations failed; {failed[0]}"
        )
    words = [row.verdict for row in rows]
    return {word: words.count(word) for word in sorted(set(words))}


def texts(config: DictConfig, name: str) -> list[str]:
    """A list of texts under `report`, or a single one."""
    value = config.report[name]
    value = list(value) if isinstance(value, ListConfig) else [value]
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"report.{name}={value!r} is not a list of texts.")
    return value


def here(path: str) -> str:
    """A path as seen from where the command was given; not of URLs and hub ids."""
    return path if "://" in path else to_absolute_path(path)


def _named(entry: str, models: Iterable[str]) -> tuple[str | None, str]:
    """MODEL=PATH, or a path alone, as its two parts."""
    name = next((name for name in models if entry.startswith(f"{name}=")), None)
    return name, here(entry if name is None else entry[len(name) + 1 :])


def jobs_of(config: DictConfig) -> list[Job]:
    """The evaluations of `report.checkpoints` for `report.table`."""
    node = config.report.checkpoints
    if not isinstance(node, DictConfig):
        raise ConfigError(
            f"report.checkpoints={node!r} is not of the form MODEL: FILE."
        )
    # A node with keys becomes a dict; OmegaConf's types do not say so.
    checkpoints = cast(dict[str, Any], OmegaConf.to_container(node))
    if not checkpoints:
        for name in ("data", "overrides"):
            if texts(config, name):
                raise ConfigError(f"report.{name} is of no use: no report.checkpoints.")
        return []
    if config.report.table is None:
        names = ", ".join(TABLES)
        raise ConfigError(
            f"report.table=null: report.checkpoints need a table. Choose from: {names}."
        )
    spec = TABLES[config.report.table]
    if not spec.data:
        raise ConfigError(
            f"report.table={config.report.table} is of evaluations that are there: "
            f"give report.runs, the JSON of mode={spec.mode}, not report.checkpoints."
        )
    user = dict(_pair(text) for text in texts(config, "overrides"))
    if plugins := config.plugins:
        named = plugins if isinstance(plugins, str) else ",".join(plugins)
        user = {"plugins": f"[{named}]"} | user
    return [
        _job(spec, model, path, data, extra, user)
        for model, path in checkpoints.items()
        for data in texts(config, "data") or spec.data
        for extra in spec.extra
    ]


def _pair(text: str) -> tuple[str, str]:
    key, is_pair, value = text.partition("=")
    if not is_pair:
        raise ConfigError(f"report.overrides: {text!r} is not of the form KEY=VALUE.")
    return key, value


def _job(
    spec: TableSpec,
    model: str,
    path: Any,
    data: str,
    extra: Mapping[str, str],
    user: Mapping[str, str],
) -> Job:
    """One evaluation; what the user gives wins."""
    choose(MODELS, model, "report.checkpoints")
    if model in DISTILLED and spec is not TABLES["distillation"]:
        raise ConfigError(
            f"report.checkpoints.{model} needs report.table=distillation."
        )
    if not isinstance(path, str) or not path:
        raise ConfigError(f"report.checkpoints.{model}={path!r} is no path.")
    checkpoint = here(path) if path_exists(here(path)) else path  # else a hub id
    is_lm1b = data in ("lm1b", "lm1b-wrap")
    base = {
        "mode": spec.mode,
        "algo": "duo_base" if MODELS[model] == "Duo" else model,
        "data": data,
        "model": "small",
        "model.length": str((BERT if is_lm1b else GPT2)["length"]),
        "eval.checkpoint_path": checkpoint,
        "loader.eval_batch_size": "16",
    }
    sampling = {
        "eval.compute_generative_perplexity": "True",
        "loader.eval_batch_size": "8",
        "sampling.num_sample_batches": "100",
    }
    if spec.mode == "sample_eval":
        predictor = PREDICTORS.get(MODELS[model], ("ancestral",))[0]
        base |= sampling | {"sampling.predictor": predictor}
    name = "-".join([model, data, *(x for k, x in extra.items() if "sampling" in k)])
    result = {
        "ppl_eval": "eval.results_path",
        "sample_eval": "eval.generated_samples_path",
    }[spec.mode]
    return Job(name, {**base, **extra, **user}, result, checkpoint)


# ---------------------------------------------------------------- output


def save(rows: Sequence[Row], drawn: Sequence[Row], folder: str) -> None:
    """Prints tables, and writes report.csv, report.md and report.png.

    Args:
        rows: Of the report.
        drawn: Further ones for the picture.
        folder: Local or fsspec.
    """
    with whole_file(f"{folder}/report.csv", "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.record() for row in rows)
    tables = {name: [row for row in rows if row.table == name] for name in TABLES}
    tables = {name: some for name, some in tables.items() if some}
    notes = [*other_rows(rows), RULE]
    console, parts = Console(emoji=False), ["# Measured beside published"]
    if not console.is_terminal:  # a job's log has room
        console = Console(width=120, emoji=False)
    for name, some in tables.items():
        header, cells = layout(some)
        title = f"{name}: {TABLES[name].title}"
        console.print(narrow(title, header, cells))
        parts += [f"## {title}", *_grid(some), markdown(header, cells)]
    for note in notes:
        console.print(printable(note), markup=False, highlight=False)
    with whole_file(f"{folder}/report.md", "w") as file:
        file.write("\n\n".join([*parts, *notes, "## Files", files_of(rows)]) + "\n")
    titles = {name: TABLES[name].title for name in tables}
    with whole_file(f"{folder}/report.png") as file:
        draw([row.record() for row in (*rows, *drawn)], titles, file)
    names = (cell(f"{folder}/report.{end}") for end in ("md", "csv", "png"))
    console.print("report:", *names, soft_wrap=True, highlight=False)


def layout(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table, without columns that say nothing."""
    lines = [_line(row) for row in rows]
    kept = [name for name in lines[0] if any(line[name] for line in lines)]
    if all(line["metric"] == "ppl" for line in lines):
        kept.remove("metric")
    return kept, [[line[name] for name in kept] for line in lines]


def narrow(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """For the screen: what is the same in every line is said once, in the title."""
    columns = list(zip(header, zip(*cells, strict=True), strict=True))
    same = [
        (name, column)
        for name, column in columns
        if name in ("dataset", "round", "source") and len(cells) > 1
        if len(set(column)) == 1
    ]
    said = ", ".join(f"{name} {column[0]}" for name, column in same)
    shown = [pair for pair in columns if pair not in same]
    table = Table(title=f"{title}; {said}" if said else title)
    for name, _ in shown:
        may_fold = name in ("model", "verdict", "note")
        table.add_column(name, overflow="fold", no_wrap=not may_fold)
    for line in zip(*(column for _, column in shown), strict=True):
        table.add_row(*map(cell, line))
    return table


def _line(row: Row) -> dict[str, str]:
    """A row as text, by column."""
    record = row.record()
    line = {name: record[name] for name in COLUMNS[1:] if name not in _WORKED_IN}
    if row.measured:
        value, error = row.measured
        line["measured"] = measured(value, error)
    if record["difference"] is not None:
        line["difference"] = f"{record['difference']:+.3g}"
    line["verdict"] += f": {row.reason}" if row.reason else ""
    line["note"] = line.pop("note")  # last
    return {name: text or "" for name, text in line.items()}


_WORKED_IN = ("stderr", "reason", "file")  # into other columns, or shown elsewhere


def _grid(rows: Sequence[Row]) -> list[str]:
    """Models by data sets as in the papers, of perplexities that can be compared."""
    if TABLES[rows[0].table].mode != "ppl_eval":
        return []
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.measured and row.published and row.verdict != "not comparable":
            value, error = row.measured
            text = f"{measured(value, error)} ({row.published.value})"
            model, dataset, *_ = row.cell
            cells.setdefault((model, dataset), text)  # the first source
    if not cells:
        return []
    models = dict.fromkeys(model for model, _ in cells)
    names = [x for x in TABLES[rows[0].table].columns if any(x == d for _, d in cells)]
    lines = [[m, *(cells.get((m, name), "-") for name in names)] for m in models]
    return ["Measured (paper):", markdown(["model", *names], lines)]


def files_of(rows: Iterable[Row]) -> str:
    """A table of the evaluations, in Markdown."""
    names = ("checkpoint", "step", "weights", "seed", "rows", "tokens", "sha256")
    seen = {row.evaluation.path: row.evaluation for row in rows if row.evaluation}
    lines = []
    for path, one in seen.items():
        values = (part_of(one.settings, name) for name in names)
        lines.append([path, *("-" if x is None else str(x) for x in values)])
    return markdown(["file", *names], lines)


def part_of(settings: Mapping[str, Any], name: str) -> Any:
    """A setting; of rows and tokens also how many of them were measured."""
    value, rows = settings.get(name), settings.get("rows")
    measured = settings.get("measured_rows")
    if name not in ("rows", "tokens") or measured in (None, rows):
        return value
    return f"{settings[f'measured_{name}']} of {value}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    rows = [header, ["---"] * len(header), *lines]
    clean = ([x.replace("|", "\\|").replace("\n", " ") for x in row] for row in rows)
    clean = ([printable(x, keep="") for x in row] for row in clean)
    return "\n".join(f"| {' | '.join(row)} |" for row in clean)
