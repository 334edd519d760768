"""docs/reference.md: every key of configs/ with its default and its comment.

What is said of a key is the comment on its line and the lines of comment right above
it. A key that several files of a group have needs it in one of them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from docs.site.messages import ROOT

PAGE = "docs/reference.md"
CONFIGS = ROOT / "configs"
# Names with a meaning of Hydra's, and the list of what a file is built upon.
OF_HYDRA = ("defaults", "_target_", "_partial_", "()")
# What the groups and the nodes of config.yaml are for, in the order of the page.
NODES = {
    "": "The command as a whole",
    "loader": "Batches",
    "algo": "The objective: `algo=NAME`",
    "model": "The network: `model=NAME`",
    "noise": "The noise schedule: `noise=NAME`",
    "data": "The data: `data=NAME`",
    "training": "What training does beside the objective",
    "optim": "The optimiser, AdamW",
    "lr_scheduler": "The learning rate over time: `lr_scheduler=NAME`",
    "trainer": "Lightning's trainer",
    "strategy": "How devices share the work: `strategy=NAME`",
    "checkpointing": "Where a run keeps its state",
    "callbacks": "What is done beside training: `callbacks=[NAME,...]`",
    "logger": "Where numbers are logged: `logger=NAME`",
    "wandb": "Weights & Biases, of `logger=wandb`",
    "sampling": "Samples",
    "eval": "Measuring a checkpoint",
    "export": "A folder for `transformers`",
    "report": "Tables and pictures",
    "prior": "What samples start from",
    "hydra": "Folders and lines of a run",
}
INTRODUCTION = """\
# Every key

This page is written by `make pages` from the comments in `configs/`, and a test
compares the two. Each key may be given on the command line as KEY=VALUE; `python
main.py --cfg job` prints all values of a command, and a key that nothing reads is
refused. `${key}` is the value of another key, and a key that begins with a dot there
is one of the same group. Behind a value stand the files of the group that have it,
where they differ.

Settings of your own parts are not here ([your own parts](extending.md)). Further
arguments of Lightning's trainer are added with `+` ([how a configuration is put
together](training.md#how-a-configuration-is-put-together)).
"""


class Key(NamedTuple):
    """A key of one file."""

    name: str  # dotted, from the root of the composed config
    value: str  # as the file writes it; "" of a group of keys
    comment: str
    file: str


def page() -> str:
    """The whole page."""
    found = keys()
    groups = [x for x in NODES if x] + sorted({x.name.split(".")[0] for x in found})
    parts = [INTRODUCTION]
    for group in dict.fromkeys(["", *groups]):
        if any(x.name.split(".")[0] == group for x in found) or not group:
            parts += section(group, found)
    return "\n".join([*parts, *recipes()])


def section(group: str, found: list[Key]) -> Iterator[str]:
    """Of a node of config.yaml or of a group of files."""
    title = NODES.get(group, "Further keys")
    yield f"## {title}\n" if not group else f"## `{group}`\n\n{title}.\n"
    for path in sorted((CONFIGS / group).glob("*.yaml")) if group else ():
        if not path.stem.startswith("_"):
            yield f"- `{group}={path.stem}`: {head(path)}"
    own = [x for x in found if in_section(x, group, found) and (x.value or x.comment)]
    if own:
        yield "\n| key | default | meaning |\n| --- | --- | --- |"
    for name in dict.fromkeys(x.name for x in own):
        same = [x for x in own if x.name == name]
        yield f"| `{name}` | {values(same)} | {cell(meaning(same))} |"
    yield ""


def in_section(key: Key, group: str, found: list[Key]) -> bool:
    first, _, rest = key.name.partition(".")
    is_node = any(x.name.startswith(f"{first}.") for x in found)
    return first == group if group else not rest and not is_node


def values(same: list[Key]) -> str:
    """A default, or which files have which."""
    by_value: dict[str, list[str]] = {}
    for key in same:
        by_value.setdefault(key.value, []).append(key.file)
    if not any(by_value):
        return ""
    if len(by_value) == 1:
        return code(same[0].value)
    if "_base" in (files := [x.file for x in same]):
        base = same[files.index("_base")].value
        others = {x: y for x, y in by_value.items() if x != base}
        shown = (f"{code(x)} ({', '.join(y)})" for x, y in others.items())
        return "; ".join([code(base), *shown])
    return "; ".join(f"{code(x)} ({', '.join(y)})" for x, y in by_value.items())


def meaning(same: list[Key]) -> str:
    """The comment, or those of the files that say something else; `_base` has none of
    its own to name."""
    by_comment: dict[str, str] = {}
    for key in same:
        if key.comment:
            by_comment.setdefault(key.comment.rstrip("."), key.file)
    if len(by_comment) == 1:
        return next(iter(by_comment))
    ordered = sorted(by_comment.items(), key=lambda x: x[1] != "_base")
    return "; ".join(x if y == "_base" else f"`{y}`: {x}" for x, y in ordered)


def code(value: str) -> str:
    return f"`{cell(value)}`" if value else ""


def cell(text: str) -> str:
    """Text for a table, in which a bar would end the column."""
    return text.replace("|", r"\|")


def recipes() -> Iterator[str]:
    """What `experiment=NAME` can be."""
    yield "## `experiment`\n\nWhole recipes, `experiment=NAME`, which set these keys.\n"
    yield "| recipe | what it does |\n| --- | --- |"
    folder = CONFIGS / "experiment"
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("")
        yield f"| `{name.as_posix()}` | {cell(head(path).split(' command: ')[0])} |"
    yield ""


# ---------------------------------------------------------------- reading the files


def keys() -> list[Key]:
    """Every key of config.yaml and of the groups; recipes set no others."""
    found = read(CONFIGS / "config.yaml", "")
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        # Sizes of the scaling study are a table of their own, in docs/scaling.md.
        is_size = re.fullmatch(r"\d+M", path.stem)
        if path.parent.name != "experiment" and not is_size:
            found += read(path, path.parent.name)
    return found


def without_comment() -> list[str]:
    """Keys of which no file says what they mean, with the file to say it in."""
    found = keys()
    said = {x.name for x in found if x.comment}
    silent = [x for x in found if x.name not in said and x.value]
    return [f"{x.name} (configs, {x.file}.yaml)" for x in silent]


def read(path: Path, group: str) -> list[Key]:
    """The keys of a file, those of inner nodes behind the nodes."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    found: list[Key] = []

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else key.value
            if key.value in OF_HYDRA:
                continue
            is_group = isinstance(value, yaml.MappingNode) and value.value
            start, end = value.start_mark.index, value.end_mark.index
            written = "" if is_group else " ".join(text[start:end].split())
            comment = said(lines, key.start_mark, first)
            found.append(Key(name, written, comment, path.stem))
            if is_group:
                walk(value, name)

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        walk(root, group)
    return found


def said(lines: list[str], mark: yaml.Mark, first: int) -> str:
    """The comment above a line, from the file's `first` one on, and that behind it."""
    above = mark.line
    start = " " * mark.column + "#"
    while above > first and lines[above - 1].startswith(start):
        above -= 1
    block = [x.strip().removeprefix("#").strip() for x in lines[above : mark.line]]
    _, _, behind = lines[mark.line].partition("  # ")
    return " ".join([*block, behind.strip()]).strip()


def head(path: Path) -> str:
    """The comment at the head of a file, in one line."""
    text = path.read_text(encoding="utf-8")
    lines = re.match(r"(#.*\n)*", text)[0].splitlines()
    words = " ".join(x.removeprefix("#").strip() for x in lines)
    return " ".join(words.removeprefix("@package _global_").split())
