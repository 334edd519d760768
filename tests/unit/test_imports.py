"""Who imports whom, and that importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A package or module imports only from lower floors, and of its own. One that is not
# here fails the test.
FLOORS = {
    "utils": 1,
    "models": 2,
    "data": 2,
    "metrics": 3,
    "sampling": 3,
    "checkpoints": 3,
    "dataloader": 3,
    "training": 4,
    "report": 4,
    "integral": 5,
    "cli": 5,
    "trainer_base": 6,
    "diffusion": 7,
    "algo": 8,
    "distillation": 9,
    "evaluation": 9,
    "main": 10,
    "duo": 11,
}
TOP_LEVEL = {"algo", "dataloader", "main", "trainer_base", "utils"}
PACKAGES = sorted(FLOORS.keys() - TOP_LEVEL)
SOURCES = sorted(ROOT.glob("*.py"))
SOURCES += [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
COPIED = ROOT / "checkpoints" / "modeling"  # files that run by themselves elsewhere


def place_of(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Our packages and modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and path.parent != COPIED:
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module.split(".")[0])
    return found & FLOORS.keys()


def test_the_top_level_has_five_modules():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP_LEVEL


def test_every_package_has_its_floor():
    """One level of packages, each of which says in a line what it is."""
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert found == set(PACKAGES)
    for name in PACKAGES:
        text = (ROOT / name / "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(text)), name
    below = {path.parent for path in ROOT.glob("[a-z]*/*/__init__.py")}
    assert below == {COPIED}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_imports_only_go_down(path):
    here = place_of(path)
    for there in imports(path) - {here}:
        assert FLOORS[there] < FLOORS[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_files_are_of_a_readable_length(path):
    assert len(path.read_text().splitlines()) <= 520


def test_packages_that_must_not_meet():
    """Data and metrics know no network; samplers and metrics no data."""
    by_place: dict[str, set[str]] = {}
    for path in SOURCES:
        by_place.setdefault(place_of(path), set()).update(imports(path))
    assert by_place["utils"] == set()
    assert by_place["data"] <= {"data", "utils"}
    assert by_place["dataloader"] <= {"data", "utils"}
    assert by_place["models"] <= {"models", "utils"}
    assert by_place["metrics"] <= {"metrics", "models", "utils"}
    assert by_place["sampling"] <= {"models", "sampling", "utils"}
    for name in ("algo", "diffusion", "trainer_base"):
        assert not by_place[name] & {"dataloader", "cli", "main"}


def test_importing_everything_changes_nothing():
    """No resolver, no seed, no type, no heavy optional package, no output, no file."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
    ]
    code = f"""
import os, sys
import torch, lightning, torchmetrics
from omegaconf import OmegaConf
torch.manual_seed(7)
before = (os.environ.copy(), torch.random.get_rng_state(), torch.get_default_dtype())
theirs = set(sys.modules)
for name in {modules!r}:
    __import__(name)
own = ("cwd", "eval", "div_up", "device_count", "default_precision", "user_cache_dir")
assert not any(OmegaConf.has_resolver(name) for name in own)
assert dict(os.environ) == before[0]
assert torch.equal(torch.random.get_rng_state(), before[1])
assert torch.get_default_dtype() == before[2]
assert not torch.cuda.is_initialized()
heavy = [name for name in set(sys.modules) - theirs if name.split(".")[0] in
         ("wandb", "datasets", "lm_eval", "flash_attn", "mamba_ssm")
         or name.startswith("transformers.models.") and ".modeling_" in name]
assert not heavy, heavy
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
