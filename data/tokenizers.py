"""Tokenizers: characters of text8, bytes, synthetic numbers, pixels, any of
`transformers`; and the vocabulary that a model makes of one.
"""

import os
import string
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from utils import ConfigError, first_line, hub_options, imported


def get_tokenizer(config: DictConfig) -> Any:
    """The tokenizer that `data.tokenizer_name_or_path` names.

    A missing eos falls back to sep, a missing bos to cls and then to eos, if
    `data.bos_token` names none; a missing pad is added. Special tokens that are
    written out in a text are tokens or text, as `data.special_tokens_in_text` says.

    Returns:
        A `transformers` tokenizer; for images a `data.pixels.PixelTokenizer`, which
        has no special tokens.

    Raises:
        ConfigError: If it cannot be loaded, has neither eos nor sep, or lacks the
            token of `data.bos_token`.
    """
    name = config.data.tokenizer_name_or_path
    if name in PIXELS:
        return imported("data.pixels.PixelTokenizer")()
    tokenizer = TOKENIZERS.get(name, _pretrained_tokenizer)(config)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r} has no eos/sep token, which ends "
            "documents and rows; choose a tokenizer that has one."
        )
    bos = config.data.get("bos_token")
    if bos is not None and bos not in tokenizer.get_vocab():
        raise ConfigError(
            f"data.bos_token={bos!r} is no token of data.tokenizer_name_or_path="
            f"{name!r}; name one of its tokens, or null for its own."
        )
    tokenizer.bos_token = bos or (
        tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    is_text = config.data.get("special_tokens_in_text") == "split"
    tokenizer.split_special_tokens = is_text
    return tokenizer


def check_tokenizer(config: DictConfig) -> None:
    """Refuses, before anything is loaded, the path of a folder that is not there.

    Raises:
        ConfigError: If the name is a path, as no hub id can be, and leads to nothing.
    """
    name = str(config.data.tokenizer_name_or_path)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not os.path.exists(name):
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r}: there is no such folder. Choose "
            f"{', '.join((*TOKENIZERS, *PIXELS))}, a local folder, or a hub id."
        )


def _pretrained_tokenizer(config: DictConfig) -> Any:
    from transformers import AutoTokenizer

    name = config.data.tokenizer_name_or_path
    try:
        options = hub_options(name) | {"trust_remote_code": False}  # nor ask for it
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # the libraries raise OSError, ValueError, and others
        reason = first_line(error)
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r} cannot be loaded ({reason}). "
            f"Choose {', '.join(TOKENIZERS)}, a local folder, or a reachable hub id."
        ) from None


def _character_tokenizer(
    vocab: list[str], unk_token: str | None = None, **special: str
) -> tuple[Any, dict[str, str]]:
    """A core that cuts text into single entries of `vocab`, and its special tokens."""
    from tokenizers import Tokenizer, decoders, models

    ids = {token: index for index, token in enumerate(vocab)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=unk_token))
    core.decoder = decoders.Fuse()
    return core, special | ({"unk_token": unk_token} if unk_token else {})


def _fast(core: Any, special: dict[str, str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )


def text8_tokenizer(config: DictConfig | None = None) -> Any:
    """27 characters and 8 special tokens; K = 35, mask id 4."""
    from tokenizers import normalizers

    names = ("CLS", "SEP", "BOS", "EOS", "MASK", "PAD", "RESERVED", "UNK")
    vocab = [f"[{name}]" for name in names] + [*string.ascii_lowercase, " "]
    roles = ("cls", "sep", "bos", "eos", "mask", "pad")
    core, special = _character_tokenizer(
        vocab,
        unk_token="[UNK]",
        **{f"{role}_token": f"[{role.upper()}]" for role in roles},
    )
    core.normalizer = normalizers.Lowercase()
    return _fast(core, special)


def bytes_tokenizer(config: DictConfig | None = None) -> Any:
    """UTF-8 bytes, then bos, eos, mask, pad; K = 260."""
    from tokenizers import decoders, pre_tokenizers

    roles = ("bos", "eos", "mask", "pad")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core, special = _character_tokenizer(
        alphabet + [f"[{role.upper()}]" for role in roles],
        **{f"{role}_token": f"[{role.upper()}]" for role in roles},
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    return _fast(core, special)


def synthetic_tokenizer(config: DictConfig) -> Any:
    """Numbers 0 .. K - 3 written in decimal, then bos and eos; no mask."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab_size = config.data.vocab_size
    vocab = [f"{number} " for number in range(vocab_size - 2)] + ["[BOS]", "[EOS]"]
    ids = {token: index for index, token in enumerate(vocab)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[EOS]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+ "), "isolated")
    core.decoder = decoders.Fuse()
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
    return _fast(core, special)


TOKENIZERS: dict[str, Callable[[DictConfig], Any]] = {
    "text8": text8_tokenizer,
    "bytes": bytes_tokenizer,
    "synthetic": synthetic_tokenizer,
}
PIXELS = ("pixels", "cifar10")  # names of the tokenizer of images


# ---------------------------------------------------------------- vocabularies


def vocabulary_with_mask(tokenizer: Any) -> tuple[int, int]:
    """K and mask id: the tokenizer's own mask, or one more entry at the end.

    K is `tokenizer.vocab_size`, as published, which leaves out what lies behind the
    vocabulary, unless that is more than a pad: then K covers every id.
    """
    size = tokenizer.vocab_size
    if not has_pad_alone(tokenizer):
        size = max(size, largest_id(tokenizer) + 1)
    if tokenizer.mask_token_id is not None:
        return size, tokenizer.mask_token_id
    return size + 1, size


def largest_id(tokenizer: Any) -> int:
    """The largest id of any token, those behind the vocabulary included."""
    return max(ids_of(tokenizer), default=-1)


def ids_of(tokenizer: Any) -> set[int]:
    """The ids of all tokens; none of what only stands for a tokenizer."""
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return set(vocabulary.values())


def has_pad_alone(tokenizer: Any) -> bool:
    """Whether a pad is all that lies behind the vocabulary.

    So it is with GPT-2's, which has none of its own. A mask takes the pad's id then,
    as published, and neither text nor padding may hold it.
    """
    behind = {index for index in ids_of(tokenizer) if index >= tokenizer.vocab_size}
    return bool(behind) and behind == {tokenizer.pad_token_id}


def padding_id(tokenizer: Any, mask_index: int | None) -> int:
    """What pads the rows of a model: the pad, or eos where a mask has the pad's id.

    Args:
        tokenizer: From `get_tokenizer`.
        mask_index: The model's mask id; None without a mask.
    """
    is_taken = mask_index is not None and has_pad_alone(tokenizer)
    if is_taken or tokenizer.pad_token_id == mask_index:
        return int(tokenizer.eos_token_id)
    return int(tokenizer.pad_token_id)
