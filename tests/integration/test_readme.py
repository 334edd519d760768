"""Every command of the README runs, cut to a few steps of a small network; its example
of a new algorithm is written to files and trained."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from command_line import ROOT, logged, run
from evaluated import likelihood
from released import SIZES, random_weights, write_released
from stand_ins import write_documents
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import main
from cli.checks import algorithm_class
from cli.commandline import quoted
from data.tokenizers import bytes_tokenizer, get_tokenizer
from evaluation.samples import sample_eval

GPT2 = 50257  # tokens of GPT-2

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    set(re.findall(r"(?:PYTHONPATH=\. )?python main\.py [^`\n\"]+", README))
)
# Of these the network is that of a released model, which is made small for the test.
RELEASED = [line for line in COMMANDS if "gpt2" in line]
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
    write_documents(folder / "FILES")
    (folder / "outputs").mkdir()
    (folder / "outputs" / "likelihood.json").write_text(json.dumps(likelihood()))
    code, yaml = (
        re.search(rf"```{language}\n(.*?)```", README, re.S)[1]
        for language in ("python", "yaml")
    )
    (folder / "my_algo.py").write_text(code)
    (folder / "my_configs" / "algo").mkdir(parents=True)
    (folder / "my_configs" / "algo" / "bounded.yaml").write_text(yaml)
    (line,) = [x for x in COMMANDS if "mode=ppl_eval" in x and x not in RELEASED]
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


@pytest.mark.parametrize("line", [x for x in COMMANDS if x not in RELEASED])
def test_command_runs(line, workplace, request):
    overrides = overrides_of(line)
    if "mode=inspect" in overrides:
        assert "mdlm" in run(*overrides, cwd=workplace).stdout
        return
    if "mode=report" in overrides:
        assert (
            "agrees" in run(*overrides, "hydra.run.dir=reports", cwd=workplace).stdout
        )
        assert (workplace / "report" / "report.png").exists()
        return
    if "data.source=FILES" in overrides:
        overrides += ("data.tokenizer_name_or_path=bytes", "data.num_proc=1")
        overrides += (f"data.cache_dir={workplace}/cache",)
    if "mode=prepare_data" in overrides:
        assert "valid" in run(*overrides, "hydra.run.dir=data", cwd=workplace).stdout
        return
    if "mode=export" in overrides:
        run(*overrides, "hydra.run.dir=exports", cwd=workplace)
        assert (workplace / "exported" / "model.safetensors").exists()
        return
    evaluates = any(x.startswith("mode=") for x in overrides)
    smaller = [*SMALLER]
    if not any(x.startswith("hydra.run.dir") for x in overrides):
        smaller.append(f"hydra.run.dir=run{COMMANDS.index(line)}")
    if evaluates:
        smaller.append("loader.eval_batch_size=16")
        if "mode=sample_eval" in overrides:
            smaller.append("sampling.steps=2")
    else:
        smaller += SHORT
    if "data.source=FILES" in overrides:
        smaller += ["model=tiny", "model.length=64", "loader.global_batch_size=4"]
    elif "data=text_files" in overrides:
        smaller.append(f"data.cache_dir={workplace}/cache")
    else:
        smaller.append("data.valid_fraction=0.01")
    pythonpath = workplace if line.startswith("PYTHONPATH=.") else None
    done = run(*overrides, *smaller, cwd=workplace, pythonpath=pythonpath)
    assert "sample 1" in done.stdout or "val/ppl" in done.stdout


@pytest.fixture(scope="module")
def released(workplace):
    """The hub's models and tokenizer and Drive's file under their names, but small."""
    write_released(workplace / "s-sahoo/duo", "DUO", GPT2 + 1, length=1024)
    folder = workplace / "kuleshov-group/mdlm-owt"
    write_released(folder, "mdlm", GPT2 + 1, length=1024)
    weights = random_weights(GPT2 + 1)
    torch.save({"state_dict": weights, "global_step": 1}, workplace / "duo.ckpt")
    core = bytes_tokenizer().backend_tokenizer
    vocab = sorted(core.get_vocab(), key=core.get_vocab().get)[:256]
    vocab += [f"<{index}>" for index in range(256, GPT2 - 1)] + ["<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocab)}
    gpt2 = Tokenizer(models.BPE(vocab=ids, merges=[]))
    gpt2.pre_tokenizer, gpt2.decoder = core.pre_tokenizer, core.decoder
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), vocab[-1])
    fast = PreTrainedTokenizerFast(tokenizer_object=gpt2, **special)
    fast.save_pretrained(workplace / "gpt2")
    return workplace


def test_the_readme_names_released_models():
    assert len(RELEASED) == 4


@pytest.mark.parametrize("line", RELEASED)
def test_command_with_a_released_model(line, released, compose, monkeypatch):
    """In this process, to save time."""
    monkeypatch.chdir(released)
    overrides = overrides_of(line)
    added = [
        "trainer.accelerator=cpu",
        "+trainer.enable_progress_bar=False",
        f"data.cache_dir={released}/cache",
        f"checkpointing.save_dir={released}/released{RELEASED.index(line)}",
        "eval.gen_ppl_eval_model_name_or_path=null",
        "logger=none",
    ]
    if "model=small" in overrides:  # else the folder says how large it is
        names = {"hidden_dim": "hidden_size"}
        added += [f"model.{names.get(k, k)}={x}" for k, x in SIZES.items()]
    if "mode=" not in line:
        added += [*SHORT, "loader.batch_size=2", "loader.global_batch_size=2"]
        added += ["eval.generate_samples=False", "data.valid_fraction=0.2"]
    else:
        added += ["loader.eval_batch_size=2", "sampling.num_sample_batches=1"]
    if "mode=sample_eval" in overrides:
        added.append("sampling.steps=2")
    config = compose(*overrides, *added, tiny=False)
    results = main.run.__wrapped__(config)
    assert results.get("nll", 0) > 0 or results["num_samples"] == 2


def test_the_range_of_gamma(tmp_path):
    (line,) = re.findall(r"python utils\.py [^`\n]+", README)
    words = [sys.executable, str(ROOT / "utils.py"), *shlex.split(line)[2:]]
    words.append(f"--folder={tmp_path}")
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "algo.curriculum.gamma_min" in done.stdout
    assert list(tmp_path.glob("*.png"))


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
    (workplace / "prompts.txt").write_text("return the\ncreate a\n")
    return workplace


@pytest.mark.parametrize("row", sampling_rows())
def test_what_can_be_added_to_sampling(row, sampled, compose, monkeypatch, capsys):
    """In this process, to save time; a sweep and a prompt through the real one."""
    (line,) = [x for x in COMMANDS if "mode=sample_eval" in x and x not in RELEASED]
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
    model = algorithm_class(config)(config, get_tokenizer(config))
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
