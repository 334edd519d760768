"""What kind of value each key takes: a number in its range, one of a few words, text.

Every key of the config has its line here, or a class that is built from it checks it.
"""

import re
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cli.known_keys import nodes
from data.readers import ON_BAD_ROW
from models.registry import SCANS
from utils import ConfigError, require

WIDE = 2**20  # more than any network is wide or deep
MANY = 2**40  # more than is ever counted

# Keys whose value must be a number: (type, smallest, largest).
NUMBERS: dict[str, tuple[type, float, float]] = {
    "model.length": (int, 3, 2**30),
    "model.hidden_size": (int, 1, WIDE),
    "model.cond_dim": (int, 1, WIDE),
    "model.n_blocks": (int, 1, WIDE),
    "model.n_heads": (int, 1, WIDE),
    "model.dropout": (float, 0, 1),
    "model.ch": (int, 4, WIDE),
    "model.num_res_blocks": (int, 1, 64),
    "model.num_scales": (int, 1, 16),
    "model.scale_count_to_put_attn": (int, -1, 64),
    "model.time_embed_dim": (int, 4, WIDE),
    "model.time_scale_factor": (float, 0, 1e6),
    "model.size": (int, 1, 2**28),
    "algo.T": (int, 0, MANY),
    "algo.curriculum.gumbel_tau_log10_start": (float, -10, 3),
    "algo.curriculum.gumbel_tau_log10_end": (float, -10, 3),
    "algo.curriculum.start": (int, -1, MANY),
    "algo.curriculum.end": (int, -1, MANY),
    "algo.curriculum.top_k": (int, -1, MANY),
    "algo.curriculum.n_series_terms": (int, 1, 10_000),
    "algo.update_teacher_every": (int, 1, MANY),
    "algo.num_distill_steps": (int, 1, 2**16),
    "algo.orig_num_sampling_steps": (int, 1, MANY),
    "algo.min_num_sampling_steps": (int, 1, MANY),
    "algo.grow_dt_every": (int, 1, MANY),
    "algo.linear_growth_min": (float, 0, 1),
    "algo.linear_growth_max": (float, 0, 1),
    "algo.r_init": (float, 0, 1),
    "algo.jeffreys_beta": (float, -1000, 1000),
    "algo.ratio_min": (float, 0, 1),
    "algo.ratio_max": (float, 0, 1),
    "algo.teacher_temp": (float, 1e-3, 1000),
    "algo.aux_temp": (float, 1e-3, 1000),
    "algo.gen_temp": (float, 1e-3, 1000),
    "algo.true_cfg": (float, -1000, 1000),
    "algo.aux_lr": (float, 0, 1e6),
    "algo.aux_rounds": (int, 1, MANY),
    "algo.aux_label_smoothing": (float, 0, 1 - 1e-9),
    "algo.aux_soft_weight": (float, 0, 1),
    "noise.eps": (float, 1e-9, 0.5),
    "noise.sigma_min": (float, 1e-9, 1),
    "noise.sigma_max": (float, 0.1, 80),
    "seed": (int, 0, 2**32 - 1),
    "data.num_proc": (int, 1, WIDE),
    "data.valid_documents": (int, 1, MANY),
    "data.shuffle_rows": (int, 1, MANY),
    "data.vocab_size": (int, 2, 2**31 - 1),
    "data.num_classes": (int, 1, WIDE),
    "data.size": (int, 1, 2**28),
    "data.length": (int, 3, 2**30),
    "data.num_train": (int, 0, MANY),
    "data.num_valid": (int, 0, MANY),
    "data.valid_fraction": (float, 0, 1),
    "trainer.devices": (int, 1, WIDE),
    "trainer.num_nodes": (int, 1, WIDE),
    "strategy.timeout.minutes": (float, 0.01, MANY),
    "trainer.max_steps": (int, 1, MANY),
    "trainer.accumulate_grad_batches": (int, 1, MANY),
    "trainer.gradient_clip_val": (float, 0, 1e12),
    "trainer.num_sanity_val_steps": (int, -1, MANY),
    "trainer.log_every_n_steps": (int, 0, MANY),
    "trainer.check_val_every_n_epoch": (int, 1, MANY),
    # Of Lightning's; no file has them, and + adds them.
    "trainer.max_epochs": (int, -1, MANY),
    "trainer.min_epochs": (int, 0, MANY),
    "trainer.min_steps": (int, 0, MANY),
    "trainer.reload_dataloaders_every_n_epochs": (int, 0, MANY),
    "loader.global_batch_size": (int, 1, MANY),
    "loader.eval_global_batch_size": (int, 1, MANY),
    "loader.batch_size": (int, 1, MANY),
    "loader.eval_batch_size": (int, 1, MANY),
    "loader.num_workers": (int, 0, 4096),
    "sampling.steps": (int, 1, MANY),
    "sampling.temperature": (float, 0, 100),
    "sampling.p_nucleus": (float, 0, 1),
    "sampling.order_noise": (float, 0, 1e6),
    "sampling.gamma": (float, 0, 1e9),
    "sampling.corrector_steps": (int, 1, MANY),
    "sampling.corrector_parallel": (int, 1, MANY),
    "sampling.corrector_temperature": (float, 0, 1e6),
    "sampling.corrector_t_min": (float, 0, 1),
    "sampling.corrector_t_max": (float, 0, 1),
    "sampling.guid_weight": (float, 0, 1000),
    "sampling.refine_steps": (int, 0, MANY),
    "sampling.refine_ratio": (float, 1e-9, 1),
    "sampling.stride_length": (int, 1, MANY),
    "sampling.num_strides": (int, 0, MANY),
    "sampling.num_blocks": (int, 1, MANY),
    "sampling.psi.high_frac": (float, 0, 1),
    "sampling.psi.middle_frac": (float, 0, 1),
    "sampling.num_sample_batches": (int, 0, MANY),
    "sampling.num_sample_log": (int, 0, MANY),
    "training.ema": (float, 0, 1),
    "training.sampling_eps": (float, 1e-9, 0.5),
    "training.class_dropout_p": (float, 0, 1),
    "training.flops": (float, 1e-15, 1e12),
    "callbacks.checkpoint_every_n_steps.every_n_train_steps": (int, 0, MANY),
    "callbacks.checkpoint_every_n_steps.save_top_k": (int, -1, MANY),
    "callbacks.checkpoint_monitor.save_top_k": (int, -1, MANY),
    "callbacks.grad_record.num_grads_log": (int, 0, MANY),
    "eval.fid_num_images": (int, 2, MANY),
    "eval.ngram_order": (int, 0, 62),
    "report.entropy": (float, 0, 100),
    "eval.likelihood_block": (int, 1, MANY),
    "eval.perplexity_batch_size": (int, 1, MANY),
    "optim.lr": (float, 0, 1e6),
    "optim.weight_decay": (float, 0, 1e6),
    "optim.beta1": (float, 0, 1 - 1e-12),
    "optim.beta2": (float, 0, 1 - 1e-12),
    "optim.eps": (float, 1e-30, 1e6),  # 0 divides by 0
    "lr_scheduler.num_warmup_steps": (int, 0, MANY),
    "lr_scheduler.t_initial": (float, 0, MANY),
    "lr_scheduler.warmup_t": (float, 0, MANY),
    "lr_scheduler.warmup_lr_init": (float, 0, 1e6),
    "lr_scheduler.lr_min": (float, 0, 1e6),
    "lr_scheduler.lr_lambda.warmup_steps": (int, 0, MANY),
    "lr_scheduler.lr_lambda.n_halve_steps": (int, 1, MANY),
}
# Numbers that may be null, which has a meaning of its own.
NULLABLE = (
    *("trainer.gradient_clip_val", "trainer.check_val_every_n_epoch"),
    *("trainer.max_epochs", "trainer.min_epochs", "trainer.min_steps"),
    "data.num_classes",
    *("eval.fid_num_images", "report.entropy"),
    *("sampling.guid_weight", "sampling.num_blocks", "training.flops"),
)

