"""What people do with models of transformers, done with exports in several versions of
it; docs/checkpoints.md holds the table of the results."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import uses
from exported import export, save_tiny

ROOT = Path(__file__).parents[2]
MODELS = {
    "masked": ("algo=mdlm",),
    "causal": ("algo=ar",),
    "uniform": ("algo=duo_base",),
    "blocks": ("algo=mdlm", f"algo.block_size={uses.SIZE}"),
}
SIZES = ("data.tokenizer_name_or_path=bytes", "model.length=32", "model.dropout=0.1")
# By column of the table. The old ones are the newest that fit to their transformers.
VERSIONS = {
    "4.38": ("transformers==4.38.2", "accelerate==0.27.2", "peft==0.13.2", "numpy<2"),
    "4.57": ("transformers>=4.57,<4.58", "accelerate", "peft"),
    "5": ("transformers>=5", "accelerate", "peft"),
}
# A folder in which their environments are kept, by column; without, they are made anew.
KEPT = "EXPORT_VENVS"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("uses")
    for kind, settings in MODELS.items():
        save_tiny(root / kind / "a.ckpt", *settings, *SIZES)
        export(root / kind / "a.ckpt", root / kind / "folder")
    return {kind: str(root / kind / "folder") for kind in MODELS}


def results_under(python: str, folders: dict[str, str], cwd: Path) -> dict[str, str]:
    """What each use comes to with an interpreter."""
    (cwd / "work").mkdir()
    inputs = folders | {"work": str(cwd / "work")}
    (cwd / "folders.json").write_text(json.dumps(inputs))
    env = {k: x for k, x in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"}
    words = (python, "-I", uses.__file__, "folders.json", "results.json")
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((cwd / "results.json").read_text())
    print(found["versions"])  # noqa: T201
    return found["results"]


def table() -> dict[str, dict[str, str]]:
    """Use -> version -> cell, as documented."""
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    head = "| use | " + " | ".join(VERSIONS) + " |\n"
    _, _, rest = text.partition(head)
    rows = {}
    for line in rest.splitlines()[1:]:
        if not line.startswith("|"):
            break
        title, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[title] = dict(zip(VERSIONS, cells, strict=True))
    return rows


def test_the_table_has_all_uses():
    found = table()
    assert list(found) == list(uses.USES)
    cells = [cell for row in found.values() for cell in row.values()]
    assert all(cell == "ok" or re.fullmatch(r"no: \w.+", cell) for cell in cells)


def test_uses_with_the_packages_of_this_project(folders, tmp_path):
    """Which are transformers alone where accelerate and peft are not installed."""
    results = results_under(sys.executable, folders, tmp_path)
    bad = {title: x for title, x in results.items() if not re.match(r"ok$|no \w", x)}
    assert not bad


def environment(name: str, tmp_path: Path) -> str:
    """The interpreter of a column's environment."""
    kept = os.environ.get(KEPT)
    folder = Path(kept) / name if kept else tmp_path / "venv"
    python = folder / "bin" / "python"
    if python.exists():
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--retries", "1"]
    version = torch.__version__.split("+")[0]
    for wanted in ([f"torch=={version}"], [*VERSIONS[name], "safetensors"]):
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(f"pip cannot install {' '.join(wanted)}: {reason}")
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_uses_by_version(version, folders, tmp_path):
    """As the table says, in an environment of its own."""
    results = results_under(environment(version, tmp_path), folders, tmp_path)
    expected = {title: cells[version] == "ok" for title, cells in table().items()}
    assert {title: x == "ok" for title, x in results.items()} == expected, results
