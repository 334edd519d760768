"""Bars that nobody sees are lines."""

import io
import sys
import time

from data import progress


class Screen(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def test_a_pipe_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    monkeypatch.setattr(progress, "QUIET", 0.05)
    for _ in progress.progress(range(30), "reading"):
        time.sleep(0.01)
    lines = sys.stderr.getvalue().splitlines()
    assert 1 <= len(lines) <= 10
    assert all(line.startswith("reading: ") for line in lines)
    assert not any(x in sys.stderr.getvalue() for x in "\r\x1b")


def test_what_is_quickly_done_says_nothing_in_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(False))
    assert list(progress.progress(range(30), "reading")) == list(range(30))
    assert sys.stderr.getvalue() == ""


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(True))
    bar = progress.progress(None, "reading", total=3, file=sys.stderr)
    bar.update(3)
    assert "\rreading: " in sys.stderr.getvalue()
    bar.close()