# Keys that are a whole number of batches or updates, or a part up to 1: the smallest.
PARTS = {
    "trainer.limit_train_batches": 0,
    "trainer.limit_val_batches": 0,
    "trainer.limit_test_batches": 0,
    "trainer.limit_predict_batches": 0,
    "trainer.val_check_interval": 1,
}

# Keys that are True or False.
FLAGS = (
    "algo.causal_attention",
    "algo.freeze_embeddings",
    "algo.ignore_bos",
    "algo.linear_growth_dt",
    "algo.reset_optimizer_on_growth",
    "algo.reuse_student_batch",
    "algo.start_from_ema",
    "algo.subs_masking",
    "algo.teacher_ema",
    "algo.time_conditioning",
    "algo.use_ema_on_growth",
    "callbacks.checkpoint_every_n_steps.save_last",
    "checkpointing.resume_from_ckpt",
    "data.flip",
    "data.insert_train_eos",
    "data.insert_valid_eos",
    "data.keep_remainder",
    "data.streaming",
    "data.wrap",
    "eval.compute_generative_perplexity",
    "eval.compute_perplexity_on_sanity",
    "eval.disable_ema",
    "eval.generate_samples",
    *("eval.held_out", "eval.unigram_baseline"),
    "loader.pin_memory",
    "lr_scheduler.t_in_epochs",
    "lr_scheduler.warmup_prefix",
    "model.fix_logistic",
    "model.skip_rescale",
    "print_config",
    *("sampling.block_cache", "sampling.semi_ar", "sampling.stop_at_eos"),
    "sampling.use_float64",
    *("strategy.find_unused_parameters", "strategy.reshard_after_forward"),
    "training.activation_checkpointing",
    "training.antithetic_sampling",
    "training.change_of_variables",
    "training.compile",
    "training.importance_sampling",
)
# The same of Lightning's, which may be null or are not there.
FLAGS_OF_TRAINER = (
    *("benchmark", "detect_anomaly", "enable_autolog_hparams", "enable_checkpointing"),
    *("enable_model_summary", "enable_progress_bar", "inference_mode"),
    "sync_batchnorm",
)
PRECISIONS = ("32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed", "bf16-true")
# Keys with a few values.
CHOICES: dict[str, Collection[Any]] = {
    **dict.fromkeys(FLAGS, (True, False)),
    **{f"trainer.{name}": (True, False, None) for name in FLAGS_OF_TRAINER},
    "trainer.barebones": (False,),  # it takes the log away
    "trainer.deterministic": (True, False, "warn", None),
    "trainer.fast_dev_run": (False,),  # it takes checkpoints and the log away
    "trainer.gradient_clip_algorithm": ("norm", "value", None),
    "data.on_bad_row": ON_BAD_ROW,
    "eval.likelihood": ("nelbo", "chain_rule"),
    "eval.likelihood_order": ("random", "left_to_right"),
    "training.loss_compile": ("auto", True, False),
    "data.special_tokens_in_text": ("keep", "split"),
    "model.attention": ("auto", "flash", "sdpa"),
    "model.scan": SCANS,
    # True and False are of MDLM's configs.
    "sampling.noise_removal": ("ancestral", "greedy", "none", True, False),
    "trainer.precision": (*PRECISIONS, 32, 16),
    "trainer.profiler": (None, "simple", "advanced"),
}

