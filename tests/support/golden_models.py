"""Builds our models from the settings and the weights of golden cases."""

import functools
import math
import re
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from golden_cases import ROOT, Case
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cli.older_keys import OLDER_KEYS
from cli.settle import algorithm_class
from sampling.registry import SAMPLERS
from trainer_base import TrainerBase
from utils import register_resolvers


class StubTokenizer:
    """What a model asks of a tokenizer, from the case's sizes.

    A mask at the very end is the entry that is added for a tokenizer without one.

    Args:
        vocab_size: K of the model.
        mask_index: The model's mask id; None for uniform-state models.
        bos_token_id: First token of autoregressive samples.
    """

    def __init__(
        self, vocab_size: int, mask_index: int | None, bos_token_id: int | None = None
    ) -> None:
        has_no_mask = mask_index == vocab_size - 1
        self.vocab_size = vocab_size - 1 if has_no_mask else vocab_size
        self.mask_token_id = None if has_no_mask else mask_index
        self.bos_token_id = bos_token_id

    def __len__(self) -> int:
        return self.vocab_size


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=["trainer.accelerator=cpu", *overrides])


def composed(*overrides: str) -> DictConfig:
    """Our config from the command line's `overrides`, on a CPU."""
    return deepcopy(_composed(*overrides))


CLASSES = "backbone.cond_map.embedding_table.weight"  # of networks with classes
# What `algo` says of the network, whichever algorithm uses it.
NETWORK = ("backbone", "time_conditioning", "causal_attention")


def configured(case: Case, algo: str | None = None, **settings: Any) -> DictConfig:
    """Our config with everything in it that the case's states.

    Args:
        case: Its config names algo, and may name model, noise, training and so on.
        algo: Which algorithm runs the case's network; None for the case's own. Of the
            settings of another one only those of the network hold.
        settings: Dotted keys (`__` for the dot) that come last.
    """
    theirs = case.config
    rename_older_keys(theirs)
    forget_folders(theirs)
    lr_scheduler = theirs.pop("lr_scheduler", None)
    if algo not in (None, theirs.algo.name):
        theirs.algo = {key: theirs.algo[key] for key in NETWORK if key in theirs.algo}
    config = composed(f"algo={algo or theirs.algo.name}", "model=tiny")
    OmegaConf.set_struct(config, False)  # their config may have keys that ours lacks
    of_ours = {key: config.trainer[key] for key in ("accelerator", "precision")}
    config = OmegaConf.merge(config, theirs, {"trainer": of_ours})
    config.loader.num_workers = 0
    if lr_scheduler is not None:  # as a whole: schedulers do not share their keys
        config.lr_scheduler = lr_scheduler
    if CLASSES in case.stated.get("weights/*", {}).get("entries", {}):
        config.data.num_classes = len(case[f"weights/{CLASSES}"]) - 1
    if config.sampling.predictor not in SAMPLERS:
        config.sampling.predictor = "ancestral"  # the case may not sample at all
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def rename_older_keys(theirs: DictConfig) -> None:
    """Gives the curriculum's older keys their newer names, in place; those win."""
    for older, newer in OLDER_KEYS.items():
        group, _, name = older.rpartition(".")
        value = OmegaConf.select(theirs, group, default={}).pop(name, None)
        if value is not None and OmegaConf.select(theirs, newer) is None:
            OmegaConf.update(theirs, newer, value)


def forget_folders(theirs: DictConfig) -> None:
    """Drops, in place, the folders of the machine on which a case was recorded."""
    for group in ("algo.curriculum", "data"):
        OmegaConf.select(theirs, group, default={}).pop("cache_dir", None)


def batch_sizes(case: Case, u_time: Tensor, num_rows: int) -> dict[str, int]:
    """Settings for `configured`: micro-batches of a global batch, on one device.

    Args:
        case: If its config states `loader`, that holds.
        u_time: Recorded draws for the times of the whole global batch.
        num_rows: Of a micro-batch.
    """
    if "loader" in case.config:
        return {}
    return {
        "loader__global_batch_size": len(u_time),
        "loader__batch_size": num_rows,
    }


