"""`mode=report`: reads evaluations, makes those that are missing, and says where they
agree with the published numbers, as tables and a picture.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, ListConfig, OmegaConf

from checkpoints.about import DISTILLED
from checkpoints.locating import checkpoint_in
from checkpoints.outline import read_about
from report.compute import FILE as COMPUTE
from report.frontier import frontier as frontier_of
from report.frontier_output import save as save_frontier
from report.isoflop import isoflop as isoflop_of
from report.isoflop import read_trained
from report.isoflop_output import save as save_isoflop
from report.jobs import Job, make
from report.output import save
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
from report.training import read_logs
from report.training import save as save_training
from report.verdicts import compare, curves, place
from utils import (
    ConfigError,
    RunStopped,
    choose,
    files_named,
    imported,
    path_exists,
)

if TYPE_CHECKING:
    from report.curves import Curves

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
        choose({**TABLES, **OF_RUNS, **OF_NOTHING}, asked, "report.table")
    if config.report.entropy is not None and asked != "frontier":
        raise ConfigError(
            f"report.entropy={config.report.entropy} is for report.table=frontier, not "
            f"report.table={asked or 'null'}."
        )
    if asked in OF_RUNS:
        return OF_RUNS[asked](config)
    if asked in OF_NOTHING:
        return functions(config)
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
    evaluations = read_runs([named(entry, models) for entry in runs])
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


def training(config: DictConfig) -> dict[str, int]:
    """The curves of the runs of `report.runs`.

    Returns:
        How many there are.
    """
    logged = read_logs(runs_of(config, "the folders of runs, or their metrics.csv"))
    save_training(logged, here(config.report.path))
    return {"runs": len(logged)}


def frontier(config: DictConfig) -> dict[str, int]:
    """Samplers at the same entropy, from the samples of `report.runs`.

    Returns:
        How many there are.
    """
    what = "files or folders of mode=sample_eval"
    evaluations = read_runs(runs_of(config, what))
    shown = frontier_of(evaluations, config.report.entropy)
    if shown is None:
        raise ConfigError(
            f"report.table=frontier needs {what} with a judge: eval.ngram_order=5, or "
            "eval.gen_ppl_eval_model_name_or_path=gpt2-large."
        )
    save_frontier(shown, f"{here(config.report.path)}/report")
    return {"samplers": len(shown.samplers)}


def isoflop(config: DictConfig) -> dict[str, int]:
    """The best sizes for budgets, from the runs of `report.runs`.

    Returns:
        How many runs there are.
    """
    trained = read_trained(runs_of(config, f"the folders of runs with {COMPUTE}"))
    save_isoflop(isoflop_of(trained), f"{here(config.report.path)}/report")
    return {"runs": len(trained)}


def runs_of(config: DictConfig, what: str) -> list[tuple[str | None, str]]:
    """`report.runs` of a table that has nothing to evaluate.

    Args:
        config: The run's config.
        what: It reads.
    """
    table, runs = config.report.table, texts(config, "runs")
    if not runs:
        raise ConfigError(f"report.runs=[]: report.table={table} needs {what}.")
    if config.report.checkpoints:
        raise ConfigError(f"report.checkpoints is of no use: report.table={table}.")
    return [named(entry) for entry in runs]


def functions(config: DictConfig) -> dict[str, int]:
    """Curves that need no run.

    Returns:
        How many there are.
    """
    asked = config.report.table
    for name in ("runs", "checkpoints"):
        if config.report[name]:
            raise ConfigError(
                f"report.{name} is of no use: report.table={asked} needs no run."
            )
    shown: Curves = imported(OF_NOTHING[asked])(config)
    imported("report.curves.save_curves")(shown, here(config.report.path))
    return {"curves": len(shown.lines)}


# Tables of what runs have left, which no paper has: what makes them.
OF_RUNS = {"training": training, "frontier": frontier, "isoflop": isoflop}
# Of functions of the configuration.
OF_NOTHING = {
    "schedules": "report.curves.schedules",
    "operator": "integral.picture.operator",
}


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


def named(entry: str, models: Iterable[str] = ()) -> tuple[str | None, str]:
    """NAME=PATH, or a path alone, as its two parts.

    A name is that of a published model or anything else without a slash; a path that
    is there may hold the sign itself.
    """
    name = next((name for name in models if entry.startswith(f"{name}=")), None)
    first, _, rest = entry.partition("=")
    if name is None and first.strip() and rest and "/" not in first:
        path = here(entry)
        name = None if path_exists(path) or files_named(path) else first
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


def _says_its_length(checkpoint: str) -> bool:
    """Whether an evaluation takes the length from a checkpoint that is here."""
    key = "report.checkpoints"
    if not path_exists(checkpoint):
        return False
    try:
        about = read_about(checkpoint_in(checkpoint, key), key)
    except ConfigError:  # which the evaluation says
        return False
    return about.setting("model.length") is not None


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
    if _says_its_length(checkpoint):
        del base["model.length"]
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