# Keys that are text, which what reads them may limit further.
TEXTS = (
    *("algo._target_", "algo.backbone", "algo.compat", "algo.curriculum.mode"),
    *("algo.distill_mode", "algo.loss_type", "algo.name", "algo.parameterization"),
    *("algo.sampling_mode", "algo.teacher_time_grid", "algo.divergence"),
    *("algo.init_tokens", "algo.mask_ratio_mode", "algo.aux_mask_ratio_mode"),
    *("algo.loss_reduction", "algo.r_init_mode", "algo.noise_emb_perturb"),
    *("callbacks.checkpoint_every_n_steps.dirpath", "checkpointing.save_dir"),
    *("callbacks.checkpoint_monitor.dirpath", "callbacks.checkpoint_monitor.filename"),
    *("callbacks.checkpoint_monitor.monitor", "checkpointing.resume_ckpt_path"),
    *("data.cache_dir", "data.modality", "data.tokenizer_name_or_path"),
    *("data.train", "data.valid", "eval.generated_samples_path", "eval.results_path"),
    *("logger.csv.name", "logger.csv.save_dir", "logger.tensorboard.name"),
    *("logger.tensorboard.save_dir", "lr_scheduler._target_", "mode"),
    *("model.name", "model.type", "noise.type", "prior.type", "report.path"),
    "view.out",
    *("sampling.corrector_select", "sampling.order"),
    *("sampling.predictor", "sampling.psi.high_mode", "sampling.psi.low_mode"),
    *("sampling.psi.middle_mode", "sampling.psi.time_profile", "strategy._target_"),
    *("trainer._target_", "trainer.accelerator", "training.loss_precision"),
)
TEXTS_OR_NULL = (
    *("algo.curriculum.cache_dir", "algo.curriculum.integral_cache_path"),
    *("data.bos_token", "data.detokenizer", "data.text_column"),
    *("eval.checkpoint_path", "eval.gen_ppl_eval_model_name_or_path"),
    "eval.fid_features",
    *("eval.mauve_references", "export.path", "export.push_to_hub", "report.table"),
    *("sampling.prompt", "sampling.infill", "sampling.prompt_file"),
    *("sampling.corrector", "sampling.refine_path", "sampling.save_trajectory"),
    "training.finetune_path",
)
# A text or a list of them.
SEVERAL = (
    *("checkpointing.trusted_classes", "plugins", "report.data", "report.overrides"),
    *("eval.differing", "report.runs", "view.paths"),
)
SEVERAL_OR_NULL = ("data.path", "data.source", "data.valid_path", "data.valid_source")


