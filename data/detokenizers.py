"""Clean-up of texts that were published tokenised: "1 @,@ 234 ( units ) ." and so on.

A detokenizer is a list of rules that run in order, so its `repr` is its version: what
was tokenised with other rules is never mistaken for what these give. Perplexities of
published tables depend on them character by character.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol


class TextRule(Protocol):
    """What changes a text; its `repr` says how."""

    def __call__(self, text: str) -> str: ...


class Rule(NamedTuple):
    """Replaces `old` everywhere in a text; `old` is a regular expression or plain."""

    old: str
    new: str
    is_pattern: bool = False
    times: int = 1  # " N N " needs two: what is found does not overlap

    def __call__(self, text: str) -> str:
        for _ in range(self.times):
            if self.is_pattern:
                text = re.sub(self.old, self.new, text)
            else:
                text = text.replace(self.old, self.new)
        return text


Rules = tuple[TextRule, ...]


def pattern(old: str, new: str) -> Rule:
    return Rule(old, new, is_pattern=True)


def before(marks: str) -> list[Rule]:
    """No space in front of these marks where one follows them, too."""
    return [Rule(f" {mark} ", f"{mark} ") for mark in marks]


def inside(opening: str, content: str, closing: str) -> Rule:
    """No space next to a bracket or a quote, on its inside."""
    left, right = re.escape(opening), re.escape(closing)
    return pattern(rf"{left}\s*([^{content}]*?)\s*{right}", rf"{opening}\1{closing}")


# NOTE(compat): "/' 5/" becomes the letters "/'[0-9]/" in published data, too.
WIKITEXT = (
    Rule("s '", "s'"),
    pattern(r"/' [0-9]/", "/'[0-9]/"),
    Rule(" @-@ ", "-"),
    Rule(" @,@ ", ","),
    Rule(" @.@ ", "."),
    *before(":;.!?,"),
    inside("(", r"\)", ")"),
    inside("[", r"\]", "]"),
    inside("{", "}", "}"),
    inside('"', '"', '"'),
    inside("'", "'", "'"),
    *(Rule(" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    Rule(" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    Rule(" \n", "\n"),
    Rule("\n ", "\n"),
    Rule(" N ", " 1 "),
    Rule(" 's", "'s"),
)
PTB = (
    Rule(" 's", "'s"),
    Rule("s ' ", "s' "),
    Rule(" n't", "n't"),
    Rule(" \n ", "\n"),
    Rule("\\/", "/"),
    Rule(" N ", " 1 ", times=10),
    Rule("$ 1", "$1"),
    Rule("# 1", "#1"),
    Rule("<unk>", "?"),
)
LM1B = (
    Rule("http : / / ", "http://"),
    Rule("https : / / ", "https://"),
    pattern(r" '(\w+)", r"'\1"),
    pattern(r" (\w+) \. ", r" \1. "),
    pattern(r" (\w+) \.$", r" \1."),
    Rule(" ? ", "? "),
    pattern(r" \?$", "?"),
    Rule(" ! ", "! "),
    pattern(r" !$", "!"),
    *before(",:;"),
    Rule(" / ", "/"),
    pattern(r'" ([^"]+) "', r'"\1"'),
    pattern(r"' ([^']+) '", r"'\1'"),
    pattern(r"\( ([^()]+) \)", r"(\1)"),
    pattern(r"\[ ([^\[\]]+) \]", r"[\1]"),
    Rule("$ ", "$"),
    Rule("\N{POUND SIGN} ", "\N{POUND SIGN}"),
)
LAMBADA = (
    Rule("\N{LEFT DOUBLE QUOTATION MARK}", '"'),
    Rule("\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
    pattern(r"\A\s+|\s+\Z", ""),
    pattern(r"\A", "\n"),
)

# By `data.detokenizer`.
DETOKENIZERS: dict[str, Rules] = {
    "none": (),
    "wikitext": WIKITEXT,
    "ptb": PTB,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "scientific_papers": WIKITEXT + LM1B,
}


def detokenize(text: str, rules: Rules) -> str:
    """Runs rules in order."""
    for rule in rules:
        text = rule(text)
    return text


# ---------------------------------------------------------------- text8

_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
_DIGITS = [*_NAMES, "nine"]


def text8_normalize(text: str) -> str:
    """Lower case, digits spelled out, everything else one space: text8's rules."""
    return _spaced(text).strip()


def _spaced(text: str) -> str:
    text = re.sub(r"[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", text.lower())
    return re.sub(r"[^a-z]+", " ", text)


class Text8Rule(NamedTuple):
    """`text8_normalize` as a rule."""

    version: int = 1

    def __call__(self, text: str) -> str:
        return text8_normalize(text)


TEXT8: Rules = (Text8Rule(),)


def in_parts(text: str, rules: Rules, size: int = 2**17) -> Iterator[str] | None:
    """What `detokenize` gives, in parts; None where it needs the text as a whole.

    Args:
        text: A long one.
        rules: None, or text8's.
        size: Characters of a part before the rules.
    """
    parts = (text[start : start + size] for start in range(0, len(text), size))
    known = {(): parts, TEXT8: _text8_parts(parts)}
    return known.get(rules)


def _text8_parts(parts: Iterable[str]) -> Iterator[str]:
    """`text8_normalize` of a text: blanks at a cut are one, and none at its ends."""
    is_begun = is_apart = False
    for part in parts:
        spaced = _spaced(part)
        clean = spaced.strip()
        is_apart |= spaced.startswith(" ")
        if clean:
            yield " " * (is_begun and is_apart) + clean
            is_begun, is_apart = True, spaced.endswith(" ")
