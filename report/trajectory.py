"""The page that shows how samples came to be, step by step: written with its data in
it, and read back as data alone.

A page is one HTML file that needs no network and no server. Its data is JSON in an
element that no browser executes; pages of others are read without being executed, too.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sampling.trajectory import NO_PROBABILITY, Trajectory, packed, unpacked
from utils import ConfigError, open_file, path_exists, printable, whole_file

TEMPLATE = Path(__file__).with_name("viewer.html")
FORMAT = "discrete-diffusion trajectories"
VERSION = 1
START = '<script type="application/json" id="trajectories">'
END = "</script>"
LARGEST = 2**26  # bytes of a page that is read
MOST_TOKENS = 2**18  # of all samples of a page
MOST_PAGES = 8  # side by side
SIDE_BY_SIDE = "view.paths"
_NAME = 200  # characters of a text of a page, at most

# What a token looks like: text, or bytes that make characters with those beside them.
Piece = str | list[int]


class Shown(NamedTuple):
    """The samples of one run, as a page has them."""

    title: str
    about: dict[str, str]  # what they are of, in words
    pieces: dict[int, Piece]  # of every token that is there; none of images
    names: list[int]  # tokens whose piece is a name, as [EOS] is
    mask: int | None
    side: int | None  # pixels of an image's side; None: text
    samples: list[Trajectory]


# ---------------------------------------------------------------- pieces


def pieces_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, Piece]:
    """What each token looks like in the middle of a text.

    Args:
        tokenizer: One of `transformers`.
        ids: Of the tokens.
    """
    before = next(iter(tokenizer("a", add_special_tokens=False)["input_ids"]), None)
    special = set(tokenizer.all_special_ids)
    found: dict[int, Piece] = {}
    for index in sorted(ids):
        name = tokenizer.convert_ids_to_tokens(index)
        text = str(index) if name is None else str(name)
        if index not in special and before is not None and name is not None:
            alone, both = (tokenizer.decode(x) for x in ([before], [before, index]))
            behind = both.removeprefix(alone) if both.startswith(alone) else ""
            text = behind or tokenizer.decode([index]) or text
            if "\ufffd" in text:
                found[index] = _bytes_of(str(name)) or text
                continue
        found[index] = readable(text)
    return found


def _bytes_of(token: str) -> list[int]:
    """The bytes that a token of bytes stands for; nothing if it is none."""
    if plain := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return [int(plain[1], 16)]
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 has them
    others = [x for x in range(256) if x not in itself]
    by_letter = {chr(x): x for x in itself}
    by_letter |= {chr(256 + i): x for i, x in enumerate(others)}
    values = [by_letter.get(letter) for letter in token]
    return [] if None in values else [x for x in values if x is not None]


def readable(text: str) -> str:
    """Text of one piece: what cannot be seen is written out, but for line ends."""
    return printable(text, keep="\n\t")


# ---------------------------------------------------------------- writing


def write_page(path: str, shown: Sequence[Shown]) -> None:
    """Writes a page, all of it or nothing.

    Args:
        path: Local or fsspec.
        shown: Runs, side by side.
    """
    data = {
        "format": FORMAT,
        "version": VERSION,
        "trajectories": [_plain(one) for one in shown],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":  # no end of the element can stand in it
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    page = TEMPLATE.read_text(encoding="utf-8")
    for kind in ("style", "script"):
        own = re.search(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        digest = hashlib.sha256(own[1].encode()).digest() if own else b""
        mark = f"'sha256-{base64.b64encode(digest).decode()}'"
        page = page.replace(f"%{kind}%", mark)
    title = " / ".join(one.title for one in shown)
    page = page.replace("%title%", html.escape(printable(title, keep="")))
    with whole_file(path, "w") as file:
        file.write(page.replace("%data%", f"{START}{text}{END}"))


def _plain(one: Shown) -> dict[str, Any]:
    return {
        **one._asdict(),
        "pieces": {str(index): piece for index, piece in one.pieces.items()},
        "samples": [packed(sample) for sample in one.samples],
        "noised_again": any(NO_PROBABILITY in x.codes for x in one.samples),
    }


# ---------------------------------------------------------------- reading


def read_page(path: str, key: str = SIDE_BY_SIDE) -> list[Shown]:
    """The runs of a page, which may be anybody's.

    Args:
        path: Local or fsspec.
        key: Of the config, for messages.

    Raises:
        ConfigError: If it is not there, or is no page of trajectories.
    """
    where = f"{key}: {path}"
    if not path_exists(path):
        raise ConfigError(f"{where}: there is no such file.")
    try:
        with open_file(path) as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        reason = f"{where} cannot be read ({error.strerror}): give another file."
        raise ConfigError(reason) from None
    try:
        if len(raw) > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        return _runs_of(raw.decode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(error, keep="")[:_NAME]
        raise ConfigError(
            f"{where} is no page of sampling.save_trajectory ({reason})."
        ) from None


def _runs_of(page: str) -> list[Shown]:
    parts = page.split(START)
    if len(parts) != 2:
        raise ValueError("it has no data of trajectories")
    data = json.loads(parts[1].partition(END)[0])
    if data["format"] != FORMAT or data["version"] != VERSION:
        raise ValueError(f"it is not of version {VERSION}")
    runs = data["trajectories"]
    if not isinstance(runs, list) or not 1 <= len(runs) <= MOST_PAGES:
        raise ValueError("it has no runs, or too many")
    return [_shown(run) for run in runs]


def _shown(data: Mapping[str, Any]) -> Shown:
    side, mask = data["side"], data["mask"]
    for value, least in ((side, 1), (mask, 0)):
        if value is not None and not (type(value) is int and value >= least):
            raise ValueError(f"{value!r} is no whole number")
    samples = data["samples"]
    if not isinstance(samples, list) or not samples:
        raise ValueError("it has no samples")
    about = {_name(k): _name(x) for k, x in dict(data["about"]).items()}
    names = [int(x) for x in data["names"]]
    pieces = {int(k): _piece(x) for k, x in dict(data["pieces"]).items()}
    kept = [unpacked(sample) for sample in samples]
    if sum(len(sample.first) for sample in kept) > MOST_TOKENS:
        raise ValueError("it has too many tokens")
    for sample in kept:
        if side is None and not sample.ids() <= pieces.keys():
            raise ValueError("a token has no text")
        if side is not None and len(sample.first) != 3 * side**2:
            raise ValueError("a sample is no image")
    return Shown(_name(data["title"]), about, pieces, names, mask, side, kept)


def _piece(value: Any) -> Piece:
    if isinstance(value, str):
        return readable(value)
    if not isinstance(value, list) or not all(
        type(x) is int and 0 <= x < 256 for x in value
    ):
        raise ValueError("a piece is neither text nor bytes")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return printable(value, keep="")[:_NAME]
