"""What a run with `training.flops` says of its budget: lines on the screen when it
begins, and compute.json in its folder when it is complete.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from metrics.numbers import measured
from models.flops import UNIT, Compute
from report.console import report_lines
from utils import write_json

FILE = "compute.json"  # in the folder of a run


@rank_zero_only
def report_compute(config: DictConfig, compute: Compute) -> None:
    """Steps, tokens and FLOP of a run."""
    steps = config.trainer.max_steps
    spent = measured(steps * compute.step_flops / UNIT)
    lines = {
        "non-embedding parameters": f"{compute.parameters}",
        "FLOP of a token": f"{compute.token_flops:.4g}, forward and backward",
        "steps": f"{steps} of {compute.step_tokens} tokens",
        "tokens": f"{steps * compute.step_tokens}",
        "FLOP": f"{spent} of {config.training.flops} x 1e18",
    }
    report_lines(lines, "training.flops sets trainer.max_steps")


@rank_zero_only
def save_compute(
    config: DictConfig, compute: Compute, results: Mapping[str, Any]
) -> None:
    """Writes compute.json, if the last step was validated.

    Args:
        config: The run's config.
        compute: What its training takes.
        results: Of `evaluation.likelihood.report_likelihood`.
    """
    steps = config.trainer.max_steps
    if results.get("step") != steps:
        return
    record = {
        "mode": "train",
        "algo": config.algo.name,
        "loss_type": config.algo.get("loss_type"),
        "data": config.data.valid,
        "train_data": config.data.train,
        "tokenizer": config.data.tokenizer_name_or_path,
        "length": config.model.length,
        "global_batch_size": config.loader.global_batch_size,
        "model": config.model.name,
        "seed": config.seed,
        "budget": config.training.flops * UNIT,  # FLOP
        "flops": steps * compute.step_flops,
        "flops_per_token": compute.token_flops,
        "parameters": compute.parameters,
        "steps": steps,
        "tokens": steps * compute.step_tokens,
        "nll": results["nll"],  # nats a token, of held-out data
        "nll_stderr": results["nll_stderr"],
        "weights": results["weights"],
    }
    write_json(f"{config.checkpointing.save_dir}/{FILE}", record)
