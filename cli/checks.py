"""What can be refused about a config before anything heavy is imported, whatever the
algorithm: unknown keys and names, numbers out of range, keys without effect, files that
are not there.
"""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from checkpoints.locating import check_checkpoint_path
from cli.known_keys import INERT_KEYS, refuse_unread
from cli.older_keys import refuse_older_keys
from data.files import find_files
from data.readers import ON_BAD_ROW
from data.registry import check_splits, packed_splits
from data.tokenizers import check_tokenizer
from models.registry import validate_backbone
from sampling.registry import ALIASES, SAMPLERS
from utils import ConfigError, path_exists, require

# Keys whose value must be a number: (type, smallest, largest).
NUMBERS: dict[str, tuple[type, float, float | None]] = {
    "model.length": (int, 3, None),
    "model.hidden_size": (int, 1, None),
    "model.n_blocks": (int, 1, None),
    "model.n_heads": (int, 1, None),
    "model.dropout": (float, 0, 1),
    "algo.T": (int, 0, None),
    "algo.curriculum.gumbel_tau_log10_start": (float, -10, 3),
    "algo.curriculum.gumbel_tau_log10_end": (float, -10, 3),
    "algo.curriculum.start": (int, -1, None),
    "algo.curriculum.end": (int, -1, None),
    "algo.curriculum.top_k": (int, -1, None),
    "algo.curriculum.n_series_terms": (int, 1, 10_000),
    "algo.update_teacher_every": (int, 1, None),
    "algo.linear_growth_min": (float, 0, 1),
    "algo.linear_growth_max": (float, 0, 1),
    "noise.eps": (float, 1e-9, 0.5),
    "seed": (int, 0, None),
    "data.num_proc": (int, 1, None),
    "data.valid_documents": (int, 1, None),
    "data.shuffle_rows": (int, 1, None),
    "trainer.devices": (int, 1, None),
    "trainer.num_nodes": (int, 1, None),
    "trainer.max_steps": (int, 1, None),
    "loader.global_batch_size": (int, 1, None),
    "loader.batch_size": (int, 1, None),
    "loader.eval_batch_size": (int, 1, None),
    "loader.num_workers": (int, 0, None),
    "trainer.accumulate_grad_batches": (int, 1, None),
    "sampling.steps": (int, 1, None),
    "sampling.p_nucleus": (float, 0, 1),
    "sampling.stride_length": (int, 1, None),
    "sampling.num_strides": (int, 0, None),
    "sampling.psi.high_frac": (float, 0, 1),
    "sampling.psi.middle_frac": (float, 0, 1),
    "sampling.num_sample_batches": (int, 0, None),
    "sampling.num_sample_log": (int, 0, None),
    "training.ema": (float, 0, 1),
    "training.sampling_eps": (float, 1e-9, 0.5),
    "callbacks.checkpoint_every_n_steps.every_n_train_steps": (int, 0, None),
    "callbacks.checkpoint_every_n_steps.save_top_k": (int, -1, None),
    "eval.ngram_order": (int, 0, 62),
    "eval.perplexity_batch_size": (int, 1, None),
    "optim.lr": (float, 0, None),
}

# Keys that are True or False.
FLAGS = (
    "data.wrap",
    "data.streaming",
    "data.insert_train_eos",
    "data.insert_valid_eos",
    "data.keep_remainder",
    "training.antithetic_sampling",
    "training.compile",
    "training.activation_checkpointing",
    "eval.disable_ema",
    "sampling.use_float64",
    "sampling.semi_ar",
)
# Keys with a few values.
CHOICES = {
    **dict.fromkeys(FLAGS, (True, False)),
    "data.on_bad_row": ON_BAD_ROW,
    "training.nonfinite": ("stop", "skip"),
    "training.loss_compile": ("auto", True, False),
    "data.special_tokens_in_text": ("keep", "split"),
    "trainer.profiler": (None, "simple", "advanced"),
}

