"""docs/errors.md: every message that the code can end with, and its cure."""

import ast
import itertools
import re
from collections.abc import Iterable, Iterator

from docs.site.messages import (
    OF_COMMANDS,
    OF_PYTHON,
    ROOT,
    Message,
    messages,
    parsed,
)

PAGE = "docs/errors.md"
TROUBLESHOOTING = "docs/troubleshooting.md"
# Calls that pass on what was said elsewhere, or what other libraries say: (file, its
# placeholder or nothing).
PASSED_ON = {
    "main.py": "lines of other files; see these",
    "data/streaming.py": "the line of a reader's process",
    "training/trainer.py": "the line of rank 0, or of Lightning's trainer",
    "evaluation/harness.py": "lines of the command that the harness stands for",
    "integral/__main__.py": "lines of argparse and of the operator",
    "duo/notebook.py": "the line that the command line would print",
}
# Words with which a message says what to do, or what would be right.
CURES = (
    *("add", "again", "allow", "check", "choose", "convert", "derive", "download"),
    *("give", "gives", "install", "leave", "leaves", "lower", "mend", "move", "name"),
    *("needs", "only", "pass", "put", "quote", "raise", "remove", "rename", "run"),
    *("set", "start", "take", "takes", "train", "use", "widen", "write", "wait"),
    *("at least", "at most", "must", "use", "above 0", "read are", "is for", "to 0"),
)
INTRODUCTION = """\
# Every error message

This page is written by `make pages` from the source, and a test compares the two: it
has every line with which the code can refuse a command or end a run. A name in angle
brackets stands for a value. Search it for a few words of your message. Where more is
to be said than the message says, it stands below it;
[troubleshooting](troubleshooting.md) has the same by topic, with what shows itself in
other ways.

A mistake in a command ends with one line and status 2, before heavy work begins. A
run that cannot go on ends with status 1, or after a signal with 128 and its number,
and the line has the command that goes on, if one can. Notes and warnings are not
listed: a run goes on after them.

## Lines that end a command
"""
OTHERS = """\
## Exceptions of Python calls

These are of functions and models that are called from Python, such as exported models
in `transformers`. On the command line most of them stand within one of the lines
above.
"""


def page() -> str:
    """The whole page."""
    of_commands, of_python = listed(OF_COMMANDS), listed(OF_PYTHON)
    said = {x.text for x in of_commands}
    of_python = [x for x in of_python if x.text not in said]
    parts = [INTRODUCTION, *sections(of_commands), OTHERS]
    return "\n".join([*parts, *sections(of_python)])


def listed(kinds: tuple[str, ...]) -> list[Message]:
    """Every message with a text of its own, each but once."""
    found = [x for x in messages(kinds) if own_words(x.text)]
    first = {x.text: x for x in reversed(found)}
    return [x for x in found if first[x.text] is x]


def unresolved() -> list[Message]:
    """Calls that end a command and whose text is not found, though it is their own."""
    found = (x for x in messages(OF_COMMANDS) if not own_words(x.text))
    return [x for x in found if x.file not in PASSED_ON and ">" not in x.text]


def own_words(text: str) -> list[str]:
    """Words of a message outside of its placeholders."""
    return re.findall(r"[A-Za-z]{2,}", re.sub(r"<[^>]*>", " ", text))[2:]


def sections(found: Iterable[Message]) -> Iterator[str]:
    """A heading and a list for each file."""
    rows = explanations()
    for file, group in itertools.groupby(found, key=lambda x: x.file):
        yield f"### `{file}`\n\n{purpose(file)}\n"
        for message in group:
            yield f"- {span(message.text)}"
            if cure := explanation(message.text, rows):
                yield f"  - {cure}"
        yield ""


def purpose(file: str) -> str:
    """The first sentence of a file's docstring."""
    text = " ".join((ast.get_docstring(parsed(file)) or "").split())
    return re.split(r"(?<=[.:;]) ", text)[0].rstrip(":;.") + "."


def span(text: str) -> str:
    """Inline code, whatever is in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def explanations() -> dict[tuple[str, ...], str]:
    """By words that a message has: what docs/troubleshooting.md says of it.

    Of `a` and `b` it has both, of `a`, `b` one.
    """
    text = (ROOT / TROUBLESHOOTING).read_text(encoding="utf-8")
    found = {}
    for quoted, cure in re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.M):
        for words in re.sub(r", with .*", "", quoted).split("`, `"):
            key = tuple(x.strip("`") for x in words.split("` and `"))
            found[key] = cure
    return found


def explanation(text: str, rows: dict[tuple[str, ...], str]) -> str | None:
    """What the row says that has most of a message's words."""
    fitting = [key for key in rows if all(x in text for x in key)]
    return rows[max(fitting, key=lambda key: len("".join(key)))] if fitting else None


def without_cure() -> list[Message]:
    """Messages that do not say what to do, and of which no row says it."""
    rows, cures = explanations(), re.compile(rf"\b({'|'.join(CURES)})\b", re.I)
    return [
        x
        for x in listed(OF_COMMANDS)
        if not cures.search(x.text) and not explanation(x.text, rows)
    ]
