"""Who imports whom, and that importing does nothing else."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lower layers never import higher ones. A module that is not here fails the test.
LAYERS = [
    {"harness"},
    {"main", "integral.__main__"},
    {"display", "distillation", "export", "generation", "report", "saving"},
    {"scoring", "sweep"},
    {"algo"},
    {"curriculum", "states"},
    {"diffusion"},
    {"trainer_base", "papers"},
    {"weights"},
    {"samplers", "metrics", "dataloader", "resume", "evaluations", "figures"},
    {"data_sets"},
    {"sources"},
    {"published", "rowstore", "streaming"},
    {"corpora"},
    {
        "chain",
        "checkpoints",
        "checks",
        "draws",
        "integral",
        "latents",
        "ngrams",
        "packing",
        "tokenization",
    },
    {"hub", "prompts", "psi"},
    {"models"},
    {"utils", "losses", "detokenizers"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
PACKAGES = ("integral", "models")
SOURCES = sorted(ROOT.glob("*.py"))
SOURCES += [path for name in PACKAGES for path in sorted(ROOT.glob(f"{name}/*.py"))]


def module_of(path: Path) -> str:
    package = path.parent.name
    if package not in PACKAGES:
        return path.stem
    return f"{package}.{path.stem}" if path.stem == "__main__" else package


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found.add(node.module.split(".")[0])
    return found & RANK.keys()


def test_every_module_has_its_layer():
    assert {module_of(path) for path in SOURCES} <= RANK.keys()


def test_an_installation_has_every_module():
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]
    assert set(listed["packages"]) == {*PACKAGES, "models.hub"}
    assert set(listed["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_imports_only_go_down(path):
    here = module_of(path)
    for there in imports(path) - {here}:
        assert RANK[there] > RANK[here], f"{here} imports {there}"


def test_layers_that_must_not_meet():
    """Data and losses know no algorithm; the harness, samplers and metrics no data."""
    by_name = {}
    for path in SOURCES:
        by_name.setdefault(module_of(path), set()).update(imports(path))
    assert by_name["utils"] == by_name["losses"] == set()
    assert by_name["corpora"] <= {"packing", "utils"}
    data = {"corpora", "data_sets", "detokenizers", "packing", "published", "rowstore"}
    data |= {"sources", "streaming", "tokenization", "utils"}
    assert set().union(*(by_name[name] for name in (*data, "dataloader"))) <= data
    assert by_name["samplers"] <= {
        "chain",
        "draws",
        "models",
        "prompts",
        "psi",
        "utils",
    }
    assert by_name["draws"] == set()
    assert by_name["metrics"] <= {"utils"}
    assert by_name["models"] <= {"models", "utils"}
    for name in ("algo", "diffusion", "trainer_base"):
        assert not by_name[name] & {"dataloader", "corpora", "main"}


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
