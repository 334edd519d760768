"""What a run says at its beginning and at its end: the config, tables, samples."""

from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.tree import Tree

from dataloader import DataModule
from evaluations import likelihood_record, origin
from metrics import unigram_nll
from published import known_fingerprint, published_documents
from trainer_base import TrainerBase
from utils import path_exists, whole_file, write_json

console = Console()


@rank_zero_only
def report_config(config: DictConfig) -> None:
    """Prints the composed config as a tree and saves it as config_tree.txt."""
    tree = Tree("config")
    for key in config:
        value = config[key]
        if OmegaConf.is_config(value):
            text = OmegaConf.to_yaml(value, resolve=True).rstrip()
            tree.add(key).add(escape(text))
        else:
            tree.add(escape(f"{key}: {value}"))
    console.print(tree)
    with whole_file(f"{config.checkpointing.save_dir}/config_tree.txt", "w") as file:
        Console(file=file, width=100).print(tree)


@rank_zero_only
def report_likelihood(
    config: DictConfig,
    model: TrainerBase,
    data: DataModule,
    checkpoint: Mapping[str, Any] | None = None,
) -> None:
    """A table of the last validation, beside a unigram model if asked for.

    Of a `checkpoint` it is written to `eval.results_path`, too.
    """
    results = model.valid_results
    if not results:
        return
    weights = "raw" if model.ema is None or config.eval.disable_ema else "EMA"
    rows = data.load("valid")
    title = f"validation on {config.data.valid}: {len(rows)} rows, {weights} weights"
    columns = ("metric", Column("value", overflow="fold"), "standard error")
    table = Table(*columns, title=title, min_width=len(title) + 2)
    for name in ("nll", "bpd", "ppl"):
        error = results[f"{name}_stderr"]
        table.add_row(f"val/{name}", f"{results[name]:.4f}", f"{error:.4f}")
    if config.eval.unigram_baseline:
        counts = (x.valid_counts(model.vocab_size) for x in (data.load("train"), rows))
        nll = unigram_nll(*counts)
        ppl = torch.tensor(nll).exp()
        table.add_row("val/ppl of a unigram model", f"{ppl:.4f}", "")
    documents, fingerprint = rows.num_documents, rows.fingerprint()
    published = published_documents(config, "valid")
    if documents is not None:
        other = "" if published in (None, documents) else f"; published: {published}"
        table.add_row("documents of the source", f"{documents}{other}", "")
    table.add_row("rows", str(fingerprint.rows), "")
    table.add_row("tokens", str(fingerprint.tokens), "")
    expected = known_fingerprint(config)
    is_known = "" if expected is None else ", as published"
    if expected not in (None, fingerprint):
        is_known = f"; published: {expected.line()}"
    table.add_row("sha256 of the rows", f"{fingerprint.sha256[:16]}{is_known}", "")
    if checkpoint is not None:
        about = origin(config, checkpoint, model.ema is not None)
        found = {"documents": documents, "published_documents": published}
        record = likelihood_record(config, results, fingerprint, expected, about, found)
        write_json(config.eval.results_path, record)
        table.add_row("file", escape(config.eval.results_path), "")
    console.print(table)


def report_lines(lines: Mapping[str, str]) -> None:
    table = Table("what", Column("value", overflow="fold"))
    for name, value in lines.items():
        table.add_row(name, escape(value))
    console.print(table)


@rank_zero_only
def report_samples(texts: list[str]) -> None:
    for index, text in enumerate(texts):
        console.rule(f"sample {index + 1}")
        console.print(text, markup=False, highlight=False)


def report_sampling(config: DictConfig, results: dict[str, Any]) -> None:
    """A table of what samples are worth and what they cost."""
    title = f"{results['num_samples']} samples, {config.sampling.predictor}"
    columns = ("metric", Column("value", overflow="fold"), "standard error")
    table = Table(*columns, title=title, min_width=len(title) + 2)
    hidden = ["complete", "num_samples"]
    if results.get("ngram_ppl") is None:
        hidden.append("ngram_ppl")
    elif results["generative_ppl"] is None:
        hidden.append("generative_ppl")
    for name, value in results.items():
        if name.endswith("_stderr") or name in hidden:
            continue
        cells = (value, results.get(f"{name}_stderr"))
        table.add_row(name, *("-" if x is None else f"{x:.4f}" for x in cells))
    path = config.eval.generated_samples_path
    table.add_row("file", escape(path), "")
    console.print(table)


@rank_zero_only
def report_files(config: DictConfig, trainer: lightning.Trainer) -> None:
    """Where the run left its files."""
    save_dir = config.checkpointing.save_dir
    where = Column("where", overflow="fold")  # a cut path is of no use
    table = Table("what", where, title="files of this run")
    table.add_row("checkpoints", escape(f"{save_dir}/checkpoints"))
    table.add_row("config", escape(f"{save_dir}/config_tree.txt"))
    for logger in trainer.loggers:
        folder = logger.log_dir if isinstance(logger, CSVLogger) else logger.save_dir
        table.add_row(f"{type(logger).__name__} log", escape(f"{folder}"))
    if path_exists(f"{save_dir}/samples"):
        table.add_row("samples", escape(f"{save_dir}/samples"))
    console.print(table)