# Groups of which one file has to be chosen.
REQUIRED = ("algo", "data", "model", "noise", "strategy", "lr_scheduler")


def check_kinds(config: DictConfig) -> None:
    """Refuses single values in the place of nodes, and what is no text where it has to
    be; numbers and words are checked by `check_values`."""
    for key in nodes():
        group, _, name = key.rpartition(".")
        node: Any = OmegaConf.select(config, group) if group else config
        if key in REQUIRED and name not in node:
            raise ConfigError(f"{key} is empty: choose one of configs/{key}/.")
        is_there = isinstance(node, DictConfig) and name in node
        if is_there and not isinstance(node[name], DictConfig):
            raise ConfigError(
                f"{key}={node[name]!r} is in the place of a group of keys; set "
                f"{key}.KEY=VALUE."
            )
    for key in (*TEXTS, *TEXTS_OR_NULL):
        if _is_there(config, key):
            _check_text(key, OmegaConf.select(config, key), key in TEXTS_OR_NULL)
    for key in (*SEVERAL, *SEVERAL_OR_NULL):
        if _is_there(config, key):
            value = OmegaConf.select(config, key)
            for one in value if isinstance(value, ListConfig) else (value,):
                _check_text(key, one, key in SEVERAL_OR_NULL)


def _check_text(key: str, value: Any, or_null: bool) -> None:
    if isinstance(value, str) or (or_null and value is None):
        return
    cure = "give another value" if value is None else f"quote it, as in {key}='\"...\"'"
    raise ConfigError(f"{key}={value!r} is no text; {cure}.")


def check_values(config: DictConfig) -> None:
    """Refuses values of the wrong kind, key by key."""
    check_numbers(config)
    check_parts(config)
    for key, choices in CHOICES.items():
        if _is_there(config, key):
            require(OmegaConf.select(config, key), choices, key)
    check_loss_chunk(config)
    check_labels(config)
    check_time(config)
    check_blocks(config)
    check_time_range(config)


def check_blocks(config: DictConfig) -> None:
    """Refuses sizes of blocks that are none, or do not divide a row."""
    given = config.algo.get("block_size")
    if given is None:
        return
    sizes = list(given) if isinstance(given, ListConfig) else [given]
    are_sizes = all(type(x) is int and x >= 1 for x in sizes)
    if not sizes or not are_sizes or len(set(sizes)) < len(sizes):
        raise ConfigError(
            f"algo.block_size={given!r} is not null, a whole number of at least 1, or "
            "several different ones in brackets, as in [4,8,16]."
        )
    if _is_there(config, "model.length"):
        for size in sizes:
            if config.model.length % size:
                raise ConfigError(
                    f"algo.block_size={size} does not divide model.length="
                    f"{config.model.length}: a row is a whole number of blocks."
                )
    if OmegaConf.select(config, "model.attention") == "flash":
        raise ConfigError(
            "model.attention='flash' has no mask for blocks, which algo.block_size="
            f"{given} needs; choose auto or sdpa."
        )


def check_time_range(config: DictConfig) -> None:
    """Refuses ranges of times that are none."""
    given = config.training.get("time_range")
    if given is None:
        return
    ends = list(given) if isinstance(given, ListConfig) else []
    are_numbers = len(ends) == 2 and all(type(x) in (int, float) for x in ends)
    if not are_numbers or not 0 <= ends[0] < ends[1] <= 1:
        raise ConfigError(
            f"training.time_range={given!r} is not null or two times: give [lo,hi], "
            "with 0 <= lo < hi <= 1."
        )
    for key in ("importance_sampling", "change_of_variables"):
        if config.training.get(key):
            raise ConfigError(
                f"training.time_range={given} and training.{key}=True both say how "
                "times are drawn; choose one of them."
            )
    eps = config.training.sampling_eps
    if ends[1] <= eps:
        raise ConfigError(
            f"training.time_range={given} ends at or below training.sampling_eps="
            f"{eps}, below which there are no times; give a later end."
        )


