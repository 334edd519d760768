"""What can be refused about a config before anything heavy is imported, whatever the
algorithm: unknown keys and names, numbers out of range, keys without effect, files that
are not there.
"""

import importlib.util
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from checkpoints.locating import check_checkpoint_path
from cli.known_keys import INERT_KEYS, refuse_unread
from cli.modality import check_modality_keys, check_unet_use
from cli.older_keys import refuse_older_keys
from cli.values import check_kinds, check_values
from data.files import find_files
from data.registry import check_splits, packed_splits
from data.tokenizers import check_tokenizer
from models.registry import validate_backbone
from report.page_paths import check_page_path
from sampling.registry import ALIASES, CORRECTORS, SAMPLERS, check_guidance
from utils import ConfigError, path_exists, require

# By mode: the splits of the data that it reads.
SPLITS: dict[str, Callable[[DictConfig], tuple[str, ...]]] = {
    "train": lambda config: ("train", "valid"),
    "ppl_eval": lambda config: ("valid",),
    "sample_eval": lambda config: (
        *("train",) * (config.eval.ngram_order > 0 or config.sampling.labels == "data"),
        *("valid",) * config.eval.held_out,
    ),
    "fid_eval": lambda config: ("train",),
    "prepare_data": packed_splits,
}
# Modes that read a checkpoint.
EVALUATING = ("ppl_eval", "sample_eval", "fid_eval", "inspect", "export")
# Keys of files that are read where the key is not null: the mode, and further advice.
FILES = {
    "sampling.prompt_file": ("sample_eval", ""),
    "eval.fid_features": ("fid_eval", ""),
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
    refuse_unread(config)
    check_measures(config)
    check_kinds(config)
    refuse_older_keys(config)
    require(
        config.sampling.predictor,
        SAMPLERS.keys() | ALIASES.keys(),
        "sampling.predictor",
    )
    if config.sampling.corrector is not None:
        require(config.sampling.corrector, CORRECTORS, "sampling.corrector")
    check_values(config)
    check_likelihood(config)
    check_guidance(config)
    check_unet_use(config)
    validate_backbone(config)
    check_inert_keys(config)
    check_loggers(config)
    check_modality_keys(config)
    if config.mode == "fid_eval":
        check_images(config)
    splits = SPLITS.get(config.mode)
    if splits is not None:
        check_tokenizer(config)
        check_splits(config, splits(config))
    check_files(config)
    check_trajectory(config)


def check_trajectory(config: DictConfig) -> None:
    """Refuses a page of samples where none are drawn, and at a place that is taken."""
    path, key = config.sampling.save_trajectory, "sampling.save_trajectory"
    if path is None:
        return
    if config.mode != "sample_eval":
        raise ConfigError(
            f"{key}={path!r} is for mode=sample_eval, not mode={config.mode}."
        )
    check_page_path(path, key)


def refuse_two_lengths(config: DictConfig, words: Sequence[str]) -> None:
    """Refuses a command that says how long to train in two ways.

    Args:
        config: Composed of the words.
        words: KEY=VALUE each. A recipe may have both; its FLOP hold.
    """
    flops, steps = config.training.flops, "trainer.max_steps"
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    if config.mode == "train" and flops is not None and steps in keys:
        raise ConfigError(
            f"{steps}={config.trainer.max_steps} contradicts training.flops={flops}, "
            f"which sets it: leave out one of them (training.flops=null for {steps})."
        )


def check_loggers(config: DictConfig) -> None:
    """Refuses loggers whose package is not installed."""
    names = OmegaConf.select(config, "logger")
    is_asked = isinstance(names, DictConfig) and "tensorboard" in names
    packages = ("tensorboard", "tensorboardX")  # Lightning takes either
    if is_asked and not any(map(importlib.util.find_spec, packages)):
        raise ConfigError(
            "logger=tensorboard: the package tensorboard is not installed; run pip "
            "install tensorboard, or use logger=csv."
        )


def check_images(config: DictConfig) -> None:
    """Refuses to compare what is no image, or with no features."""
    modality = config.data.modality
    if modality != "image":
        raise ConfigError(
            f"data.modality={modality!r}: mode=fid_eval compares images; choose "
            "data=cifar10 or data=images, or mode=sample_eval for text."
        )
    if config.eval.fid_features is None:
        raise ConfigError(NO_FEATURES)
    path = config.eval.results_path
    if path == config.eval.generated_samples_path:
        raise ConfigError(
            f"eval.results_path={path!r} is eval.generated_samples_path, too: one is a "
            "JSON file, the other an npz of images; give two paths."
        )


NO_FEATURES = (
    "eval.fid_features is empty: mode=fid_eval compares the features of a network, and "
    "downloads none. Give eval.fid_features=PATH of the standard weights, which are "
    "pt_inception-2015-12-05-6726825d.pth of "
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights, or of a "
    "TorchScript file."
)


# Keys of other modes that only somebody gives who has forgotten mode=; the modes.
FORGOTTEN = {
    "eval.checkpoint_path": "ppl_eval, sample_eval, inspect or export",
    "export.path": "export",
    "export.push_to_hub": "export",
    "report.table": "report",
    "eval.fid_features": "fid_eval",
    "eval.mauve_references": "sample_eval",
    "sampling.save_trajectory": "sample_eval",
    "view.paths": "view",
    "sampling.prompt": "sample_eval",
    "sampling.prompt_file": "sample_eval",
    "sampling.infill": "sample_eval",
}


def check_mode(config: DictConfig) -> None:
    """Refuses to train where another mode was meant."""
    if config.mode != "train" or config.algo.backbone == "hf_dit":
        return
    for key, modes in FORGOTTEN.items():
        value = OmegaConf.select(config, key)
        if value:
            raise ConfigError(
                f"{key}={value!r} changes nothing with mode=train, the default: add "
                f"mode={modes.replace(', ', ', mode=').replace(' or ', ' or mode=')}."
            )


def check_files(config: DictConfig) -> None:
    """Refuses paths that lead to nothing."""
    check_mode(config)
    if config.mode in EVALUATING:
        check_checkpoint_path(config.eval.checkpoint_path, "eval.checkpoint_path")
    if config.mode == "train" and config.training.finetune_path:
        path = config.training.finetune_path
        check_checkpoint_path(path, "training.finetune_path")
    if config.sampling.refine_path:
        check_checkpoint_path(config.sampling.refine_path, "sampling.refine_path")
    if config.mode == "sample_eval" and config.eval.mauve_references is not None:
        find_files(config.eval.mauve_references, "eval.mauve_references")
    for key, (mode, advice) in FILES.items():
        path = OmegaConf.select(config, key)
        if config.mode == mode and path is not None and not path_exists(str(path)):
            raise ConfigError(f"{key}={path!r}: there is no such file.{advice}")


def check_measures(config: DictConfig) -> None:
    """Refuses an evaluation of nothing."""
    limit = OmegaConf.select(config, "trainer.limit_val_batches", default=1.0)
    if config.mode == "ppl_eval" and not limit:
        raise ConfigError(
            f"trainer.limit_val_batches={limit!r}: mode=ppl_eval would measure "
            "nothing; leave it out, or give a number of batches."
        )


def check_likelihood(config: DictConfig) -> None:
    """Refuses the chain rule in other modes, and its keys without it."""
    of_eval = config.eval
    if of_eval.likelihood == "chain_rule":
        if config.mode != "ppl_eval":
            raise ConfigError(
                "eval.likelihood='chain_rule' is for mode=ppl_eval, not "
                f"mode={config.mode}; the only value is nelbo."
            )
        return
    for key, value in (("likelihood_order", "random"), ("likelihood_block", 1)):
        if of_eval[key] != value:
            raise ConfigError(
                f"eval.{key}={of_eval[key]!r} is for eval.likelihood=chain_rule; with "
                f"eval.likelihood={of_eval.likelihood} the only value is {value}."
            )


def check_inert_keys(config: DictConfig) -> None:
    """Refuses keys that would change nothing."""
    for key, value in INERT_KEYS.items():
        given = OmegaConf.select(config, key, default=value)
        if given != value:
            raise ConfigError(
                f"{key}={given!r} is not implemented; the only value is {value!r}."
            )
