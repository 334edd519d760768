"""What README.md and the pages of docs/ say of files, keys, names and messages is so;
their commands are run by `test_readme.py`."""

import ast
import pkgutil
import re
import subprocess
from collections.abc import Iterator

import pytest
from command_line import ROOT
from documented import PAGES, blocks, code_spans
from omegaconf import OmegaConf

from benchmarks import plot_demo
from cli.known_keys import known_keys
from cli.mdlm import from_mdlm
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
# Settings of the parts in examples/, which the tutorials enter.
OF_EXAMPLES = {"algo.max_weight", "data.num_documents", "model.kernel_size"}
OF_EXAMPLES |= {"sampling.power_grid.exponent"}
GROUPS = {"algo", "checkpointing", "data", "eval", "export", "loader", "lr_scheduler"}
GROUPS |= {"callbacks", "model", "noise", "optim", "report", "sampling", "strategy"}
GROUPS |= {"trainer", "training"}
WEIGHTS = ("model.bimamba.", "model.lm_head.")  # names of weights of DiMamba
SUFFIXES = {"md", "csv", "png", "pdf", "tex", "json", "yaml", "py", "safetensors"}


@pytest.mark.parametrize("page", [x for x in PAGES if x != "docs/errors.md"])
def test_keys_exist(page):
    """Every `group.key` or `group.key=value` in the text; messages name others, too."""
    known = known_keys() | OLDER | OF_EXAMPLES
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


# ---------------------------------------------------------------- blocks of code

# By language: where the blocks of a page are run; "" stands for all other pages.
RUN_BY = {
    "bash": {"": "test_readme.py"},
    "sh": {"docs/gpu.md": "test_docs.py"},
    "python": {
        "README.md": "../support/documented.py",
        "CONTRIBUTING.md": "test_contributing.py",
        "docs/block_diffusion.md": "../unit/checkpoints/test_export_blocks.py",
        "docs/data.md": "test_docs.py",
        "docs/extending.md": "test_plugins.py",
        **{x: "test_tutorials.py" for x in PAGES if x.startswith("docs/tutorial_")},
    },
    "yaml": {"CONTRIBUTING.md": "test_contributing.py", "docs/data.md": "test_docs.py"},
    "text": {"docs/from_mdlm.md": "test_docs.py"},
    "bibtex": {"README.md": "test_docs.py"},
    "": {"": "outputs, which are not code"},
}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_block_of_code_is_run(page):
    text = (ROOT / page).read_text()
    fences = re.findall(r"^ *```(\w*)", text, re.M)
    for language in fences[::2]:  # the others end a block
        places = RUN_BY[language]
        assert page in places or "" in places, language
        file = places.get(page, places.get("", ""))
        if file.endswith(".py"):
            name = page.removesuffix(".md").partition("_")[0]
            known = (ROOT / "tests/integration" / file).read_text()
            assert name in known or "PAGES" in known, file


@pytest.mark.parametrize("page", [x for x in PAGES if "sh\n" in PAGES[x]])
def test_shell_can_be_parsed(page):
    for block in (*blocks(PAGES[page], "bash"), *blocks(PAGES[page], "sh")):
        done = subprocess.run(["bash", "-n"], input=block, text=True, check=False)
        assert done.returncode == 0, block


def test_wheels_for_a_gpu_without_a_network_are_those_of_the_pins():
    """The download itself needs a network."""
    (block,) = blocks(PAGES["docs/gpu.md"], "sh")
    pins = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", REQUIREMENTS, re.M))
    for name, version in re.findall(r"'([\w-]+)==([\d.]+)\.(?:\*|\d+)'", block)[:2]:
        assert pins[name] == version


REQUIREMENTS = (ROOT / "requirements.txt").read_text()


def test_the_note_on_a_spelling_of_mdlm(caplog):
    (block,) = blocks(PAGES["docs/from_mdlm.md"], "text")
    with caplog.at_level("INFO"):
        from_mdlm(["parameterization=sedd"])
    assert block.strip() in caplog.text


def test_the_papers_to_cite_are_those_of_the_citation():
    (block,) = blocks(PAGES["README.md"], "bibtex")
    eprints = re.findall(r"eprint += \{([\d.]+)\}", block)
    citation = (ROOT / "CITATION.cff").read_text()
    assert len(eprints) >= 7
    assert block.count("{") == block.count("}")
    assert [
        x for x in eprints if x not in citation and x not in PAGES["README.md"]
    ] == []
    assert all(block.count(x) == 1 for x in eprints)


# ---------------------------------------------------------------- the map of objectives


def test_the_map_leads_from_objective_to_class_and_test():
    """Every file of configs/algo has a row, with the class that it names and tests
    that speak of it."""
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|.*\|$", ALGORITHMS, re.M)
    targets = {
        path.stem: OmegaConf.load(path)._target_
        for path in (CONFIGS / "algo").glob("*.yaml")
    }
    assert dict(rows) == targets
    for name, target in rows:
        (row,) = re.findall(rf"^\| `{name}` \| .*$", ALGORITHMS, re.M)
        tests = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert len(tests) >= 2
        spoken = "\n".join((ROOT / test).read_text() for test in tests)
        words = (name, target.rpartition(".")[2], "diffusion_name")
        assert any(word in spoken for word in words)
        assert callable(pkgutil.resolve_name(target))


ALGORITHMS = PAGES["docs/algorithms.md"]


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