# By mode: the splits of the data that it reads.
SPLITS: dict[str, Callable[[DictConfig], tuple[str, ...]]] = {
    "train": lambda config: ("train", "valid"),
    "ppl_eval": lambda config: ("valid",),
    "sample_eval": lambda config: ("train",) if config.eval.ngram_order else (),
    "prepare_data": packed_splits,
}
EVALUATING = ("ppl_eval", "sample_eval", "inspect", "export")  # a checkpoint
# Keys of files that are read where the key is not null: the mode, and further advice.
FILES = {
    "sampling.prompt_file": ("sample_eval", ""),
    "algo.curriculum.integral_cache_path": (
        "train",
        " null needs none: the operator is then computed to machine precision.",
    ),
}


def check(config: DictConfig) -> None:
    """Refuses what no run of this mode can do, in a fraction of a second.

    Args:
        config: The composed config; values that need this machine may be missing.

    Raises:
        ConfigError: With the key, the value and the cure.
    """
    refuse_older_keys(config)
    refuse_unread(config)
    require(
        config.sampling.predictor,
        SAMPLERS.keys() | ALIASES.keys(),
        "sampling.predictor",
    )
    validate_backbone(config)
    check_values(config)
    check_inert_keys(config)
    splits = SPLITS.get(config.mode)
    if splits is not None:
        check_tokenizer(config)
        check_splits(config, splits(config))
    check_files(config)


def check_files(config: DictConfig) -> None:
    """Refuses paths that lead to nothing."""
    if config.mode in EVALUATING:
        check_checkpoint_path(config.eval.checkpoint_path, "eval.checkpoint_path")
    if config.mode == "train" and config.training.finetune_path:
        path = config.training.finetune_path
        check_checkpoint_path(path, "training.finetune_path")
    if config.mode == "sample_eval" and config.eval.mauve_references is not None:
        find_files(config.eval.mauve_references, "eval.mauve_references")
    for key, (mode, advice) in FILES.items():
        path = OmegaConf.select(config, key)
        if config.mode == mode and path is not None and not path_exists(str(path)):
            raise ConfigError(f"{key}={path!r}: there is no such file.{advice}")


def check_values(config: DictConfig) -> None:
    """Refuses values of the wrong kind, key by key."""
    check_numbers(config)
    for key, choices in CHOICES.items():
        if _is_there(config, key):
            require(OmegaConf.select(config, key), choices, key)
    check_loss_chunk(config)
    check_measures(config)


def check_measures(config: DictConfig) -> None:
    """Refuses an evaluation of nothing."""
    limit = config.trainer.limit_val_batches
    if config.mode == "ppl_eval" and limit is not None and not limit:
        raise ConfigError(
            f"trainer.limit_val_batches={limit!r}: mode=ppl_eval would measure "
            "nothing; leave it out, or give a number of batches."
        )


def check_numbers(config: DictConfig) -> None:
    """Refuses values that are no number, or out of range."""
    for key, (kind, low, high) in NUMBERS.items():
        value: Any = OmegaConf.select(config, key) if _is_there(config, key) else None
        is_number = type(value) is int or (kind is float and type(value) is float)
        in_range = is_number and value >= low and (high is None or value <= high)
        if value is not None and not in_range:
            name = "whole number" if kind is int else "number"
            upper = "" if high is None else f" and at most {high}"
            raise ConfigError(
                f"{key}={value!r} is not a {name} of at least {low}{upper}."
            )


def _is_there(config: DictConfig, key: str) -> bool:
    """Whether a key has a value already, not one that is made of others."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(config, group) if group else config
    names = [] if node is None else list(node.keys())  # `in node` resolves values
    return name in names and not OmegaConf.is_interpolation(node, name)


def check_loss_chunk(config: DictConfig) -> None:
    """Refuses a number of tokens that is none."""
    chunk = config.training.loss_chunk
    if chunk not in (None, "auto") and not (type(chunk) is int and chunk >= 1):
        raise ConfigError(
            f"training.loss_chunk={chunk!r} is not auto, null or a whole number of "
            "at least 1."
        )


def check_inert_keys(config: DictConfig) -> None:
    """Refuses keys that would change nothing."""
    for key, value in INERT_KEYS.items():
        given = OmegaConf.select(config, key, default=value)
        if given != value:
            raise ConfigError(
                f"{key}={given!r} is not implemented; the only value is {value!r}."
            )