def check_time(config: DictConfig) -> None:
    """Refuses a time limit that is none."""
    limit = OmegaConf.select(config, "trainer.max_time")
    is_text = isinstance(limit, str) and _TIME.fullmatch(limit) is not None
    if limit is not None and not is_text and not isinstance(limit, DictConfig):
        raise ConfigError(
            f"trainer.max_time={limit!r} is no time: write days, hours, minutes and "
            "seconds, +trainer.max_time=00:12:00:00 for 12 hours."
        )


_TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")


def check_numbers(config: DictConfig) -> None:
    """Refuses values that are no number, or out of range."""
    for key, (kind, low, high) in NUMBERS.items():
        if not _is_there(config, key):
            continue
        value: Any = OmegaConf.select(config, key)
        is_number = type(value) is int or (kind is float and type(value) is float)
        is_null = value is None and key in NULLABLE
        if not is_null and not (is_number and low <= value <= high):
            name = "whole number" if kind is int else "number"
            is_whole = type(value) is float and value.is_integer() and kind is int
            cure = f" Write {int(value)}." if is_whole and low <= value <= high else ""
            raise ConfigError(
                f"{key}={value!r} is not a {name} of at least {low} and at most "
                f"{high}.{cure}"
            )


def check_parts(config: DictConfig) -> None:
    """Refuses what is no number of batches and no part of an epoch, and a part of an
    epoch where updates are counted."""
    for key, low in PARTS.items():
        if not _is_there(config, key):
            continue
        value = OmegaConf.select(config, key)
        is_count = type(value) is int and low <= value <= MANY
        is_part = type(value) is float and low / 1e9 <= value <= 1
        if not is_count and not is_part:
            never = " trainer.limit_val_batches=0 validates never." if low else ""
            raise ConfigError(
                f"{key}={value!r} is not a whole number of at least {low}, nor a part "
                f"of at most 1.0.{never}"
            )
    trainer = config.trainer
    every, epochs = trainer.val_check_interval, trainer.get("check_val_every_n_epoch")
    if epochs is None and type(every) is float:
        raise ConfigError(
            f"trainer.val_check_interval={every} is a part of an epoch: give "
            "trainer.check_val_every_n_epoch=1 with it, or a whole number of updates."
        )


def _is_there(config: DictConfig, key: str) -> bool:
    """Whether a key has a value already, not one that is made of others."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(config, group) if group else config
    if not isinstance(node, DictConfig):
        return False
    names = list(node.keys())  # `in node` resolves values
    is_made = name in names and OmegaConf.is_interpolation(node, name)
    return name in names and not is_made and not OmegaConf.is_missing(node, name)


def check_loss_chunk(config: DictConfig) -> None:
    """Refuses a number of tokens that is none."""
    chunk = config.training.loss_chunk
    if chunk not in (None, "auto") and not (type(chunk) is int and chunk >= 1):
        raise ConfigError(
            f"training.loss_chunk={chunk!r} is not auto, null or a whole number of "
            "at least 1."
        )


def check_labels(config: DictConfig) -> None:
    """Refuses classes of samples that are none, or that would change nothing."""
    labels, weight = config.sampling.labels, config.sampling.guid_weight
    if labels is None:
        return
    num_classes = OmegaConf.select(config, "data.num_classes")
    is_list = isinstance(labels, ListConfig) and len(labels) > 0
    if labels != "data" and not is_list:
        raise ConfigError(
            f"sampling.labels={labels!r} is not null, data, or a list of classes."
        )
    if num_classes is None or not weight:
        raise ConfigError(
            f"sampling.labels={labels!r} has no effect with data.num_classes="
            f"{num_classes} and sampling.guid_weight={weight}: samples are drawn from "
            "classes by a model that has some, with a weight such as 1."
        )
    for label in labels if is_list else ():
        if type(label) is not int or not 0 <= label < num_classes:
            raise ConfigError(
                f"sampling.labels={list(labels)}: {label!r} is no class of "
                f"data.num_classes={num_classes}; they are 0 to {num_classes - 1}."
            )
