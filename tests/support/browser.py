"""A real Chromium without a screen, for tests of pages; make test-browser."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


def reason_to_skip() -> str | None:
    """Why no browser can be started here; None if one can."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    if _program() is None:
        return f"{' or '.join(PROGRAMS)} not found: apt-get install chromium"
    return None


def _program() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def running() -> Iterator[Any]:
    """A browser, to open contexts in."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        # Tests may run as root, where the sandbox cannot be.
        browser = tools.chromium.launch(
            executable_path=_program(), args=["--no-sandbox"]
        )
        yield browser
        browser.close()
