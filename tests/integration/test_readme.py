"""Every command of the README runs, cut to a few steps of a small network; its example
of a new algorithm is written to files and trained."""

import re
import shlex
import subprocess

import pytest
from cli import ROOT, logged, run

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    set(re.findall(r"(?:PYTHONPATH=\. )?python main\.py [^`\n]+", README))
)
SMALLER = (
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.hidden_size=32",
    "trainer.accelerator=cpu",
)
SHORT = (
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "sampling.steps=2",
    "sampling.num_sample_batches=1",
    "loader.eval_batch_size=16",
)


def overrides_of(line: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index("main.py") + 1 :]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands expect: a corpus, a checkpoint, the example."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("to be or not to be, that is it. " * 400)
    code, yaml = (
        re.search(rf"```{language}\n(.*?)```", README, re.S)[1]
        for language in ("python", "yaml")
    )
    (folder / "my_algo.py").write_text(code)
    (folder / "my_configs" / "algo").mkdir(parents=True)
    (folder / "my_configs" / "algo" / "bounded.yaml").write_text(yaml)
    (line,) = [command for command in COMMANDS if "mode=ppl_eval" in command]
    kept = ("algo", "data", "model", "model.length")
    same = [x for x in overrides_of(line) if x.split("=")[0] in kept]
    run(
        *same,
        *SMALLER,
        *SHORT,
        "data.valid_fraction=0.01",
        "loader.global_batch_size=16",
        "eval.generate_samples=False",
        "hydra.run.dir=trained",
        cwd=folder,
    )
    (folder / "trained/checkpoints/last.ckpt").rename(folder / "last.ckpt")
    return folder


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs(line, workplace, request):
    overrides = overrides_of(line)
    evaluates = any(x.startswith("mode=") for x in overrides)
    smaller = [*SMALLER, f"hydra.run.dir=run{COMMANDS.index(line)}"]
    if evaluates:
        smaller.append(f"eval.checkpoint_path={workplace}/last.ckpt")
        smaller.append("loader.eval_batch_size=16")
        if "mode=sample_eval" in overrides:
            smaller.append("sampling.steps=2")
    else:
        smaller += SHORT
    if "data=text_files" in overrides:
        smaller.append(f"data.path={workplace}/corpus/*.txt")
        smaller.append(f"data.cache_dir={workplace}/cache")
    else:
        smaller.append("data.valid_fraction=0.01")
    pythonpath = workplace if line.startswith("PYTHONPATH=.") else None
    done = run(*overrides, *smaller, cwd=workplace, pythonpath=pythonpath)
    assert "sample 1" in done.stdout or "val/ppl" in done.stdout


def test_example_bounds_the_weight(workplace):
    """What the README claims of its example: a loss never above MDLM's."""
    losses = []
    for algorithm in ("bounded", "mdlm"):
        run(
            "hydra.searchpath=[file://my_configs]",
            f"algo={algorithm}",
            "data=synthetic",
            "data.num_train=64",
            "data.num_valid=64",
            "model=tiny",
            "model.length=32",
            "loader.global_batch_size=16",
            "eval.generate_samples=False",
            "trainer.num_sanity_val_steps=0",
            *SMALLER,
            *SHORT,
            f"hydra.run.dir=weight-{algorithm}",
            cwd=workplace,
            pythonpath=workplace,
        )
        losses.append(logged(workplace / f"weight-{algorithm}", "val/nll")[-1])
    assert losses[0] < losses[1]


def test_make_targets_exist():
    targets = set(re.findall(r"make ([a-z][a-z-]*)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        dry_run = ["make", "-n", target]
        subprocess.run(dry_run, cwd=ROOT, check=True, capture_output=True)
