"""The examples of CONTRIBUTING.md, put into a copy of the tree, work together and obey
the laws that every entry of a table is tested for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, TINY
from documented import blocks
from nursery import ENV
from stand_ins import write_documents

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
NEW = (
    *(
        "algo=hesitant",
        "algo.backbone=convolution",
        "noise=squared",
        "data=tinystories",
    ),
    *("data.tokenizer_name_or_path=bytes", "data.source=FILES"),
    *("model=convolution", "model.hidden_size=32", "model.length=32"),
)
# Of TINY what does not choose a data set or a network.
SMALL = [x for x in TINY if not x.startswith(("data", "model", "sampling.steps"))]


def place_of(block: str) -> tuple[str, str, str]:
    """File, table ('' for a whole piece of code) and content of an example."""
    head, _, content = block.partition("\n")
    found = re.fullmatch(r"# (?:([A-Z]+) in )?([\w/]+\.(?:py|yaml))", head)
    assert found, head
    return found[2], found[1] or "", content


def write_examples(tree: Path) -> set[str]:
    """Puts every example where it says; returns the files that are new."""
    examples = [
        place_of(block)
        for language in ("python", "yaml")
        for block in blocks(GUIDE, language)
    ]
    new = {name for name, _, _ in examples if not (tree / name).exists()}
    for name, table, content in examples:
        path = tree / name
        if name in new:
            path.write_text(content)
        elif table:
            entry = rf"^({table}\b[^=\n]*= \{{)"
            text, number = re.subn(
                entry, rf"\1\n{content}", path.read_text(), flags=re.M
            )
            assert number == 1, (name, table)
            path.write_text(text)
        else:  # in front of tables, which may name it
            before, start, rest = path.read_text().partition("\nSCHEDULES")
            path.write_text(f"{before}\n\n{content}\n\n{start}{rest}")
    return new


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the clone with the examples in it."""
    copy = tmp_path_factory.mktemp("tree") / "clone"
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "outputs", "multirun", "build"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    new = write_examples(copy)
    assert new == {
        "configs/algo/hesitant.yaml",
        "configs/data/tinystories.yaml",
        "configs/model/convolution.yaml",
        "configs/noise/squared.yaml",
        "models/convolution.py",
    }
    return copy


def start(tree: Path, folder: Path, *arguments: str) -> str:
    """What a program of the copy prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | ENV | {"PYTHONPATH": str(tree / "tests" / "support")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_examples_train_and_sample(tree, tmp_path):
    write_documents(tmp_path / "FILES")
    short = ("trainer.max_steps=4", "trainer.val_check_interval=4", "sampling.steps=4")
    main = str(tree / "main.py")
    said = start(tree, tmp_path, main, *NEW, *SMALL, *short, "hydra.run.dir=run")
    assert "val/ppl" in said
    said = start(
        *(tree, tmp_path, main, "mode=sample_eval", *NEW, *SMALL, *short),
        *("sampling.predictor=quadratic_grid", "loader.eval_batch_size=4"),
        "eval.checkpoint_path=run/checkpoints/last.ckpt",
        *("eval.gen_ppl_eval_model_name_or_path=null", "hydra.run.dir=samples"),
    )
    assert "entropy" in said


@pytest.mark.slow
def test_the_examples_obey_the_laws(tree):
    """Every law and every unit test that goes by a table or by the configs."""
    names = ["hesitant", "squared", "quadratic_grid", "convolution", "tinystories"]
    chosen = " or ".join([*names, "configs", "imports"])
    said = start(
        *(tree, tree, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-k", chosen),
        *("tests/property", "tests/unit"),
    )
    for name in names:
        assert re.search(rf"\[[^\]]*{name}[^\]]*\] PASSED", said), name
