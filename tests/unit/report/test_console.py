"""Text that a screen would obey is printed as it is spelt, wherever it comes from."""

import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import utils
from checkpoints.card import card
from cli import environment
from report import console, formats, sweep

ROOT = Path(utils.__file__).parent
# Clears a screen, sets a title, rings, overwrites a line, turns the direction of
# letters, hides, ends a line for some, is markup, is an emoji to a library.
NASTY = (
    "a\x1b[2J\x1b]0;t\x07b\rc\x9b1m\u202egnp\u2066\u200b\ufeff\x7f[red]x[/red]:heart:"
)
SEEN = (
    r"a\x1b[2J\x1b]0;t\x07b\rc\x9b1m\u202egnp\u2066\u200b\ufeff\x7f[red]x[/red]:heart:"
)
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff]"
)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(console, "console", Console(width=400, emoji=False))


def seen(out: str) -> None:
    assert SEEN in out
    assert not OBEYED.search(out)


def test_lines_of_a_table(capsys):
    console.report_lines({"algorithm": NASTY, NASTY: "file"})
    seen(capsys.readouterr().out)


def test_samples_keep_their_lines_and_tabs(capsys):
    console.report_samples([f"one\ntwo\tthree {NASTY}"])
    out = capsys.readouterr().out
    assert "one\ntwo" in out
    seen(out)


def test_the_config(compose, tmp_path, capsys):
    """On the screen and in its file."""
    config = compose(f"checkpointing.save_dir={tmp_path}")
    config.sampling.prompt = "[red]x[/red]:heart:\x1b[2J\u202e"
    config.mode = NASTY
    config.print_config = True
    console.report_config(config, [])
    for out in (capsys.readouterr().out, (tmp_path / "config_tree.txt").read_text()):
        assert "[red]x[/red]:heart:" in out
        assert not OBEYED.search(out)


def test_names_of_files(compose, tmp_path, capsys):
    config = compose()
    config.eval.generated_samples_path = config.checkpointing.save_dir = NASTY
    results = {"num_samples": 1, "generative_ppl": None, "entropy": 1.0}
    console.report_sampling(config, results)
    seen(capsys.readouterr().out)
    console.report_files(config, SimpleNamespace(loggers=[]))
    seen(capsys.readouterr().out)


def test_a_sweep_and_a_report(tmp_path, capsys):
    numbers = {"entropy": 1.0, "refused": NASTY}
    jobs = [
        {"job": x, "overrides": {"a": f"{x}{NASTY}"}, "numbers": numbers}
        for x in (0, 1)
    ]
    sweep.write_summary(jobs, tmp_path)
    seen(capsys.readouterr().out)
    formats.print_table(formats.screen(), "t", ["model"], [[NASTY]])
    seen(capsys.readouterr().out)
    assert not OBEYED.search(formats.markdown(["a"], [[NASTY]]))
    assert not OBEYED.search(formats.latex("t", ["a"], [[NASTY]]))


def test_an_error_is_one_line(capsys):
    with pytest.raises(SystemExit):
        utils.fail(f"path={NASTY}\nb")
    (line,) = capsys.readouterr().err.splitlines()
    assert not OBEYED.search(line)
    assert r"\x1b[2J" in line


AS_USUAL = warnings.formatwarning  # what other tests run in this process changes it


def test_logs_and_warnings(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", AS_USUAL)
    as_it_was = logging.getLogRecordFactory(), warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{message}"
    try:
        environment.print_plainly()
        record = logging.getLogger("x").makeRecord(
            *("x", logging.INFO, "x.py", 1, "file %s", (NASTY,), None)
        )
        seen(logging.Formatter().format(record))
        seen(warnings.formatwarning(NASTY, UserWarning, "x.py", 1))
    finally:
        logging.setLogRecordFactory(as_it_was[0])
        warnings.formatwarning = as_it_was[1]


def test_a_model_card_is_no_place_for_markup():
    """Nor for code, beside the code that it shows."""
    bad = f"{NASTY}\n| a | `b` <img src=x>"
    names = ("algorithm", "process", "training_data", "model_length", "vocab_size")
    names += ("likelihood", "step", "weights", "validation_data", "val_ppl")
    names += ("causal", "time_conditioning")
    fields = dict.fromkeys(names, bad) | {"tokenizer": 'x"); import os; ("'}
    fields |= {"auto_map": {"AutoConfig": "a", "AutoModelForMaskedLM": "b"}}
    text = card(fields, 3, has_mask=False)
    assert not OBEYED.search(text)
    assert "<img" not in text
    assert 'x")' not in text


def test_printable_leaves_letters_alone():
    plain = "äß 漢字 नमस्ते n\u200cm \U0001f469\u200d\U0001f52c \\ [a] ~\n\t"
    assert utils.printable(plain) == plain
    assert utils.printable("a\nb", keep="") == r"a\nb"
    assert utils.printable("\ud800") == r"\ud800"
    assert utils.printable(3.5) == "3.5"


def test_nothing_else_prints():
    """Cells and lines go through `printable`, and `print` is used nowhere."""
    for path in ROOT.glob("*/*.py"):
        if path.parent.name in ("tests", "benchmarks") or path.name == "console.py":
            continue
        text = re.sub(r'"""(.|\n)*?"""', "", path.read_text())
        assert not re.search(r"(?<![.\w])print\(", text), path
        escaped = re.findall(r"(?<![.\w])escape\((.{10})", text)
        assert set(escaped) <= {"printable("}, path


# ---------------------------------------------------------------- paths and samples


LONG = "/a rather/long" * 30 + "/[x]/last.ckpt"


def test_a_path_is_whole_and_on_one_line(monkeypatch, capsys):
    """However narrow the screen."""
    monkeypatch.setattr(console, "console", Console(width=40, emoji=False))
    console.report_lines({"file": LONG, "a longer name": 3}, "title")
    assert capsys.readouterr().out.splitlines() == [
        "title",
        f"  file           {LONG}",
        "  a longer name  3",
    ]


def test_the_config_is_told_by_its_differences(compose, tmp_path, monkeypatch, capsys):
    """The file has all of it, each value on its line."""
    monkeypatch.setattr(console, "console", Console(width=40, emoji=False))
    config = compose(f"checkpointing.save_dir={tmp_path}")
    config.data.cache_dir = LONG
    console.report_config(config, ["mode=train", f"data.cache_dir={LONG}"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert "print_config=True" in title
    assert lines == ["  mode=train", f"  data.cache_dir={LONG}"]
    whole = (tmp_path / "config_tree.txt").read_text().splitlines()
    assert f"  cache_dir: {LONG}" in whole
    assert "optim:" in whole


@pytest.mark.parametrize(
    ("text", "given", "seen"),
    [
        ("[BOS]the cat sat", ["[BOS]the cat"], "⟦[BOS]the cat⟧ sat"),
        ("the x cat y", ["the ", " cat "], "⟦the ⟧x⟦ cat ⟧y"),
        ("aa.*b", ["a", ".*"], "⟦a⟧a⟦.*⟧b"),
        ("one\ntwo", ["one"], "⟦one⟧\ntwo"),
        ("the cat", [], "the cat"),
        ("the cat", [""], "the cat"),
        ("the cat", ["a dog"], "the cat"),  # of a decoder that joins across the end
    ],
)
def test_given_and_drawn_are_told_apart(text, given, seen):
    assert console.marked(text, given) == seen


def test_samples_without_prompts_have_no_signs(capsys):
    console.report_samples(["a b", "c"], [[], []])
    out = capsys.readouterr().out
    assert "a b" in out
    assert "⟦" not in out
