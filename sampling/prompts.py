"""What a user gives a sampler to start from: prompts, prompt files, templates with
gaps. Text becomes `Given`, token ids that no sampler changes.

Shapes: B batch, L length.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.device import to_device
from utils import ConfigError, open_file, path_exists

KEYS = ("prompt", "prompt_file", "infill")
_GAP = re.compile(r"\[MASK(?::(\d+))?\]")


class Given(NamedTuple):
    """Tokens that a sample must hold, and where."""

    tokens: Tensor  # (B, L); what stands at unknown positions does not matter
    known: Tensor  # (B, L) bool

    def put(self, x: Tensor) -> Tensor:
        """x with the known tokens in it, (B, L)."""
        return torch.where(self.known, self.tokens, x)

    def window(self, start: int, length: int) -> "Given":
        """The part at start .. start + length - 1."""
        return Given(*(x[:, start : start + length] for x in self))

    def starting_with(self, token: int, rows: Tensor) -> "Given":
        """The same with a known first token in some rows, (B,) bool."""
        tokens, known = (x.clone() for x in self)
        tokens[:, 0].masked_fill_(rows, token)
        known[:, 0] |= rows
        return Given(tokens, known)

    def to(self, device: torch.device) -> "Given":
        return Given(*(to_device(x, device) for x in self))

    @classmethod
    def nothing(cls, num_samples: int, length: int, device: torch.device) -> "Given":
        tokens = torch.zeros(num_samples, length, dtype=torch.long, device=device)
        return cls(tokens, torch.zeros_like(tokens, dtype=torch.bool))


class Prompt(NamedTuple):
    """One text to start from."""

    text: str
    ids: Sequence[int | None]  # token ids after bos; None is a gap


def check_prompts(config: DictConfig, is_autoregressive: bool) -> None:
    """Refuses what can be refused without a tokenizer.

    Raises:
        ConfigError: If another mode is to run, more than one of the keys is set, a
            template has no gap, a model that only writes left to right is to fill
            gaps, or there is no file, or nothing in it.
    """
    sampling = config.sampling
    asked = [key for key in KEYS if sampling[key] is not None]
    if asked and config.mode != "sample_eval":
        raise ConfigError(
            f"sampling.{asked[0]} is for mode=sample_eval, not mode={config.mode}."
        )
    if len(asked) > 1:
        names = " and ".join(f"sampling.{key}" for key in asked)
        raise ConfigError(f"{names} are both set; give one of them.")
    for text, key, has_gaps in _texts(config):
        if has_gaps and is_autoregressive:
            raise ConfigError(
                f"{key}={text!r}: algo={config.algo.name} writes left to right and "
                "cannot fill gaps; give sampling.prompt, or use a diffusion model."
            )
        if has_gaps and not _GAP.search(text):
            raise ConfigError(
                f"{key}={text!r} has no gap; write [MASK:12] where 12 tokens are to be "
                "filled in."
            )


def read_prompts(config: DictConfig, tokenizer: Any, length: int) -> list[Prompt]:
    """The prompts that the config asks for; none if it asks for none.

    Args:
        config: The run's config.
        tokenizer: Splits texts; special tokens are not added.
        length: Longest sample, bos included.

    Raises:
        ConfigError: If a text is longer, or holds the mask or an unknown token.
    """
    prompts = []
    is_longer = config.sampling.num_blocks is not None
    room = "sampling.num_blocks x algo.block_size" if is_longer else "model.length"
    for text, key, has_gaps in _texts(config):
        if has_gaps:
            _check_gaps(text, key, length)
        ids = _template(text, tokenizer) if has_gaps else _encode(text, tokenizer)
        if len(ids) >= length:
            raise ConfigError(
                f"{key}={text!r} has {len(ids)} tokens; after bos there is room for "
                f"{length - 1} ({room})."
            )
        if tokenizer.mask_token is not None and (
            tokenizer.mask_token_id in ids
            or (not has_gaps and tokenizer.mask_token in text)
        ):
            raise ConfigError(
                f"{key}={text!r} holds the mask token; gaps are for sampling.infill."
            )
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in ids and tokenizer.unk_token not in text:
            strange = {c for c in text if unknown in _encode(c, tokenizer)}
            which = ", ".join(sorted(map(repr, strange))) or "something"
            raise ConfigError(
                f"{key}={text!r} holds {which}, which the tokenizer does not know."
            )
        prompts.append(Prompt(text, ids))
    return prompts


def given_tokens(prompts: list[Prompt], bos: int, length: int) -> Given:
    """Bos and the prompt's tokens in each row, (B, L) on the host."""
    given = Given.nothing(len(prompts), length, torch.device("cpu"))
    for row, prompt in enumerate(prompts):
        for position, token in enumerate([bos, *prompt.ids]):
            if token is not None:
                given.tokens[row, position] = token
                given.known[row, position] = True
    return given


def _texts(config: DictConfig) -> list[tuple[str, str, bool]]:
    """(text, key it came from, whether it is a template) of every prompt."""
    sampling = config.sampling
    if sampling.prompt is not None:
        return [(str(sampling.prompt), "sampling.prompt", False)]
    if sampling.infill is not None:
        return [(str(sampling.infill), "sampling.infill", True)]
    if sampling.prompt_file is not None:
        return _file(str(sampling.prompt_file))
    return []


def _file(path: str) -> list[tuple[str, str, bool]]:
    """Lines of a text file, or of JSON: a string, or an object with prompt or infill.

    Empty lines are passed over.
    """
    where = f"sampling.prompt_file={path!r}"
    if not path_exists(path):
        raise ConfigError(f"{where}: there is no such file.")
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{where} is not a text file.") from None
    is_json = Path(path).suffix in (".jsonl", ".json")
    texts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            key = f"{where}, line {number}"
            text, has_gaps = _json_line(line, key) if is_json else (line, False)
            texts.append((text, key, has_gaps))
    if not texts:
        raise ConfigError(f"{where} holds no prompt.")
    return texts


def _json_line(line: str, where: str) -> tuple[str, bool]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, str):
        return entry, False
    if isinstance(entry, dict):
        for key, has_gaps in (("prompt", False), ("infill", True)):
            if isinstance(entry.get(key), str):
                return entry[key], has_gaps
    raise ConfigError(
        f'{where} is neither a string nor {{"prompt": ...}} nor {{"infill": ...}}.'
    )


def _check_gaps(text: str, key: str, length: int) -> None:
    for gap in _GAP.finditer(text):
        if not 0 < int(gap[1] or 1) < length:
            raise ConfigError(
                f"{key}={text!r}: {gap[0]} is no gap of 1 to {length - 1} tokens."
            )


def _template(text: str, tokenizer: Any) -> list[int | None]:
    """Token ids of a template, None for each token of a gap.

    Every piece between gaps is tokenised by itself. Where the tokenizer joins a blank
    with the word after it, as GPT-2's, a blank before a gap belongs to the gap.
    """
    joins_blanks = len(_encode(" a", tokenizer)) == 1
    ids: list[int | None] = []
    start = 0
    for gap in _GAP.finditer(text):
        piece = text[start : gap.start()]
        ids += _encode(piece.removesuffix(" ") if joins_blanks else piece, tokenizer)
        ids += [None] * int(gap[1] or 1)
        start = gap.end()
    return ids + _encode(text[start:], tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
