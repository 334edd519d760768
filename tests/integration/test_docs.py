"""What README.md and the pages of docs/ say of files, keys, names and messages is so;
their commands are run by `test_readme.py`."""

import ast
import pkgutil
import re
from collections.abc import Iterator

import pytest
from command_line import ROOT
from documented import PAGES, blocks, code_spans
from omegaconf import OmegaConf

from benchmarks import plot_demo
from cli.known_keys import known_keys
from cli.older_keys import OLDER_KEYS
from data.published import Corpus, Source

CONFIGS = ROOT / "configs"


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in (x for x in links if not x.startswith("http")):
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in map(slug, headings), link


def test_the_index_and_the_readme_list_every_page():
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    for page in pages - {"README.md"}:
        assert f"({page})" in PAGES["docs/README.md"]
        assert f"(docs/{page})" in PAGES["README.md"]


# Older names, which are translated and need not be in a config.
OLDER = set(OLDER_KEYS)
GROUPS = {"algo", "checkpointing", "data", "eval", "export", "loader", "lr_scheduler"}
GROUPS |= {"callbacks", "model", "noise", "optim", "report", "sampling", "strategy"}
GROUPS |= {"trainer", "training"}
WEIGHTS = ("model.bimamba.", "model.lm_head.")  # names of weights of DiMamba
SUFFIXES = {"md", "csv", "png", "pdf", "tex", "json", "yaml", "py", "safetensors"}


@pytest.mark.parametrize("page", [x for x in PAGES if x != "docs/errors.md"])
def test_keys_exist(page):
    """Every `group.key` or `group.key=value` in the text; messages name others, too."""
    known = known_keys() | OLDER
    spans = (
        re.match(r"([a-z_]+(\.[a-zA-Z0-9_]+)+)(=|$)", x)
        for x in code_spans(PAGES[page])
    )
    names = {x[1] for x in spans if x and x[1].split(".")[0] in GROUPS}
    names = {x for x in names if x.rsplit(".")[-1] not in SUFFIXES} - known
    names = {x for x in names if not x.startswith(WEIGHTS)}
    for name in sorted(names):  # else it is a class of algo.py
        assert pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    form = re.compile(r"[\w./-]+/[\w.-]+\.(py|md|csv|yaml|sh|pkl|npz)")
    paths = {x for x in code_spans(PAGES[page]) if form.fullmatch(x)}
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_names_on_the_path_from_script_to_equation_exist():
    spans = code_spans(PAGES["docs/from_script_to_equation.md"])
    names = {x for x in spans if re.fullmatch(r"[a-z_]+(\.\w+)+", x)}
    roots = {"algo", "diffusion", "evaluation", "metrics", "models", "trainer_base"}
    names = {x for x in names if x.split(".")[0] in roots}
    assert len(names) >= 12
    for name in names:
        assert pkgutil.resolve_name(name) is not None
    number = "test_ppl,Duo,OWT,,,ppl,25.2,D1 T1,,"
    assert number in spans
    assert number in (ROOT / "report/published_results.csv").read_text()


def test_an_equation_is_that_of_the_docstring():
    """The page writes xbar_theta(y) with p; the docstring says `likewise with p`."""
    from algo import DUO_BASE

    said = " ".join(DUO_BASE.nll_per_token.__doc__.split())
    page = PAGES["docs/from_script_to_equation.md"]
    page = " ".join(page.replace("x_t", "xt").replace("alpha_t'", "dalpha_t").split())
    for part in (
        "dalpha_t / (K alpha_t) * [ K / xbar(xt) - K / xbar_theta(xt)",
        "- sum_y xbar(y) / xbar(xt) log",
    ):
        assert part in said
        assert part in page


PACKAGES = (
    *("checkpoints", "cli", "data", "diffusion", "distillation", "evaluation"),
    *("integral", "metrics", "models", "report", "sampling", "training"),
)
OF_TORCH = {"CUDA out of memory"}


def texts_of_the_code() -> Iterator[str]:
    """All text constants of the library, each in one line, values left out."""
    files = [
        *ROOT.glob("*.py"),
        *(x for p in PACKAGES for x in (ROOT / p).rglob("*.py")),
    ]
    for node in (node for x in files for node in ast.walk(ast.parse(x.read_text()))):
        if isinstance(node, ast.JoinedStr):
            parts = (x.value for x in node.values if isinstance(x, ast.Constant))
            yield " ".join("\0".join(parts).split())
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split())


def test_messages_are_those_of_the_code():
    """The first column of the page's tables quotes them, without values."""
    page = PAGES["docs/troubleshooting.md"]
    quoted = set(re.findall(r"^\| `([^`]+)` \|", page, re.M)) - OF_TORCH
    assert len(quoted) >= 25
    code = "\n".join(texts_of_the_code())
    assert {x for x in quoted if x not in code} == set()


def test_the_example_of_a_data_set():
    (code,), (yaml,) = (blocks(PAGES["docs/data.md"], x) for x in ("python", "yaml"))
    corpora = {}
    exec(code, {"CORPORA": corpora, "Corpus": Corpus, "Source": Source})
    config = OmegaConf.create(yaml)
    assert list(corpora) == [config.train] == [config.valid]
    assert all((CONFIGS / "data" / f"{x}.yaml").exists() for x in config.defaults[:1])


def test_the_picture_shows_the_table_of_the_readme(tmp_path):
    readme = PAGES["README.md"]
    curves = plot_demo.read_curves(readme)
    assert [curve.label for curve in curves] == ["DUO", "DUO, distilled"]
    for curve in curves:
        assert curve.steps == [8, 64]
        cells = zip(curve.perplexities, curve.errors, strict=True)
        row = " | ".join(f"{value} ± {error}" for value, error in cells)
        assert f"| {curve.label} | {row} |" in readme
    plot_demo.draw(curves, plot_demo.read_held_out(readme), tmp_path / "demo.png")
    for path in (tmp_path / "demo.png", plot_demo.FIGURE):
        assert 5_000 < path.stat().st_size < 60_000
