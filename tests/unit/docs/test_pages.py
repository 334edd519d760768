"""Pages of docs/ that are made from the source: current and complete."""

import ast
import re
import textwrap

import pytest

from cli.known_keys import known_keys
from docs.site import errors, messages, reference
from docs.site.__main__ import PAGES
from docs.site.messages import OF_COMMANDS, ROOT, Place, texts_of

OF_HYDRA = set(reference.OF_HYDRA)
AGAIN = "run `make pages` (python -m docs.site), and commit what it changes"


@pytest.mark.parametrize("made", PAGES, ids=lambda x: x.PAGE)
def test_a_page_is_what_the_source_says(made):
    on_disk = (ROOT / made.PAGE).read_text(encoding="utf-8")
    if on_disk != made.page():
        pytest.fail(f"{made.PAGE} is not that of the source: {AGAIN}")


# ---------------------------------------------------------------- keys


def test_every_key_says_what_it_means():
    silent = reference.without_comment()
    if silent:
        pytest.fail(f"write a comment behind or above these keys: {', '.join(silent)}")


def test_every_known_key_is_in_the_reference():
    """By Hydra's own reading of the files."""
    page = (ROOT / reference.PAGE).read_text(encoding="utf-8")
    known = known_keys()
    leaves = {x for x in known if not any(y.startswith(f"{x}.") for y in known)} - {""}
    leaves = {x for x in leaves if not set(x.split(".")) & OF_HYDRA}
    assert len(leaves) > 200
    written = set(re.findall(r"^(?:\| |## )`(.*?)`", page, re.M))
    assert leaves - written == set()


YAML = """\
# What the file is.
first: 1  # behind
# Above,
# in two lines.
second: 'a # b'
node:  # of a node
  third: [1, 2]  # a | b
  # Above. One of two:
  fourth: null  # behind, too
silent: 1
"""


def test_comments_are_found(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(YAML)
    found = {x.name: (x.value, x.comment) for x in reference.read(path, "group")}
    assert found == {
        "group.first": ("1", "behind"),
        "group.second": ("'a # b'", "Above, in two lines."),
        "group.node": ("", "of a node"),
        "group.node.third": ("[1, 2]", "a | b"),
        "group.node.fourth": ("null", "Above. One of two: behind, too"),
        "group.silent": ("1", ""),
    }


# ---------------------------------------------------------------- messages


def test_the_text_of_every_message_is_found():
    """But of those that are said elsewhere, which is written beside them."""
    places = [f"{x.file}:{x.line}" for x in errors.unresolved()]
    if places:
        pytest.fail(f"write the text into the call, or let it be found: {places}")


def test_every_message_names_a_cure():
    silent = [f"{x.file}:{x.line} {x.text}" for x in errors.without_cure()]
    if silent:
        pytest.fail(
            "say in the message what to do, or give it a row in "
            f"{errors.TROUBLESHOOTING}: {silent}"
        )


def test_every_config_error_is_on_the_page():
    """Counted without the code that finds them: each has a text or is passed on."""
    page = (ROOT / errors.PAGE).read_text(encoding="utf-8")
    passed = set(errors.PASSED_ON)
    found = {(x.file, x.line) for x in messages.messages(OF_COMMANDS) if x.text}
    for path in messages.files():
        module = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id == "ConfigError":
                assert (module, node.lineno) in found or module in passed
    assert page.count("\n- ") >= 400


def said(source: str) -> list[str]:
    """The texts of a function's last expression."""
    tree = ast.parse(textwrap.dedent(source))
    function = tree.body[-1]
    return texts_of(function.body[-1].value, Place("utils.py", function))


def test_texts_are_followed():
    assert said("def f(x):\n '' + f'{x} is {x.y!r}'") == ["<x> is <y>"]
    assert said("def f(x):\n a = 'one' if x else 'two'\n f'{a}: {g(x)}'") == [
        "one: <x>",
        "two: <x>",
    ]
    assert said("def f(x):\n one_line('a' 'b')") == ["ab"]
    assert said("def f(x):\n unknown_value(1, 2, 3)") == [
        "Unknown <key>=<value> (<where>). Choose from: <names>.",
        "Unknown <key>=<value>. Choose from: <names>.",
    ]
    assert said("def f(x):\n x") == []
