"""Every command of README.md and docs/ runs, cut to a few steps of a small network; the
README's example of a new algorithm is written to files and trained.

Commands of sbatch need Slurm: `test_slurm.py` requeues a run of main.py as `sbatch
--wrap` of README.md does, `test_slurm_scripts.py` gives scripts of scripts/ to a real
sbatch, and `test_scripts.py` runs every script for two steps as sbatch would. The
options that the pages give to lm_eval are run by `test_harness_runs.py`.
"""

import re
import shlex
import subprocess

import hydra
import pytest
import torch
from command_line import ROOT, logged, run
from documented import (
    CHECKPOINT,
    PAGES,
    SHORT,
    SMALLER,
    commands,
    kinds_of,
    main_commands,
    overrides_of,
    shell_lines,
    write_released_models,
    write_workplace,
)
from recorder import record
from released import SIZES

import main
from cli.commandline import find_inputs, quoted
from cli.stated import take_over, without
from data.tokenizers import get_tokenizer
from evaluation import harness
from evaluation.samples import sample_eval
from integral.__main__ import main as make_table
from models.registry import validate_backbone
from report.mode import jobs_of

README = PAGES["README.md"]
# Of paths, which test_first_model.py and test_tutorials.py walk.
PATHS = [x for x in PAGES if x == "docs/first_model.md" or "/tutorial_" in x]
WALKED = commands("main", *PATHS)
COMMANDS = [x for x in main_commands() if x not in WALKED]
# Of these the network is that of a released model, which is made small for the test.
RELEASED = [
    x
    for x in COMMANDS
    if "gpt2" in x or "path=runs/mine" in x or ("duo.ckpt" in x and "report." not in x)
]
# A trained model of its own, and the command that samples from it.
QUICK_START = [x for x in RELEASED if "=runs/mine" in x]
EVALUATING = [x for x in COMMANDS if "+report.checkpoints." in x]
RANKS = [x for x in COMMANDS if "trainer.devices=2" in x]
# Run by test_fid_eval.py and test_script_runs.py.
IMAGES = [x for x in COMMANDS if re.search(r"(data=(cifar10|images)|demo_images)\b", x)]
NODES = [x for x in COMMANDS if "num_nodes=" in x]  # run by test_slurm_nodes.py
PLUG_INS = [x for x in COMMANDS if "plugins=" in x]  # run by test_plugins.py
OTHERS = {*RELEASED, *EVALUATING, *RANKS, *NODES, *IMAGES, *PLUG_INS}
OTHERS = [x for x in COMMANDS if x not in OTHERS]
SAYS = {  # what a mode leaves on the screen
    "inspect": "mdlm",
    "prepare_data": "valid",
    "export": "exported",
    "report": "agrees",
    "sample_eval": "entropy",
    "ppl_eval": "val/ppl",
    "train": "val/ppl",
    "view": "both.html",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return write_workplace(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = write_released_models(tmp_path_factory.mktemp("released"))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("to be or not to be, that is it. " * 400)
    return folder


# ---------------------------------------------------------------- main.py


def test_every_line_of_a_shell_block_is_of_a_kind():
    lines = {line for text in PAGES.values() for line in shell_lines(text)}
    assert len(lines) >= 40
    assert {line: kinds_of(line) for line in lines if len(kinds_of(line)) != 1} == {}


def test_every_command_of_main_is_in_a_group():
    assert len(OTHERS) >= 25
    assert len(RELEASED) >= 6
    assert len(QUICK_START) == 2
    assert len(EVALUATING) == 5
    assert len(RANKS) == 2


def small(line: str) -> list[str]:
    """What makes a command quick, in a folder of its own."""
    overrides, mode, number = overrides_of(line), mode_of(line), OTHERS.index(line)
    if "--cfg" in overrides:
        return []
    added = [] if "hydra.run.dir" in line else [f"hydra.run.dir=run{number}"]
    if "-m" in overrides:
        added.append(f"hydra.sweep.dir=sweep{number}")
    if "data.source=FILES" in line:
        added += ["data.tokenizer_name_or_path=bytes", "data.num_proc=1"]
        added.append("data.cache_dir=cache")
    if mode in ("train", "ppl_eval", "sample_eval"):
        added += SMALLER
        if "training.flops" in line or "toy_isoflop" in line:
            added += [
                *(x for x in SHORT if "max_steps" not in x),
                "training.flops=3e-10",
            ]
        else:
            added += SHORT if mode == "train" else ["loader.eval_batch_size=16"]
        if mode == "sample_eval":
            added += ["sampling.num_sample_batches=1"]
            added += [] if "-m" in overrides else ["sampling.steps=2"]
            added.append("eval.gen_ppl_eval_model_name_or_path=null")
        if "data.source=FILES" in line:
            added += ["model=tiny", "model.length=64", "loader.global_batch_size=4"]
        elif "data=text_files" in line or "small_text" in line:
            added.append("data.cache_dir=cache")
        elif mode == "train" or "data=" in line or "experiment=" in line:
            added.append("data.valid_fraction=0.01")  # else the checkpoint says it
    return added


def mode_of(line: str) -> str:
    found = re.search(r"\bmode=(\w+)", line)
    return found[1] if found else "train"


def is_quick(line: str) -> bool:
    """Of README, and not one of another algorithm alone (test_algorithms.py)."""
    return line in README and not re.search(r"experiment=demo algo=\w+$", line)


@pytest.mark.parametrize(
    "line",
    [x if is_quick(x) else pytest.param(x, marks=pytest.mark.slow) for x in OTHERS],
)
def test_command_runs(line, workplace):
    words = [*overrides_of(line), *small(line)]
    done = run(*words, cwd=workplace)
    if "--cfg" in words:
        assert "global_batch_size: 32" in done.stdout
    elif "-m" in words:
        assert "summary.png" in done.stdout
    elif "report.table=training" in words:
        assert "8.0 ± 0.5" in done.stdout
    elif "report.table=isoflop" in words:
        assert "the best size for a budget" in done.stdout
    elif {"report.table=schedules", "report.table=operator"} & set(words):
        assert "report.png" in done.stdout
    elif "report.table=frontier" in words:
        assert "samplers at the same entropy" in done.stdout
    else:
        assert SAYS[mode_of(line)] in done.stdout


@pytest.mark.parametrize("line", [x for x in RELEASED if x not in QUICK_START])
def test_command_with_a_released_model(line, released, compose, monkeypatch):
    run_here(line, f"released{RELEASED.index(line)}", released, compose, monkeypatch)


def test_the_quick_start(released, compose, monkeypatch):
    for line in sorted(QUICK_START, key=mode_of, reverse=True):
        folder = "runs/mine" if mode_of(line) == "train" else "runs/samples"
        run_here(line, folder, released, compose, monkeypatch)


def run_here(line, folder, released, compose, monkeypatch):
    """In this process, to save time."""
    monkeypatch.chdir(released)
    overrides = [x for x in overrides_of(line) if not x.startswith("hydra.")]
    added = [
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=False",
        f"data.cache_dir={released}/cache",
        f"checkpointing.save_dir={released}/{folder}",
        f"eval.generated_samples_path={released}/{folder}/samples.json",
        "eval.gen_ppl_eval_model_name_or_path=null",
        "logger=none",
    ]
    if "model=small" in line or "experiment=" in line:  # else the folder says its size
        names = {"hidden_dim": "hidden_size"}
        added += [f"model.{names.get(k, k)}={x}" for k, x in SIZES.items()]
    if "experiment=" in line:
        added += ["data=text_files", "data.path=corpus/*.txt", "model.length=64"]
        added += ["data.tokenizer_name_or_path=gpt2"]
    if mode_of(line) == "train" and "experiment=" not in line:
        added += [*SHORT, "loader.batch_size=2", "loader.global_batch_size=2"]
        added += ["eval.generate_samples=False", "data.valid_fraction=0.2"]
    else:
        added += ["loader.eval_batch_size=2", "sampling.num_sample_batches=1"]
        added += ["sampling.steps=2"]
    config = compose(*overrides, *added, tiny=False)
    if "experiment=" not in line:
        find_inputs(config, str(released))
        words = [*overrides, *added]

        def again(choices):
            return compose(*choices, *without(words, choices), tiny=False)

        take_over(config, words, again)
    results = main.run.__wrapped__(config)
    assert results.get("nll", 0) > 0 or results["num_samples"] == 2


@pytest.mark.parametrize("line", IMAGES)
def test_commands_of_images_compose(line, compose):
    config = compose(*overrides_of(line), tiny=False)
    assert config.mode == mode_of(line)
    validate_backbone(config)


@pytest.mark.parametrize("line", EVALUATING)
def test_a_report_asks_for_evaluations(line, compose):
    """Each of their commands composes; `test_reports.py` runs some."""
    jobs = jobs_of(compose(*overrides_of(line), tiny=False))
    assert jobs
    for job in {job.overrides["data"]: job for job in jobs}.values():
        words = [f"{key}={value}" for key, value in job.overrides.items()]
        assert compose(*words, tiny=False).mode == job.overrides["mode"]


@pytest.mark.parametrize("line", RANKS)
def test_a_command_of_several_processes_composes(line, compose):
    config = compose(*overrides_of(line), tiny=False)
    trainer, loader = config.trainer, config.loader
    rows = trainer.devices * loader.batch_size * trainer.accumulate_grad_batches
    assert rows == loader.global_batch_size


@pytest.mark.slow
@pytest.mark.parametrize("line", RANKS)
def test_a_command_of_several_processes_runs(line, workplace):
    words = [*overrides_of(line), *SMALLER, *SHORT, "hydra.run.dir=ranks"]
    done = run(*words, "data.valid_fraction=0.01", cwd=workplace, fresh=True)
    assert "val/ppl" in done.stdout


# ---------------------------------------------------------------- other programs


@pytest.mark.parametrize("line", commands("utils"))
def test_the_operator_by_itself(line, released, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(released)
    words = shlex.split(line.replace("=NAME", "=text8"))[2:]
    make_table([*words, f"--folder={tmp_path}"])
    assert "algo.curriculum" in capsys.readouterr().out
    assert list(tmp_path.glob("*.png" if "--suggest" in line else "*.npz"))


@pytest.mark.parametrize("line", commands("script"))
def test_a_script_accepts_its_variables(line, tmp_path, compose):
    """What it gives to main.py composes; `test_scripts.py` runs every script."""
    words = shlex.split(line)
    start = words.index("bash")
    env = dict(word.split("=", 1) for word in words[:start])
    env = {key: value for key, value in env.items() if value != ""}
    done = record(ROOT / words[start + 1], *words[start + 2 :], folder=tmp_path, **env)
    assert done.status == 0, done.said
    assert done.calls
    for call in done.calls:
        overrides = [x for x in call if not x.startswith("hydra.")]
        assert compose(*overrides, tiny=False).mode in main.MODES


def test_scripts_given_to_sbatch_exist():
    named = re.findall(r"sbatch (scripts/\S+)", " ".join(commands("sbatch")))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("line", commands("harness"))
def test_a_command_of_the_harness_is_understood(line):
    words = shlex.split(line)
    pairs = words[words.index("--model_args") + 1].split(",")
    given = dict(pair.split("=", 1) for pair in pairs)
    given = {k: int(x) if x.isdecimal() else x for k, x in given.items()}
    arguments = harness.Arguments.parse(given)
    assert harness.compose(arguments.all_overrides()).mode == "ppl_eval"
    run_elsewhere = (ROOT / "tests/integration/test_harness_runs.py").read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in run_elsewhere


def test_make_targets_exist():
    targets = {target for line in commands("make") for target in line.split()[1:2]}
    assert {"demo", "test", "bench-gpu"} <= targets
    for target in targets:
        dry_run = ["make", "-n", target]
        subprocess.run(dry_run, cwd=ROOT, check=True, capture_output=True)


def test_packages_to_install_are_those_of_the_project():
    known = (ROOT / "pyproject.toml").read_text() + (
        ROOT / "requirements.txt"
    ).read_text()
    packages = {line.removeprefix("pip install ") for line in commands("pip")}
    assert {"lm_eval==0.4.13", "mauve-text"} <= packages
    assert [name for name in packages if name not in known] == []


@pytest.mark.parametrize("line", commands("benchmark"))
def test_a_benchmark_has_its_options(line):
    words = shlex.split(line)
    code = (ROOT / words[1]).read_text()
    options = [word for word in words if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in code] == []


# ---------------------------------------------------------------- README's tables


def sampling_rows() -> list[str]:
    """What the README's table says can be added to the sampling command."""
    table = README.split("| to sample | add |")[1].split("\n\n")[0]
    return [
        cell for row in table.splitlines()[2:] for cell in re.findall(r"`(.*?)`", row)
    ]


def test_the_table_of_sampling_has_rows():
    assert len(sampling_rows()) >= 11


@pytest.fixture(scope="module")
def sampled(workplace):
    """Small checkpoints of the algorithms in the table, prompts and a judge."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from data.tokenizers import text8_tokenizer

    torch.manual_seed(0)
    tokenizer = text8_tokenizer()
    size = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 3}
    judge = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **ids))
    judge.save_pretrained(workplace / "FOLDER")
    tokenizer.save_pretrained(workplace / "FOLDER")
    return workplace


@pytest.mark.parametrize("row", sampling_rows())
def test_what_can_be_added_to_sampling(row, sampled, compose, monkeypatch, capsys):
    """In this process, to save time; a sweep and a prompt through the real one."""
    line = f"python main.py mode=sample_eval {' '.join(CHECKPOINT)} sampling.steps=64"
    added = shlex.split(row)
    folder = sampled / f"row{sampling_rows().index(row)}"
    small = (
        *SMALLER,
        "sampling.num_sample_batches=1",
        "loader.eval_batch_size=2",
        f"checkpointing.save_dir={folder}",
    )
    small += () if "FOLDER" in row else ("eval.gen_ppl_eval_model_name_or_path=null",)
    if "-m" in added or "sampling.infill" in row:
        done = run(
            *overrides_of(line),
            *added,
            *small,
            f"eval.checkpoint_path={sampled}/last.ckpt",
            f"hydra.run.dir={folder}",
            f"hydra.sweep.dir={folder}",
            cwd=sampled,
        )
        assert ("summary.png" if "-m" in added else "return ") in done.stdout
        return
    monkeypatch.chdir(sampled)
    words = [quoted(word) for word in (*overrides_of(line), *added)]
    config = compose(*words, *small, tiny=False)
    config.eval.checkpoint_path = str(folder / "random.ckpt")
    config.eval.generated_samples_path = str(folder / "samples.json")
    model = hydra.utils.get_class(config.algo._target_)(config, get_tokenizer(config))
    folder.mkdir()
    torch.save({"state_dict": model.state_dict()}, config.eval.checkpoint_path)
    results = sample_eval(config)
    assert results["num_samples"] == 2
    assert "entropy" in capsys.readouterr().out


def test_example_bounds_the_weight(workplace):
    """What the README claims of its example: a loss never above MDLM's."""
    losses = []
    for algorithm in ("bounded", "mdlm"):
        run(
            "plugins=[my_algo]",
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
        )
        losses.append(logged(workplace / f"weight-{algorithm}", "val/nll")[-1])
    assert losses[0] < losses[1]
