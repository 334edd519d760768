"""What an evaluation says of itself: the weights that were measured, and the rows."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from checkpoints.about import DISTILLED, likelihood
from checkpoints.checkpoint import Checkpoint
from data.fingerprints import Fingerprint
from models.registry import block_size_of
from report.runs import NUMBERS
from sampling.correctors import Gibbs
from utils import ConfigError, filesystem_of, first_line

ROUNDS = ("algo.update_teacher_every", "algo.grow_dt_every")  # updates of a round


def check_path(path: Any, key: str) -> None:
    """Refuses what cannot be the path of a file, before it takes hours to find out.

    Raises:
        ConfigError: If it is no text, a folder, or of an unknown kind of store.
    """
    try:
        if isinstance(path, str) and path:
            filesystem, inner = filesystem_of(path)
            if not filesystem.isdir(inner):
                return
        reason = "give a local or fsspec path of a file"
    except (ValueError, ImportError) as error:
        reason = first_line(error)
    raise ConfigError(f"{key}={path!r} cannot be written: {reason}.")


def origin(config: DictConfig, checkpoint: Checkpoint, has_ema: bool) -> dict[str, Any]:
    """What the evaluated weights are, as plain data; None where a file does not say.

    Args:
        config: The run's config.
        checkpoint: The one that was evaluated.
        has_ema: Whether the model took EMA weights from it.
    """
    algo = checkpoint.setting("algo.name")
    says = checkpoint.likelihood  # a folder may not know
    is_known = isinstance(algo, str) and says in (None, likelihood(algo))
    rounds = map(checkpoint.setting, ROUNDS)
    values = {
        "path": config.eval.checkpoint_path,
        "algo": algo,
        "distilled": algo in DISTILLED if is_known else None,
        "step": checkpoint.step,
        "update_teacher_every": next((x for x in rounds if x is not None), None),
        "teacher_ema": checkpoint.setting("algo.teacher_ema"),
        "weights": _weights(config, checkpoint, has_ema),
    }
    plain = (bool, int, str)
    return {key: x if isinstance(x, plain) else None for key, x in values.items()}


def _weights(config: DictConfig, checkpoint: Checkpoint, has_ema: bool) -> Any:
    """EMA or raw; of a Hugging Face folder what it says of itself."""
    if has_ema:
        return "raw" if config.eval.disable_ema else "EMA"
    return checkpoint.weights_kind if checkpoint.format is not None else "raw"


def likelihood_record(
    config: DictConfig,
    results: Mapping[str, Any],
    fingerprint: Fingerprint,
    expected: Fingerprint | None,
    of_checkpoint: Mapping[str, Any],
    of_documents: Mapping[str, int | None],
) -> dict[str, Any]:
    """The content of `eval.results_path`.

    Args:
        config: The run's config.
        results: nll (nats per token), bpd (bits per token), ppl (not of images),
            bits_per_byte (where tokens have bytes of their own), and the standard error
            of each under NAME_stderr; rows and tokens that were measured; estimator,
            in words.
        fingerprint: Of all rows of the data set.
        expected: Of the published data set's, where it is known.
        of_checkpoint: From `origin`.
        of_documents: How many the rows' source has, and the published one:
            `documents` and `published_documents`; None: not known.
    """
    numbers = (*NUMBERS, "bits_per_byte")
    names = [*numbers, *(f"{name}_stderr" for name in numbers)]
    data = config.data
    return {
        "mode": "ppl_eval",
        "algo": config.algo.name,
        "block_size": block_size_of(config),  # tokens
        "seed": config.seed,
        "estimator": results.get("estimator"),
        "precision": str(config.trainer.precision),
        "loss_precision": config.training.loss_precision,  # of the logits
        "checkpoint": dict(of_checkpoint),
        "data": {
            "valid": data.valid,
            "tokenizer": data.tokenizer_name_or_path,
            "length": config.model.length,
            "wrap": data.wrap,
            "insert_valid_eos": data.insert_valid_eos,
            "limit_val_batches": config.trainer.limit_val_batches,
            **of_documents,
            **fingerprint._asdict(),  # of all rows
            "measured_rows": results["rows"],
            "measured_tokens": results["tokens"],
            "expected_sha256": None if expected is None else expected.sha256,
        },
        **{name: _finite(results.get(name, math.nan)) for name in names},
        **_chain_rule(results.get("chain_rule")),
    }


def _chain_rule(exact: Mapping[str, Any] | None) -> dict[str, Any]:
    """Under `chain_rule`, where it was measured: estimator, order, block, numbers."""
    if exact is None:
        return {}
    plain = {x: _finite(y) if type(y) is float else y for x, y in exact.items()}
    return {"chain_rule": plain}


def samples_record(
    config: DictConfig, draws: torch.dtype, of_checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    """What `samples.json` says beside the samples' numbers and `settings`.

    Args:
        config: The run's config.
        draws: Type of the probabilities from which tokens were drawn.
        of_checkpoint: From `origin`.
    """
    names = ("train", "valid", "wrap")
    return {
        "checkpoint": dict(of_checkpoint),
        "draws": str(draws).removeprefix("torch."),
        "data": {name: config.data.get(name) for name in names},
    }


def images_record(
    config: DictConfig,
    results: Mapping[str, Any],
    extractor: Mapping[str, Any],
    world_size: int,
    of_checkpoint: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `eval.results_path` in mode=fid_eval.

    Args:
        config: The run's config.
        results: fid, inception_score and its deviation over the splits, numbers of
            images, seconds; files that were written.
        extractor: Of the features: path, sha256, kind.
        world_size: Processes that drew a batch at a time each.
        of_checkpoint: From `origin`.
    """
    sampling, batch_size = config.sampling, config.loader.eval_batch_size
    names = (
        *("steps", "refine_steps", "predictor", "guid_weight", "noise_removal"),
        *("temperature", "p_nucleus", "use_float64"),
        *("order", "order_noise", "gamma", "corrector", *Gibbs.keys),
    )
    return {
        "mode": "fid_eval",
        "algo": config.algo.name,
        "seed": config.seed,
        "checkpoint": dict(of_checkpoint),
        "data": {
            "train": config.data.train,
            "length": config.model.length,
            "num_classes": config.data.num_classes,
        },
        "sampling": {
            **{name: sampling[name] for name in names},
            "noise": config.noise.type,
            "batch_size": batch_size,  # of a process
            "processes": world_size,
            "global_batch_size": batch_size * world_size,
        },
        "extractor": dict(extractor),
        **results,
    }


def _finite(x: float) -> float | None:
    """JSON has no NaN; below two rows there is no standard error."""
    return x if math.isfinite(x) else None
