"""Configs: every file composes, every key is read by code or listed as inert."""

import ast
import csv
import re
from itertools import takewhile
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SOURCES = [
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    if path.parent.name not in ("tests", "benchmarks")
]
INERT = ROOT / "tests" / "inert_keys.txt"
# Nodes that are handed over whole: to a class, to Hydra, or to wandb.
HANDED_OVER = ("callbacks", "logger", "lr_scheduler", "strategy", "trainer")
HANDED_OVER += ("hydra", "wandb")
GROUPS = sorted(
    tuple(str(path.relative_to(CONFIGS).with_suffix("")).split("/", maxsplit=1))
    for path in CONFIGS.glob("*/**/*.yaml")
    # The sizes of the scaling study differ in numbers that a test of theirs checks.
    if not path.stem.startswith("_") and not re.fullmatch(r"\d+M", path.stem)
)

# ---------------------------------------------------------------- composition


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_file_composes(compose, group, name):
    """With the rest at its default, and with no value missing."""
    choice = f"[{name}]" if group == "callbacks" else name
    config = compose(f"{group}={choice}", tiny=False)
    assert "???" not in OmegaConf.to_yaml(config, resolve=False)


@pytest.mark.parametrize(
    ("group", "name"), [pair for pair in GROUPS if pair[0] in ("callbacks", "strategy")]
)
def test_instantiated_files_name_real_arguments(compose, group, name, tmp_path):
    """Callbacks and strategies can be built from their files alone."""
    choice = f"[{name}]" if group == "callbacks" else name
    save_dir = f"checkpointing.save_dir={tmp_path}"
    config = compose(f"{group}={choice}", save_dir)
    nodes = [config.strategy] if group == "strategy" else config.callbacks.values()
    for node in nodes:
        built = hydra.utils.instantiate(node)
        assert type(built).__name__ == node._target_.rsplit(".", 1)[1]


def test_published_samples_have_the_judge_of_the_papers(compose):
    """By name; else a default command would begin to download it."""
    folder = CONFIGS / "experiment"
    texts = {path: path.read_text() for path in folder.rglob("*.yaml")}
    drawn = [path for path, text in texts.items() if "mode: sample_eval" in text]
    assert len(drawn) >= 16
    for path in drawn:
        name = str(path.relative_to(folder).with_suffix(""))
        config = compose(f"experiment={name}", tiny=False)
        judge = None if name.startswith("demo") else "gpt2-large"
        assert config.eval.gen_ppl_eval_model_name_or_path == judge
    assert compose(tiny=False).eval.gen_ppl_eval_model_name_or_path is None


def test_defaults_are_the_published_ones(compose):
    """What the published commands rely on when they leave a key out."""
    published = {
        "algo.name": "duo_base",
        "noise.type": "log-linear",
        "training.ema": 0.9999,
        "training.sampling_eps": 1e-3,
        "training.antithetic_sampling": True,
        "optim.lr": 3e-4,
        "optim.beta1": 0.9,
        "optim.beta2": 0.999,
        "trainer.gradient_clip_val": 1.0,
        "trainer.max_steps": 1_000_000,
        "sampling.predictor": "ancestral",
        "sampling.noise_removal": "ancestral",
        "sampling.use_float64": True,
        "sampling.p_nucleus": 1.0,
        "sampling.semi_ar": False,
        "sampling.steps": 1000,
        "seed": 1,
    }
    config = compose(tiny=False)
    assert {key: OmegaConf.select(config, key) for key in published} == published


@pytest.mark.parametrize(
    ("overrides", "batch_size", "accumulate"),
    [
        (["loader.global_batch_size=512"], 512, 1),
        (["loader.global_batch_size=512", "loader.batch_size=64"], 64, 8),
        (["loader.global_batch_size=512", "trainer.devices=4"], 128, 1),
        (
            [
                "loader.global_batch_size=512",
                "trainer.devices=4",
                "trainer.num_nodes=2",
                "loader.batch_size=16",
            ],
            16,
            4,
        ),
    ],
)
def test_batches_follow_from_the_global_one(compose, overrides, batch_size, accumulate):
    config = compose(*overrides)
    assert config.loader.batch_size == batch_size
    assert config.trainer.accumulate_grad_batches == accumulate


# ---------------------------------------------------------------- keys


def leaves(node: DictConfig, path: str = "") -> list[str]:
    """Dotted keys of a node, those handed over whole left out."""
    found = []
    for key in node:
        child = node._get_node(key)
        dotted = f"{path}.{key}" if path else str(key)
        if key in ("defaults", "_target_") or dotted in HANDED_OVER:
            continue
        if isinstance(child, DictConfig) and not child._is_interpolation():
            found += leaves(child, dotted)
        else:
            found.append(dotted)
    return found


def configured_keys() -> set[str]:
    """Dotted keys of every YAML file, as they are after composition."""
    keys = set()
    for path in CONFIGS.rglob("*.yaml"):
        group = path.relative_to(CONFIGS).parts[0]
        if group in HANDED_OVER:
            continue
        root = "" if group in ("config.yaml", "experiment") else group
        keys |= set(leaves(OmegaConf.load(path), root))
    return keys


