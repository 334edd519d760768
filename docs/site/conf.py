"""The documentation site: `make docs` builds it from the pages as GitHub shows them.

The source folder is the repository, so that links between pages are those of GitHub.
The pages need no network when they are read: no fonts, scripts or pictures of others.
"""

from pathlib import Path

from sphinx.application import Sphinx

START = "docs/site/index"

project = "Discrete diffusion language models"
author = copyright = "The contributors"
root_doc = START
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("docs/*.md", "docs/site/index.md", "benchmarks/*.md", "scripts/README.md"),
]
exclude_patterns = [".*", "build", "outputs", "multirun", "wandb", "tests"]
extensions = ["myst_parser"]
myst_heading_anchors = 4  # with the names that GitHub gives them
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False


def write_start(app: Sphinx, error: Exception | None) -> None:
    """The site's first address leads to its first page."""
    if error is None:
        page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{project}</title>
<meta http-equiv="refresh" content="0; url={START}.html">
<a href="{START}.html">{project}</a>
</html>
"""
        Path(app.outdir, "index.html").write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", write_start)
