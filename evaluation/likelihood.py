"""`mode=ppl_eval`: the likelihood of held-out text or images under a checkpoint, as a
table and as a file.
"""

import math
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from checkpoints.checkpoint import Checkpoint
from checkpoints.reading import read_evaluated
from cli.settle import prepare
from data.encoding import bytes_of_ids
from data.fingerprints import known_fingerprint
from data.published import published_documents
from data.rows import TokenRows
from data.tokenizers import get_tokenizer
from dataloader import DataModule, check_limit
from evaluation.chain_rule import ChainRule, check_chain_rule
from evaluation.records import check_path, likelihood_record, origin
from metrics.likelihood import unigram_nll
from metrics.numbers import measured
from models.registry import block_size_of
from report.console import report_lines
from trainer_base import TrainerBase
from training.loggers import build_loggers
from training.trainer import build_trainer
from utils import write_json


class Wording(NamedTuple):
    """What a table says of one kind of data."""

    sources: str  # of which rows are made
    metrics: dict[str, str]  # and what follows their names
    unigram: str


# By `data.modality`. A value of an image is a dimension, and has no perplexity.
WORDINGS = {
    "text": Wording(
        "documents", {"nll": "", "bpd": "", "ppl": ""}, "val/ppl of a unigram model"
    ),
    "image": Wording(
        "images",
        {"nll": ", nats per dimension", "bpd": ", bits per dimension"},
        "val/bpd of a histogram of values",
    ),
}


def ppl_eval(config: DictConfig) -> dict[str, Any]:
    """Prints val/nll, val/bpd and val/ppl of a checkpoint, with standard errors, and
    writes them to `eval.results_path`."""
    algorithm = prepare(config)
    check_chain_rule(config, algorithm)
    check_path(config.eval.results_path, "eval.results_path")
    checkpoint = read_evaluated(config)
    tokenizer = get_tokenizer(config)
    model = algorithm(config, tokenizer)
    model.load_weights(checkpoint, "eval.checkpoint_path")
    data = DataModule(config, tokenizer, model.mask_index)
    check_limit(config, len(data.load("valid")))
    has_chain_rule = config.eval.likelihood == "chain_rule"
    beside = [ChainRule(config.eval)] if has_chain_rule else []
    trainer = build_trainer(config, callbacks=[*beside], logger=build_loggers(config))
    trainer.validate(model, datamodule=data, verbose=False)
    exact = beside[0].record() if beside else None
    return report_likelihood(config, model, data, checkpoint, exact)


