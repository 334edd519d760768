"""Tokenizers: characters of text8, bytes, synthetic numbers, any of `transformers`; and
the vocabulary that a model makes of one.
"""

import os
import string
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from utils import ConfigError, first_line, hub_options


def get_tokenizer(config: DictConfig) -> Any:
    """The tokenizer that `data.tokenizer_name_or_path` names.

    A missing bos falls back to cls, a missing eos to sep; a missing pad is added.

    Returns:
        A `transformers` tokenizer.

    Raises:
        ConfigError: If it cannot be loaded, or has neither bos nor cls.
    """
    name = config.data.tokenizer_name_or_path
    tokenizer = TOKENIZERS.get(name, _pretrained_tokenizer)(config)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise ConfigError(
            f"data.tokenizer_name_or_path={name!r} has no bos/cls or no eos/sep token; "
            "choose a tokenizer that has both."
        )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
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
            f"{', '.join(TOKENIZERS)}, a local folder, or a hub id."
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


def vocabulary_with_mask(tokenizer: Any) -> tuple[int, int]:
    """K and mask id: the tokenizer's own mask, or one more entry at the end.

    `tokenizer.vocab_size` and not `len(tokenizer)`: tokens added later do not count.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.vocab_size, tokenizer.mask_token_id
    return tokenizer.vocab_size + 1, tokenizer.vocab_size
