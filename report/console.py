"""Results, samples and paths on the screen."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from metrics.numbers import measured
from utils import path_exists, printable, whole_file

console = Console(emoji=False)


def say(text: str, style: str = "") -> None:
    """Text as it is: a long line stays one, on a terminal and in a pipe."""
    console.print(
        printable(text), soft_wrap=True, markup=False, highlight=False, style=style
    )


@rank_zero_only
def report_config(config: DictConfig, differences: Sequence[str]) -> None:
    """Saves the whole config as config_tree.txt, and prints what matters of it.

    Args:
        config: The run's, resolved.
        differences: Lines of what is not as it usually is.
    """
    path = f"{config.checkpointing.save_dir}/config_tree.txt"
    whole = list(tree(OmegaConf.to_container(config, resolve=True)))
    with whole_file(path, "w") as file:
        file.writelines(f"{line}\n" for line in whole)
    if config.print_config:
        for line in whole:
            say(line)
    else:
        say("what differs from the defaults (print_config=True prints all):", "bold")
        for line in differences:
            say(f"  {line}")


def tree(node: Any, indent: str = "") -> Iterator[str]:
    """A config as lines: each value whole and on one, below the names of its nodes."""
    for name, value in node.items():
        is_node = isinstance(value, dict) and value
        end = "" if is_node else f" {'null' if value is None else value}"
        yield printable(f"{indent}{name}:{end}", keep="")
        if is_node:
            yield from tree(value, f"{indent}  ")


def report_lines(lines: Mapping[str, object], title: str = "") -> None:
    """Names and what they are, each on one line, under a title if there is one."""
    if title:
        say(title, "bold")
    width = max(len(printable(name, keep="")) for name in lines)
    for name, value in lines.items():
        say(f"  {printable(name, keep=''):<{width}}  {printable(value, keep='')}")


GIVEN = ("\u27e6", "\u27e7")  # what stands around tokens that were given


@rank_zero_only
def report_samples(texts: Sequence[str], given: Sequence[Sequence[str]] = ()) -> None:
    """Samples as they were drawn.

    Args:
        texts: The samples.
        given: Of each, the parts that were not drawn, in their order.
    """
    if any(given):
        say(f"between {GIVEN[0]} and {GIVEN[1]} is what was given; the rest was drawn")
    for index, text in enumerate(texts):
        console.rule(f"sample {index + 1}")
        say(marked(text, given[index]) if given else text)


def marked(text: str, given: Sequence[str]) -> str:
    """A text with signs around the parts that were given.

    Args:
        text: Begins with the first part.
        given: The parts, in their order. The text is as it was if they are not in it.
    """
    parts = [part for part in given if part]
    pattern = "(.*?)".join(re.escape(part) for part in parts)
    found = re.match(f"{pattern}(.*)$", text, re.DOTALL) if parts else None
    if found is None:
        return text
    pieces = zip(parts, found.groups(), strict=True)
    return "".join(f"{GIVEN[0]}{part}{GIVEN[1]}{drawn}" for part, drawn in pieces)


# What stands in the JSON, and is said elsewhere or by the title.
HIDDEN = ("complete", "num_samples")


def report_sampling(config: DictConfig, results: dict[str, Any]) -> None:
    """What samples are worth and what they cost."""
    hidden = list(HIDDEN)
    if results.get("ngram_ppl") is None:
        hidden.append("ngram_ppl")
    elif results["generative_ppl"] is None:
        hidden.append("generative_ppl")
    lines = {
        name: measured(value, results.get(f"{name}_stderr"))
        for name, value in results.items()
        if not name.endswith("_stderr") and name not in hidden
    }
    lines["file"] = config.eval.generated_samples_path
    if config.sampling.save_trajectory is not None:
        lines["page"] = config.sampling.save_trajectory
    title = f"{results['num_samples']} samples, {config.sampling.predictor}"
    report_lines(lines, title)


def report_images(record: Mapping[str, Any], path: str) -> None:
    """A table of what generated images are worth, and what that depends on.

    Args:
        record: The content of the file.
        path: Of the file.
    """
    sampling, extractor = record["sampling"], record["extractor"]
    title = f"{record['num_images']} images beside {record['num_real']} real ones"
    score = measured(record["inception_score"], record["inception_score_std"])
    each = f"{sampling['processes']} x {sampling['batch_size']}"
    lines = {
        "FID": f"{record['fid']:.4f} (of few images it is too large: compare with as "
        f"many, {record['num_images']})",
        "Inception Score": f"{score} over the splits",
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
    report_lines(lines, title)


@rank_zero_only
def report_files(config: DictConfig, trainer: lightning.Trainer) -> None:
    """Where the run left its files."""
    save_dir = config.checkpointing.save_dir
    lines = {
        "checkpoints": f"{save_dir}/checkpoints",
        "config": f"{save_dir}/config_tree.txt",
    }
    for logger in trainer.loggers:
        has_own = isinstance(logger, CSVLogger | TensorBoardLogger)
        folder = logger.log_dir if has_own else logger.save_dir
        lines[f"{type(logger).__name__.removesuffix('Logger')} log"] = f"{folder}"
    if path_exists(f"{save_dir}/samples"):
        lines["samples"] = f"{save_dir}/samples"
    report_lines(lines, "files of this run")
