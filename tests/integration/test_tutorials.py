"""The tutorials: their files are those of examples/, which `test_plugins.py` runs, and
their commands work in the order of the pages; the notebook runs from top to bottom."""

import ast
import json
import re
import shutil

import nbformat
import pytest
from command_line import ROOT, run
from documented import PAGES, SMALLER, blocks, overrides_of, shell_lines

TUTORIALS = [x for x in PAGES if x.startswith("docs/tutorial_")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TOUR = ROOT / "examples/tour.ipynb"
# In this order a page finds what an earlier one has made.
ORDER = ("algorithm", "sampler", "backbone", "data", "distil", "table")
SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=2", "data.num_proc=1")


def test_every_tutorial_is_followed():
    assert set(TUTORIALS) == {f"docs/tutorial_{name}.md" for name in ORDER}


@pytest.mark.parametrize("page", [*TUTORIALS, "docs/extending.md"])
def test_files_are_those_of_examples(page):
    """Word for word, so that what is read is what is run."""
    for block in blocks(PAGES[page], "python"):
        name, _, content = block.partition("\n")
        path = ROOT / "examples" / name.removeprefix("# ").rpartition("/")[2]
        if path.name != "notebook.py":
            assert content == path.read_text(), path


def test_every_example_is_in_a_page():
    text = "\n".join(PAGES.values())
    assert [x.name for x in EXAMPLES if f"# {x.name}\n" not in text] == []
    assert len(EXAMPLES) == 6


def commands(page: str) -> list[str]:
    lines = shell_lines(PAGES[page])
    return [line for line in lines if line.startswith("python main.py")]


@pytest.mark.parametrize("page", TUTORIALS)
def test_commands_compose(page):
    """Every key and every name in them is there; in processes of their own, since
    plug-ins stay in the tables of the one that has imported them."""
    assert commands(page)
    for line in commands(page):
        words = [x for x in overrides_of(line) if x != "-m"]
        words = [re.sub(r"=([^\[',]*),[^\[]*$", r"=\1", x) for x in words]
        assert "mode: " in run(*words, "--cfg", "job", cwd=ROOT / "examples").stdout


# ---------------------------------------------------------------- as they are written


@pytest.mark.slow
def test_commands_work(tmp_path):
    """In one folder, cut to two steps of a small network."""
    for name in ORDER:
        for line in shell_lines(PAGES[f"docs/tutorial_{name}.md"]):
            if line.startswith("cp "):
                shutil.copy(ROOT / line.split()[1], tmp_path / line.split()[2])
            if line.startswith("python main.py"):
                follow(line, tmp_path)
    report = (tmp_path / "report/report.md").read_text()
    assert "My MDLM" in report
    assert "My DUO" in report


def follow(line: str, folder) -> None:
    words = overrides_of(line)
    if "mode=" not in line:  # of a recipe, which sets a larger network
        words += [x for x in SMALLER if "convolution" not in line or "heads" not in x]
        words += SHORT
    if "data=sums" in line:
        words += ["data.num_documents=300", "data.num_proc=1"]
    if "sample" in line:
        words = [x for x in words if not x.startswith("sampling.steps=")]
        words += ["sampling.steps=2", "loader.eval_batch_size=4"]
        words += ["sampling.num_sample_batches=1"]
    words += [] if "mode=report" in line else ["data.cache_dir=cache"]
    assert run(*words, cwd=folder).stdout


# ---------------------------------------------------------------- the notebook


def notebook():
    return nbformat.read(TOUR, as_version=4)


def test_the_notebook_is_one_without_outputs():
    """And its cells are Python; outputs would be of one machine, and large."""
    tour = notebook()
    nbformat.validate(tour)
    code = [x for x in tour.cells if x.cell_type == "code"]
    assert len(code) >= 7
    for cell in code:
        ast.parse(cell.source)
        assert (cell.outputs, cell.execution_count) == ([], None)
    assert TOUR.stat().st_size < 20_000


def test_links_of_the_notebook_lead_somewhere():
    text = json.dumps([x.source for x in notebook().cells if x.cell_type == "markdown"])
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) >= 3
    assert all((TOUR.parent / link).exists() for link in links)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell, cut to two steps, in a kernel that starts in examples/."""
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tour = notebook()
    for cell in tour.cells:
        cell.source = cell.source.replace("max_steps=300", "max_steps=2")
        cell.source = cell.source.replace("interval=300", "interval=2")
    resources = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(tour, timeout=300, resources=resources).execute()
    outputs = [x.get("outputs", []) for x in tour.cells if x.cell_type == "code"]
    said = json.dumps(outputs)
    for text in ("ppl", "return the ", "a character", "nats", "bounded "):
        assert text in said
    assert len(said) < 100_000
    (made,) = tmp_path.glob("tour-*")
    assert (made / "mdlm/checkpoints/last.ckpt").is_file()