def report_likelihood(
    config: DictConfig,
    model: TrainerBase,
    data: DataModule,
    checkpoint: Checkpoint | None = None,
    chain_rule: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A table of the last validation, beside a unigram model if asked for.

    Of a `checkpoint` it is written to `eval.results_path`, too, with what
    `ChainRule.record` says, if anything.

    Returns:
        The numbers of the validation, of which step and weights they are, and how many
        rows and tokens were measured; nothing if there was no validation.
    """
    if not model.valid_results:
        return {}
    is_averaged = model.ema is not None and not model.is_one_step  # what is measured
    weights = "EMA" if is_averaged and not config.eval.disable_ema else "raw"
    results: dict[str, Any] = model.valid_results | {"weights": weights}
    about = None
    if checkpoint is not None:
        about = origin(config, checkpoint, is_averaged)
        results |= {name: about[name] for name in ("step", "weights")}
    if "ppl" not in WORDINGS[config.data.modality].metrics:
        results = {x: y for x, y in results.items() if not x.startswith("ppl")}
    if chain_rule is not None:
        results["chain_rule"] = chain_rule
    _report(config, model, data, results, about)
    return results


@rank_zero_only
def _report(
    config: DictConfig,
    model: TrainerBase,
    data: DataModule,
    results: dict[str, Any],
    about: dict[str, Any] | None,
) -> None:
    words = WORDINGS[config.data.modality]
    rows, said = data.load("valid"), results["rows"]
    part = f" of {len(rows)}" if said < len(rows) else ""
    step, weights = results["step"], results["weights"]
    of_step = "" if step is None else f" at step {step}"
    kind = "weights" if weights is None else f"{weights} weights"
    title = f"validation on {config.data.valid}{of_step}: {said}{part} rows, {kind}"
    lines: dict[str, object] = {}
    for name, units in words.metrics.items():
        number = measured(results[name], results[f"{name}_stderr"])
        lines[f"{model.bound}{name}{units}"] = number
    per_byte, tokens_per_byte = "bits per byte", _tokens_per_byte(rows, data.tokenizer)
    if tokens_per_byte is not None:
        for end in ("", "_stderr"):
            bits = results[f"bpd{end}"] * tokens_per_byte
            results = results | {f"bits_per_byte{end}": bits}
        number = measured(results["bits_per_byte"], results["bits_per_byte_stderr"])
        lines[f"{model.bound}{per_byte}"] = number
    if exact := results.get("chain_rule"):
        for name, units in words.metrics.items():
            number = measured(exact[name], exact[f"{name}_stderr"])
            lines[f"chain rule, {name}{units}"] = number
    if config.eval.unigram_baseline:
        counts = (x.valid_counts(model.vocab_size) for x in (data.load("train"), rows))
        nll = unigram_nll(*counts)
        value = math.exp(nll) if "ppl" in words.metrics else nll / math.log(2)
        lines[words.unigram] = measured(value)
        if tokens_per_byte is not None:
            value = nll / math.log(2) * tokens_per_byte
            lines[f"{per_byte} of a unigram model"] = measured(value)
    documents, fingerprint = rows.num_documents, rows.fingerprint()
    published = published_documents(config, "valid")
    if documents is not None:
        other = "" if published in (None, documents) else f"; published: {published}"
        lines[f"{words.sources} of the source"] = f"{documents}{other}"
    if part:
        limit = config.trainer.limit_val_batches
        lines["rows measured"] = (
            f"{said} of {fingerprint.rows} (trainer.limit_val_batches={limit})"
        )
        lines["tokens measured"] = f"{results['tokens']}"
    whole = " of all rows" if part else ""
    lines[f"rows{whole and ' in all'}"] = str(fingerprint.rows)
    lines[f"tokens{whole}"] = str(fingerprint.tokens)
    expected = known_fingerprint(config)
    is_known = "" if expected is None else ", as published"
    if expected not in (None, fingerprint):
        is_known = f"; published: {expected.line()}"
    name = f"sha256{whole or ' of the rows'}"
    lines[name] = f"{fingerprint.sha256[:16]}{is_known}"
    if about is not None:
        found = {"documents": documents, "published_documents": published}
        results = results | {"estimator": estimator_of(model)}
        record = likelihood_record(config, results, fingerprint, expected, about, found)
        write_json(config.eval.results_path, record)
        lines["file"] = config.eval.results_path
    report_lines(lines, title)


def estimator_of(model: TrainerBase) -> str:
    """How a validation finds a likelihood, in words."""
    if model.is_autoregressive:
        return "exact"
    steps = model.config.algo.T
    time = f"discrete time, T={steps}" if steps > 0 else "continuous time"
    if size := block_size_of(model.config):
        return (
            f"bound (NELBO) in {time}, of blocks of {size} tokens, by Monte Carlo "
            "with one time a block"
        )
    return f"bound (NELBO) in {time}, by Monte Carlo with one time a row"


def _tokens_per_byte(rows: TokenRows, tokenizer: Any) -> float | None:
    """How many tokens, special ones included, rows have for each byte of their text;
    None where tokens have no bytes of their own."""
    sizes = bytes_of_ids(tokenizer)
    if sizes is None:
        return None
    counts = rows.valid_counts(max(len(sizes), len(rows.counts())))
    num_bytes = int(sizes @ counts[: len(sizes)])
    return int(counts.sum()) / num_bytes if num_bytes else None
