"""Numbers and tables as text."""

import io

from rich.console import Console

from report.formats import (
    difference,
    latex,
    print_table,
    screen,
    short_paths,
)


def test_differences_have_the_digits_of_the_paper():
    assert difference(25.51, "25.2") == "+0.3"
    assert difference(5.5, "5.57") == "-0.07"
    assert difference(25.1999, "25.2") == "+0.0"
    assert difference(80.4, "80") == "+0"


def test_latex_needs_no_package_and_no_letter_means_something():
    text = latex("50 % & more", ["model", "a_b"], [["x^y\\z {$#}", "1.0 ± 0.1†"]])
    assert r"50 \% \& more" in text
    assert r"a\_b" in text
    assert r"x\textasciicircum{}y\textbackslash{}z \{\$\#\}" in text
    assert r"1.0 $\pm$ 0.1$\dagger$ \\" in text
    assert r"\begin{tabular}{lr}" in text
    assert text.count(r"\hline") == 3


def test_paths_lose_what_they_share():
    """In front and behind; a value that is no path stays whole."""
    paths = ["/a/b/one/last.ckpt", "/a/b/two/x/last.ckpt"]
    assert short_paths(paths) == ["one", "two/x"]
    assert short_paths(["a/b", "a/b/c"]) == [".", "c"]
    assert short_paths(["8", "64"]) == ["8", "64"]
    assert short_paths(["a/b", None]) == ["a/b", None]


# ---------------------------------------------------------------- the screen

HEADER = ["model", "steps", *(f"metric_{i}" for i in range(9))]
LINES = [[f"model {i}", "8", *["133.5 ± 5.1"] * 9] for i in range(3)]


def printed(width: int, lines=LINES, header=HEADER) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, emoji=False)
    print_table(console, "t [b]", header, lines, keys=2)
    return file.getvalue().splitlines()


def test_a_table_that_is_too_wide_goes_on_below():
    """No line is longer than the terminal, no cell folded; each part has its keys."""
    lines = printed(80)
    assert all(len(line) <= 80 for line in lines)
    assert sum("model 1" in line for line in lines) == 3
    assert sum(line.count("133.5 ± 5.1") for line in lines) == 27
    assert sum("t [b]" in line for line in lines) == 1
    assert "…" not in "".join(lines)


def test_keys_without_room_are_folded_and_not_cut():
    name = "a name of " + "very " * 30 + "many words"
    text = "".join(printed(60, [[name, "8", "1.0"]], ["model", "steps", "ppl"]))
    assert "…" not in text
    for word in name.split():
        assert word in text


def test_what_is_piped_is_not_cut(capsys):
    """However wide, and whatever COLUMNS says."""
    print_table(screen(), "t", ["model", *HEADER[2:]], [["x" * 300, *LINES[0][2:]]])
    out = capsys.readouterr().out
    assert "x" * 300 in out
    assert sum("133.5 ± 5.1" in line for line in out.splitlines()) == 1