def sizes_of(case: Case) -> tuple[int, int | None]:
    """K and mask id of the case's model."""
    if "vocab_size" in case.values:
        return case.values["vocab_size"], case.values.get("mask_index")
    return _sizes_of_training(case)


def _sizes_of_training(case: Case) -> tuple[int, int | None]:
    """The same for recorded updates, which do not state them.

    The mask is the one token that is never predicted, so the bias of its logit gets
    no gradient and changes by weight decay only.
    """
    bias = "backbone.output_layer.linear.bias"
    initial, final = case[f"initial/{bias}"], case[f"final/{bias}"]
    decay = case.config.optim.weight_decay
    kept = math.prod(1 - update["lr"] * decay for update in case.values["updates"])
    change = (final.double() - initial.double() * kept).abs()
    never_predicted = (change < 1e-7).nonzero().flatten().tolist()
    assert len(never_predicted) <= 1, f"{case}: no telling which token is the mask"
    return len(initial), never_predicted[0] if never_predicted else None


def build(case: Case, weights: str | None = "weights/", **settings: Any) -> TrainerBase:
    """The case's model, in evaluation mode.

    Args:
        case: Gives config, sizes and weights.
        weights: Prefix of the tensors to load, strictly; None leaves our own.
        settings: As for `configured`.
    """
    config = configured(case, **settings)
    sizes = sizes_of(case)
    tokenizer = StubTokenizer(*sizes, bos_token_id=case.values.get("bos_token_id"))
    model = algorithm_class(config)(config, tokenizer)
    assert (model.vocab_size, model.mask_index) == sizes
    if weights is not None:
        model.load_state_dict(case.group(weights), strict=True)
    return model.eval()


class Followed(NamedTuple):
    """A student of which one parameter was recorded over its rounds."""

    model: TrainerBase
    name: str  # of the parameter in the network
    parameter: torch.nn.Parameter
    saved: list[str]  # files that its trainer was asked for


def followed(case: Case, front: str, student: str, **settings: Any) -> Followed:
    """The student at its first step, with a stand-in for its trainer.

    Args:
        case: With the parameter at the start, {front}/initial, whose meaning names it.
        front: Where the case has it.
        student: Its algorithm.
        settings: Sections of the config, but for the network's sizes.
    """
    initial = case[f"{front}/initial"]
    meaning = case.meaning(f"{front}/initial")
    (name,) = re.search(r"parameter ([\w.]+)", meaning).groups()
    block = re.match(r"blocks\.(\d+)\.", name)
    sizes = {"n_heads": 1, "n_blocks": 1 + (int(block[1]) if block else 0)}
    sizes |= {"cond_dim": 8, "length": 4, "hidden_size": min(initial.shape)}
    config = composed(f"algo={student}", "model=tiny")
    config = OmegaConf.merge(config, settings | {"model": sizes})
    saved: list[str] = []
    with torch.random.fork_rng():
        model = algorithm_class(config)(config, StubTokenizer(7, None)).train()
    model.trainer = SimpleNamespace(
        global_step=0,
        global_rank=0,
        save_checkpoint=lambda path, weights_only: saved.append(path),
    )
    parameter = model.backbone.get_parameter(name)
    with torch.no_grad():
        parameter.copy_(initial)
    model.on_train_start()
    return Followed(model, name, parameter, saved)


def derivative_factor(config: DictConfig) -> float:
    """By what our losses differ from the reference's under this schedule.

    The derivative of the reference's cosine schedule lacks the chain-rule factor
    (1 - eps) of alpha(s), s = (1 - eps) t; ours has it, as the log-linear schedule
    of both does. Every continuous-time loss is proportional to that derivative.
    """
    return 1 - config.noise.eps if config.noise.type == "cosine" else 1.0


def inverse_of_reference(noise_type: str) -> Callable[[Tensor], Tensor]:
    """The reference's time for a signal level, which ignores eps.

    It is (1 - eps) times the time at which the schedule has that level, which is ours.
    """
    return {
        "log-linear": lambda alpha: 1 - alpha,
        "cosine": lambda alpha: 1 - 2 / math.pi * torch.acos(1 - alpha),
    }[noise_type]
