"""The documentation site builds without a warning, and needs no network to be read."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from command_line import ROOT
from documented import PAGES

# What a browser fetches by itself; links (`a`) are followed by readers only.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src"}


class Tags(HTMLParser):
    """Links, what is fetched, and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[x] for x in ("id", "name") if x in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") != "canonical":
            self.fetched.append(values.get("href", ""))
        if tag in FETCHED:
            self.fetched.append(values.get(FETCHED[tag], ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does."""
    (line,) = re.findall(r"-m (sphinx .*) \. build/docs$", MAKEFILE, re.M)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", *line.split(), ".", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


MAKEFILE = (ROOT / "Makefile").read_text()


def pages(site: Path) -> Iterator[tuple[Path, Tags]]:
    for path in sorted(site.rglob("*.html")):
        if "_static" not in path.parts:
            yield path, Tags(path.read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation(site):
    """A page that is in no list of docs/site/index.md fails the build."""
    built = {path.relative_to(site).as_posix() for path, _ in pages(site)}
    assert built >= {page.removesuffix(".md") + ".html" for page in PAGES}
    (start,) = re.findall(r"url=([^\"]+)\"", (site / "index.html").read_text())
    assert (site / start).is_file()


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = {x for _, tags in pages(site) for x in tags.fetched}
    assert len(fetched) >= 5
    assert {x for x in fetched if re.match(r"(https?:)?//", x)} == set()
    for path in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", path.read_text())
        assert [x for x in found if re.match(r"(https?:)?//", x)] == [], path


def test_links_lead_to_pages_and_places(site):
    anchors = {path: tags.anchors for path, tags in pages(site)}
    for path, tags in pages(site):
        for link in (x for x in tags.links if not re.match(r"[a-z]+:", x)):
            name, _, place = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), (path, link)
            if place and target.suffix == ".html":
                assert place in anchors[target], (path, link)
