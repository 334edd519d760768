"""Tables and samples on the screen."""

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.tree import Tree

from utils import path_exists, printable, whole_file

console = Console(emoji=False)


def cell(value: object) -> str:
    """What stands in a table: no markup, and nothing that a screen would obey."""
    return escape(printable(value))


@rank_zero_only
def report_config(config: DictConfig) -> None:
    """Prints the composed config as a tree and saves it as config_tree.txt."""
    tree = Tree("config")
    for key, value in config.items():
        name = cell(key)
        if OmegaConf.is_config(value):
            text = OmegaConf.to_yaml(value, resolve=True).rstrip()
            tree.add(name).add(cell(text))
        else:
            tree.add(f"{name}: {cell(value)}")
    console.print(tree)
    with whole_file(f"{config.checkpointing.save_dir}/config_tree.txt", "w") as file:
        Console(file=file, width=100, emoji=False).print(tree)


def report_lines(lines: Mapping[str, str]) -> None:
    table = Table("what", Column("value", overflow="fold"))
    for name, value in lines.items():
        table.add_row(cell(name), cell(value))
    console.print(table)


@rank_zero_only
def report_samples(texts: list[str]) -> None:
    for index, text in enumerate(texts):
        console.rule(f"sample {index + 1}")
        console.print(printable(text), markup=False, highlight=False)


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
    table.add_row("file", cell(path), "")
    console.print(table)


def report_images(record: Mapping[str, Any], path: str) -> None:
    """A table of what generated images are worth, and what that depends on.

    Args:
        record: The content of the file.
        path: Of the file.
    """
    sampling, extractor = record["sampling"], record["extractor"]
    title = f"{record['num_images']} images beside {record['num_real']} real ones"
    table = Table("what", Column("value", overflow="fold"), title=title)
    score, deviation = (
        "-" if record[name] is None else f"{record[name]:.4f}"
        for name in ("inception_score", "inception_score_std")
    )
    each = f"{sampling['processes']} x {sampling['batch_size']}"
    lines = {
        "FID": f"{record['fid']:.4f} (of few images it is too large: compare with as "
        f"many, {record['num_images']})",
        "Inception Score": f"{score} ± {deviation} over the splits",
        "steps": f"{sampling['steps']}, {sampling['predictor']}",
        "guidance": sampling["guid_weight"],
        "network evaluations": f"{record['evaluations']:.1f} an image",
        "global batch": f"{sampling['global_batch_size']} ({each})",
        "extractor": f"{extractor['kind']}, sha256 {extractor['sha256'][:16]}",
        "seconds": f"{record['seconds']:.1f}",
        "images": record["images"],
        "picture": record["picture"],
        "file": path,
    }
    for name, value in lines.items():
        table.add_row(name, cell(value))
    console.print(table)


@rank_zero_only
def report_files(config: DictConfig, trainer: lightning.Trainer) -> None:
    """Where the run left its files."""
    save_dir = config.checkpointing.save_dir
    where = Column("where", overflow="fold")  # a cut path is of no use
    table = Table("what", where, title="files of this run")
    table.add_row("checkpoints", cell(f"{save_dir}/checkpoints"))
    table.add_row("config", cell(f"{save_dir}/config_tree.txt"))
    for logger in trainer.loggers:
        folder = logger.log_dir if isinstance(logger, CSVLogger) else logger.save_dir
        table.add_row(f"{type(logger).__name__} log", cell(f"{folder}"))
    if path_exists(f"{save_dir}/samples"):
        table.add_row("samples", cell(f"{save_dir}/samples"))
    console.print(table)