class Reads(ast.NodeVisitor):
    """What a source file could read from a config.

    `config.key` and `group.key` chains, strings that are a key or a dotted path, and
    f-strings as patterns. Docstrings do not count. Outside of models/, a variable
    called model is a network, not the config's group.
    """

    def __init__(self):
        self.chains, self.strings, self.patterns = set(), set(), set()
        self.networks = set()

    def visit_file(self, path):
        self.networks = set() if path.parent.name == "models" else {"model"}
        self.visit(ast.parse(path.read_text()))

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Attribute(self, node):
        variable = getattr(node.value, "id", None)
        base = getattr(node.value, "attr", variable)
        if variable not in self.networks:
            self.chains.add((base, node.attr))
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.strings.add(node.value)

    def visit_JoinedStr(self, node):
        parts = [
            re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+"
            for part in node.values
        ]
        self.patterns.add("".join(parts))
        self.generic_visit(node)


@pytest.fixture(scope="module")
def reads():
    visitor = Reads()
    others = ("huggingface.py", "values.py")  # fields of other files; kinds of values
    for path in SOURCES:
        if path.name not in others:
            visitor.visit_file(path)
    return visitor


def interpolated() -> set[str]:
    """Keys that other values are made from, ${...}."""
    text = "\n".join(path.read_text() for path in CONFIGS.rglob("*.yaml"))
    return set(re.findall(r"\$\{[^}]*?\.?(\w+)\}", text))


def is_read(key: str, reads: Reads) -> bool:
    *_, group, name = ("config", *key.split("."))
    return (
        {(group, name), ("config", name)} & reads.chains
        or {key, name} & reads.strings
        or any(re.fullmatch(p, name) for p in reads.patterns if p.strip(r"\w+"))
        or name in interpolated()
    )


def inert_keys() -> dict[str, str]:
    """Dotted key -> why it is there."""
    lines = INERT.read_text().splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    return dict(re.split(r"\s{2,}|\t", entry, maxsplit=1) for entry in entries)


def test_every_key_is_read_or_listed(reads):
    """A key that nothing reads is a promise that nothing keeps."""
    unread = {key for key in configured_keys() if not is_read(key, reads)}
    assert unread - inert_keys().keys() == set()


def test_the_list_is_up_to_date(reads):
    """Each listed key is in some config, has a reason, and is still unread."""
    inert = inert_keys()
    assert inert.keys() - configured_keys() == set()
    assert [key for key, reason in inert.items() if len(reason) < 10] == []
    assert [key for key in inert if is_read(key, reads)] == []


def test_the_search_tells_read_from_unread(reads):
    assert is_read("sampling.steps", reads)
    assert is_read("data.insert_valid_eos", reads)
    assert not is_read("sampling.stepz", reads)
    assert not is_read("made.up", reads)
    assert is_read("model.n_blocks", reads)  # models/dit.py: model = config.model
    assert not is_read("model.valid_results", reads)  # the network's own


# ---------------------------------------------------------------- experiments

EXPERIMENTS = [name for group, name in GROUPS if group == "experiment"]


def head(path: Path) -> list[str]:
    """The comment lines with which a config file begins, without their signs."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return [line.removeprefix("#").strip() for line in lines]


def entries(experiment: str) -> dict[str, str]:
    """What the head of an experiment says of its command, cost, expected numbers."""
    lines = head(CONFIGS / "experiment" / f"{experiment}.yaml")
    assert lines[0] == "@package _global_"
    text = " ".join(line.removesuffix("\\").strip() for line in lines[1:])
    _, *parts = re.split(r"\b(command|cost|expected|sources): +", text)
    return {name: value.strip() for name, value in batched(parts)}


def batched(parts: list[str]) -> list[tuple[str, str]]:
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_of_an_experiment_is_there(compose, name):
    """Its script, if there is one, and a command that composes."""
    said = entries(name)["command"]
    words = said[said.index("python main.py ") :].split()[2:]
    words = [word for word in words if word != "-m"]
    assert f"experiment={name}" in words
    compose(*(word.split(",")[0] for word in words), tiny=False)
    if not name.startswith(("demo", "small_text", "toy")):  # these are of no paper
        (script,) = re.findall(r"scripts/\S+\.sh", said)
        assert script == f"scripts/{name}.sh"
        assert (ROOT / script).exists()


PUBLISHED = list(csv.DictReader((ROOT / "report/published_results.csv").open()))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_expected_numbers_have_a_source(name):
    """Numbers are followed by where they stand: in the table of published results,
    whose labels it uses, or in a README.md. Otherwise it says that none is stated."""
    said = entries(name)
    assert said["cost"]
    found = re.findall(r"([^()]*)\(([^()]*)\)", said["expected"])
    numbers = [(re.findall(r"\d+\.\d+", text), source) for text, source in found]
    assert any(values for values, _ in numbers) or "not stated" in said["expected"]
    for values, source in numbers:
        if source.endswith("README.md"):
            words = re.findall(r"\d+\.\d+", (ROOT / source).read_text())
            assert set(values) <= set(words)
        else:
            sources = {source, *source.split(", ")}
            known = {row["value"] for row in PUBLISHED if row["source"] in sources}
            assert set(values) <= known
            assert "docs/reproduce.md" in said["sources"]
    rest = re.sub(r"[^()]*\([^()]*\)", "", said["expected"])
    assert not re.search(r"\d+\.\d+", rest)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda x: x.stem)
def test_every_file_says_what_it_is(path):
    """In a comment at its head; of a data set also which text it is trained and
    validated on."""
    text = " ".join(head(path)).removeprefix("@package _global_")
    assert len(text) >= 30
    if path.parent.name == "data" and not path.stem.startswith("_"):
        assert re.search(r"\b[Tt]rain", text)
        assert re.search(r"\b[Vv]alidat", text)
