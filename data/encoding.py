"""Texts to token ids: special tokens that are written out, and texts of any length.

A long text is cut into pieces at places where the ids of the pieces are the ids of the
whole, so that memory does not grow with its length. Which places these are is found by
trial (`Seams.of`), not by the kind of tokenizer.
"""

import contextlib
import functools
import itertools
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

PIECE = 2**16  # characters; longer texts are cut
CHARACTERS_AT_A_TIME = 2**18  # a tokenizer needs some 200 bytes for each


def encode_texts(texts: Iterable[str], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, without special tokens around them.

    Returns:
        The ids of all texts, one behind the other, and their number for each text.
    """
    pieces = (
        (number, piece)
        for number, text in enumerate(texts)
        for piece in pieces_of([text], tokenizer)
    )
    return encode_pieces(pieces, tokenizer)


def encode_pieces(
    pieces: Iterable[tuple[int, str]], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The same of pieces, each with the number of its text."""
    lengths: list[int] = []
    flat = [np.empty(0, np.int32)]
    for group in _groups(pieces):
        arrays = _arrays([piece for _, piece in group], tokenizer)
        for (number, _), ids in zip(group, arrays, strict=True):
            lengths += [0] * (number + 1 - len(lengths))
            lengths[number] += len(ids)
        flat += arrays
    return np.concatenate(flat), np.array(lengths, dtype=np.int64)


def _arrays(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    """Token ids of each text."""
    table = byte_ids(tokenizer, tokenizer.split_special_tokens)
    if table is not None:
        with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair
            return [table[np.frombuffer(x.encode(), np.uint8)] for x in texts]
    return [np.array(ids, np.int32) for ids in token_ids(texts, tokenizer)]


@functools.lru_cache(maxsize=8)
def byte_ids(tokenizer: Any, is_text: bool) -> np.ndarray | None:
    """The id of each byte, (256,), of a tokenizer of bytes; None of another one.

    Looking bytes up gives the same ids a hundred times faster.

    Args:
        tokenizer: Of `transformers`.
        is_text: Whether special tokens in texts are text.
    """
    from data.tokenizers import bytes_tokenizer

    own, backend = bytes_tokenizer(), getattr(tokenizer, "backend_tokenizer", None)
    core = own.backend_tokenizer.to_str()
    if not is_text or backend is None or backend.to_str() != core:
        return None
    ids = np.zeros(256, np.int32)
    for entry, index in own.get_vocab().items():
        if len(entry) == 1:
            ids[_byte_of(entry)] = index
    return ids


def bytes_of_ids(tokenizer: Any) -> np.ndarray | None:
    """How many bytes of UTF-8 each id stands for, (ids,), 0 for special tokens.

    Args:
        tokenizer: Of `transformers`.

    Returns:
        The numbers; None where they depend on an id's neighbours or are not known.
    """
    from tokenizers import decoders

    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    is_of_bytes = isinstance(decoder, decoders.ByteLevel)  # a character for each
    if not is_of_bytes and not isinstance(decoder, decoders.Fuse):
        return None
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special = {*tokenizer.all_special_tokens}
    for entry, index in vocabulary.items():
        if entry not in special:
            is_coded = is_of_bytes and entry not in added
            sizes[index] = len(entry) if is_coded else len(entry.encode())
    return sizes


def _byte_of(entry: str) -> int:
    """The byte that a character of the byte-level alphabet stands for.

    Printable characters of Latin-1 stand for themselves, and the other bytes, in order,
    for the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    code = ord(entry)
    return code if code < 256 else others[code - 256]


def _groups(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if size >= CHARACTERS_AT_A_TIME:
            yield group
            group, size = [], 0
    if group:
        yield group


# ---------------------------------------------------------------- special tokens


def token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without special tokens around it.

    Special tokens that are written out in a text are tokens or text as
    `tokenizer.split_special_tokens` says.
    """
    unwanted = unwanted_tokens(tokenizer, tokenizer.split_special_tokens)
    if not any(token in text for token in unwanted for text in texts):
        return _ids(texts, tokenizer)
    broken = [broken_up(text, unwanted) for text in texts]
    lists = iter(_ids(list(itertools.chain(*broken)), tokenizer))
    return [
        list(itertools.chain(*itertools.islice(lists, len(parts)))) for parts in broken
    ]


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, **options)
    lists: list[list[int]] = encoded["input_ids"]
    return lists


def _tried(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of those texts that the tokenizer can take."""
    lists = []
    for text in texts:
        with contextlib.suppress(Exception):  # the library has no other class
            lists += _ids([text], tokenizer)
    return lists


@functools.lru_cache(maxsize=8)
def unwanted_tokens(tokenizer: Any, is_text: bool) -> tuple[str, ...]:
    """Special tokens that a text would become though it must not.

    These are a pad that the vocabulary has no place for (`has_pad_alone`), and, where
    special tokens are text, those that the tokenizer finds in its vocabulary as it
    finds words.
    """
    from data.tokenizers import has_pad_alone

    if not is_text:
        return (tokenizer.pad_token,) if has_pad_alone(tokenizer) else ()
    tokens = sorted({*tokenizer.all_special_tokens} - {tokenizer.unk_token})
    found = []
    for token in tokens:
        lists = _tried([token, f" {token} ", f"a{token}a"], tokenizer)
        index = tokenizer.convert_tokens_to_ids(token)
        if len(token) > 1 and any(index in ids for ids in lists):
            found.append(token)
    return tuple(found)


def broken_up(text: str, tokens: tuple[str, ...]) -> list[str]:
    """A text in parts, cut behind the first character of each of these tokens."""
    if not tokens:
        return [text]
    starts = re.finditer("|".join(map(re.escape, tokens)), text)
    cuts = [0, *(found.start() + 1 for found in starts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


# ---------------------------------------------------------------- long texts


class Seam(NamedTuple):
    """Where a text may be cut: at a separator between two letters."""

    separator: str
    is_dropped: bool  # else the next piece begins with it


class Seams(NamedTuple):
    """All that is known of where a tokenizer's texts may be cut."""

    anywhere: bool = False
    seams: tuple[Seam, ...] = ()
    tokens: tuple[str, ...] = ()  # which are never cut

    @classmethod
    def of(cls, tokenizer: Any, is_text: bool) -> "Seams":
        """Those that hold for a tokenizer.

        A separator is one if no entry of the vocabulary reaches from a letter into
        it, so that no token can lie across, and if texts around it have the same ids
        together and apart.

        Args:
            tokenizer: Of `transformers`.
            is_text: Whether special tokens in texts are text.
        """
        added = _added_tokens(tokenizer, is_text)
        entries = tokenizer.get_vocab().keys() - {
            *tokenizer.all_special_tokens,
            *(token.content for token in tokenizer.added_tokens_decoder.values()),
        }
        contents = tuple(token.content for token in added if len(token.content) > 1)
        if max(map(len, entries), default=0) == 1 and not any(
            token.normalized for token in added
        ):
            contents += unwanted_tokens(tokenizer, is_text)
            if _agrees(tokenizer, Seam("", False), ANY, ANY):
                return cls(anywhere=True, tokens=contents)
        surface = "\0".join(_surface(entries, tokenizer))
        seams = []
        for separator in SEPARATORS:
            across = rf"[^\W\d_]{re.escape(separator)}|\ufffd{re.escape(separator)}"
            if re.search(across, surface) or any(
                (token.normalized and separator in token.content)
                or (
                    token.rstrip
                    and separator.isspace()
                    and token.content[-1:].isalpha()
                )
                for token in added
            ):
                continue
            for seam in (Seam(separator, False), Seam(separator, True)):
                if _agrees(tokenizer, seam, BEFORE, BEHIND):
                    seams.append(seam)
                    break
        holding = [x for x in contents if any(s.separator in x for s in seams)]
        return cls(seams=tuple(seams), tokens=tuple(holding))

    def __bool__(self) -> bool:
        return self.anywhere or bool(self.seams)

    @property
    def margin(self) -> int:
        """Characters behind a cut that have to be known."""
        return 2 + max(map(len, self.tokens), default=0)

    def find(self, text: str, low: int, high: int) -> tuple[int, int] | None:
        """The last cut between `low` and `high`: end of a piece, start of the next."""
        if self.anywhere:
            while high > low and self._is_inside(text, high):
                high -= 1
            return (high, high) if high > low else None
        found = [self._find(seam, text, low, high) for seam in self.seams]
        return max((cut for cut in found if cut), default=None)

    def _find(
        self, seam: Seam, text: str, low: int, high: int
    ) -> tuple[int, int] | None:
        at = text.rfind(seam.separator, low + 1, high)
        while at != -1:
            after = at + len(seam.separator) * seam.is_dropped
            behind = text[at + len(seam.separator) : at + len(seam.separator) + 1]
            is_between = is_letter(text[at - 1]) and is_letter(behind)
            if is_between and not any(self._is_inside(text, x) for x in (at, after)):
                return at, after
            at = text.rfind(seam.separator, low + 1, at)
        return None

    def _is_inside(self, text: str, at: int) -> bool:
        return any(
            token in text[max(0, at - len(token) + 1) : at + len(token) - 1]
            for token in self.tokens
        )


def is_letter(character: str) -> bool:
    """Whether a character is a letter that normalisation leaves as it is."""
    return character.isalpha() and unicodedata.is_normalized("NFKC", character)


SEPARATORS = (" ", "\n", ",", ".", "，", "。", "、")  # noqa: RUF001
# What is tried around a separator, each ending or beginning with a letter.
BEFORE = (
    *("a", "the cat", "x1a", "don't", "I'M", "A", "Zz", "é", "слово", "你好", "한국"),
    *(
        "12 km",
        "a\n b",
        "\n\nb",
        "x  y",
        "(f",
        "a, b",
        "e.g",
        "#a",
        "a_b",
        "¿qué",
        "العرب",
    ),
)
BEHIND = (
    *("b", "the dog's", "s", "t x", "re", "LL", "S", "a1", "é", "мир", "你", "한", "न"),
    *("b\n", "x  y", "f(x)", "a.b", "q, r", "i_j", "ve\n\nx", "ال"),
)
# What is tried where a text may perhaps be cut anywhere.
ANY = (
    *BEFORE,
    *BEHIND,
    *("1", "23", " ", "  ", "\n", "\t", "\r\n", ".", "...", "'", "'s", '"', "-", "_"),
    *("\u0301", "e\u0301", "\u1100", "\u1161", "\U0001f600", "\u200d", "\ufe0f", "Σ"),
    *("ß", "İ", "ﬁ", "½", "\xa0", "\u3000", "[", "]", "<", ">", "▁", "Ġ"),
)


def _agrees(
    tokenizer: Any, seam: Seam, before: tuple[str, ...], behind: tuple[str, ...]
) -> bool:
    """Whether texts have the same ids around a separator together and apart."""
    start = "" if seam.is_dropped else seam.separator
    pairs = list(itertools.product(before, behind))
    try:
        first = dict(zip(before, _ids(list(before), tokenizer), strict=True))
        second = _ids([start + text for text in behind], tokenizer)
        rest = dict(zip(behind, second, strict=True))
        whole = _ids([a + seam.separator + b for a, b in pairs], tokenizer)
    except Exception:  # the library has no other class; it does not know a character
        return False
    return all(
        ids == first[a] + rest[b] for ids, (a, b) in zip(whole, pairs, strict=True)
    )


def _added_tokens(tokenizer: Any, is_text: bool) -> list[Any]:
    """Those that are looked for in texts."""
    tokens = tokenizer.added_tokens_decoder.values()
    return [token for token in tokens if not (is_text and token.special)]


def _surface(entries: Iterable[str], tokenizer: Any) -> list[str]:
    """What entries of a vocabulary stand for in texts."""
    from tokenizers import decoders

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and '"ByteLevel"' in backend.to_str():
        decoder = decoders.ByteLevel()
        return [decoder.decode([entry]) for entry in entries]
    return [entry.replace("▁", " ") for entry in entries]


@functools.lru_cache(maxsize=8)
def seams_of(tokenizer: Any, is_text: bool) -> Seams:
    """Where the tokenizer's texts may be cut; found once."""
    seams = Seams.of(tokenizer, is_text)
    if not seams:
        log.warning(
            "nothing is known of where texts of this tokenizer may be cut: each is "
            "tokenized as a whole, with some 200 bytes of memory for a character"
        )
    return seams


def pieces_of(parts: Iterable[str], tokenizer: Any) -> Iterator[str]:
    """The pieces of one text whose ids, together, are those of the text.

    Args:
        parts: The text, in parts that are cut anywhere.
        tokenizer: Of `transformers`.
    """
    held, searched = "", 0
    for part in _short(parts):
        held += part
        if len(held) <= PIECE:
            continue
        seams = seams_of(tokenizer, tokenizer.split_special_tokens)
        end = len(held) - seams.margin
        while len(held) > PIECE:
            cut = seams.find(held, searched, min(PIECE, end)) or seams.find(
                held, max(searched, PIECE - 1), end
            )
            if cut is None:
                searched = max(end - seams.margin, 0)
                break
            yield held[: cut[0]]
            held, searched, end = held[cut[1] :], 0, end - cut[1]
    yield held


def _short(parts: Iterable[str]) -> Iterator[str]:
    for part in parts:
        if len(part) <= 2 * PIECE:
            yield part
            continue
        for start in range(0, len(part), 2 * PIECE):
            yield part[start : start + 2 * PIECE]
