"""What is of text alone and has no meaning in a run on images, data.modality=image; and
what the U-Net, which is of images alone, cannot do.
"""

from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from utils import ConfigError


class TextOnly(NamedTuple):
    """A key that has a meaning for text alone."""

    value: Any  # the only one for images
    reason: str


NO_BOS = "images have no bos"
NO_TEXT = "samples are images, which no language model reads"
WHOLE = "an image is a row, whole, without tokens around it"
TEXT_ONLY = {
    "algo.causal_attention": TextOnly(
        False,
        "algo=ar begins every row with a bos, which images do not have; choose an "
        "algorithm of diffusion",
    ),
    "algo.ignore_bos": TextOnly(False, NO_BOS),
    "data.bos_token": TextOnly(None, NO_BOS),
    "data.wrap": TextOnly(False, WHOLE),
    "data.insert_train_eos": TextOnly(False, WHOLE),
    "data.insert_valid_eos": TextOnly(False, WHOLE),
    "data.keep_remainder": TextOnly(False, WHOLE),
    "data.streaming": TextOnly(False, "images are read once, into data.cache_dir"),
    "data.detokenizer": TextOnly(None, "there is no text to clean"),
    "data.special_tokens_in_text": TextOnly("keep", "pixels have no special tokens"),
    "data.on_bad_row": TextOnly("stop", "an image that cannot be read ends the run"),
    "eval.compute_generative_perplexity": TextOnly(False, NO_TEXT),
    "eval.mauve_references": TextOnly(None, NO_TEXT),
    "eval.ngram_order": TextOnly(0, "neighbouring values of a row are no n-grams"),
    "eval.held_out": TextOnly(False, NO_TEXT),
    "sampling.prompt": TextOnly(None, "a text cannot be a part of an image"),
    "sampling.prompt_file": TextOnly(None, "a text cannot be a part of an image"),
    "sampling.infill": TextOnly(None, "a text cannot be a part of an image"),
    "sampling.semi_ar": TextOnly(False, "an image cannot go on beyond its last pixel"),
    "sampling.num_blocks": TextOnly(None, "an image has as many as it has pixels for"),
    "sampling.stop_at_eos": TextOnly(False, "an image ends with its last pixel"),
}
NO_DISTILLATION = "distillations are of transformers; choose algo.backbone=dit"
# Values with which algo.backbone=unet has no meaning, and why.
NOT_OF_UNET = {
    "mode=export": "a folder holds a transformer; mode=sample_eval and mode=fid_eval "
    "take the checkpoint itself",
    "algo.name=distillation": NO_DISTILLATION,
    "algo.name=sdtt": NO_DISTILLATION,
    "algo.name=dimo": NO_DISTILLATION,
}


def check_removal(config: DictConfig, has_mask: bool) -> None:
    """Refuses images with masks in them, which have no colour.

    Args:
        config: The run's config.
        has_mask: Whether the algorithm's noise is a mask.
    """
    removal = OmegaConf.select(config, "sampling.noise_removal")
    if is_image(config) and has_mask and removal in ("none", False):
        raise ConfigError(
            f"sampling.noise_removal={removal!r} would leave masks in images of algo="
            f"{config.algo.name}, and a mask has no colour; give ancestral or greedy."
        )


def is_image(config: DictConfig) -> bool:
    return OmegaConf.select(config, "data.modality") == "image"


def check_modality_keys(config: DictConfig) -> None:
    """Refuses, in a run on images, what only text has.

    Raises:
        ConfigError: With the key, the reason, and the value that images have.
    """
    if not is_image(config):
        return
    for key, only in TEXT_ONLY.items():
        value = OmegaConf.select(config, key, default=only.value)
        if value != only.value:
            shown = "null" if only.value is None else only.value
            raise ConfigError(
                f"{key}={value!r} is for text, not for data.modality=image: "
                f"{only.reason}; for images the only value is {shown}."
            )


def check_unet_use(config: DictConfig) -> None:
    """Refuses the U-Net where there are no images, or no use of it.

    Raises:
        ConfigError: With the key that has to be another one.
    """
    if config.algo.backbone != "unet":
        return
    if not is_image(config):
        raise ConfigError(
            f"algo.backbone=unet is for images, and data.modality="
            f"{config.data.modality!r} (data.train={config.data.train!r}); choose "
            "data=cifar10 or data=images, or algo.backbone=dit with model=small."
        )
    for setting, reason in NOT_OF_UNET.items():
        key, _, value = setting.partition("=")
        if OmegaConf.select(config, key) == value:
            shown = setting.replace("algo.name", "algo")
            raise ConfigError(f"{shown} is not for algo.backbone=unet: {reason}.")
