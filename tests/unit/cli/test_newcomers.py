"""What newcomers mistype: each command line ends in one line with key, value and cure,
before torch is imported."""

import errno
import subprocess
import sys

import pytest
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException
from tiny import CONFIGS

from cli.checks import check
from cli.commandline import arguments, explain, missing_key, no_choice
from cli.hints import MEANT
from cli.known_keys import known_keys
from cli.paths import no_folder
from cli.words import FLAGS, MODES, WITH_WORD, groups
from main import MODES as OF_MAIN
from utils import ConfigError, choose

OWN = "data=text_files data.tokenizer_name_or_path=bytes"
# The command line, and what its line must hold.
MISTAKES = {
    # forgotten or misspelt mode=
    "sample_eval": ["'sample_eval'", "write mode=sample_eval"],
    "train": ["write mode=train"],
    "ppl_eval eval.checkpoint_path=a.ckpt": ["write mode=ppl_eval"],
    "mode": ["'mode' has no value", "mode=VALUE"],
    "mode sample_eval": ["'mode' has no value"],
    "mode=": ["mode=''", "Choose from", "sample_eval"],
    "mode=eval": ["mode='eval'", "'ppl_eval'"],
    "mode=sample": ["mode='sample'", "'sample_eval'"],
    "mode=SAMPLE_EVAL": ["mode='SAMPLE_EVAL'", "'sample_eval'"],
    "mode=generate": ["mode='generate'", "Choose from"],
    "mode=test": ["mode='test'", "Choose from"],
    "eval.checkpoint_path=a.ckpt": ["eval.checkpoint_path='a.ckpt'", "mode=ppl_eval"],
    "export.path=out": ["export.path='out'", "mode=export"],
    "sampling.prompt=hello": ["sampling.prompt='hello'", "mode=sample_eval"],
    "report.table=test_ppl": ["report.table='test_ppl'", "mode=report"],
    # words that are no settings
    "--mode=train": ["--mode=train", "write mode=train"],
    "--mode train": ["--mode", "write mode=VALUE"],
    "--lr=1e-3": ["--lr=1e-3", "'optim.lr'", "without dashes"],
    "--optim.lr=1e-3": ["write optim.lr=1e-3"],
    "--batch-size 8": ["--batch-size", "loader.global_batch_size"],
    "--epochs 3": ["--epochs", "trainer.max_steps"],
    "--gpus 2": ["--gpus", "trainer.devices"],
    "-x": ["-x", "KEY=VALUE"],
    "mdlm": ["'mdlm'", "write algo=mdlm"],
    "text8": ["write data=text8"],
    "small": ["write model=small"],
    "demo": ["write experiment=demo"],
    "optim.lr": ["'optim.lr' has no value", "optim.lr=VALUE"],
    "optim.lr 1e-3": ["'optim.lr' has no value"],
    "optim.lr: 1e-3": ["'optim.lr:' has no value", "optim.lr=VALUE"],
    "optim.lr =1e-3": ["'optim.lr' has no value", "without blanks"],
    "=1e-3": ["'=1e-3' has no key"],
    "lr": ["'lr'", "'optim.lr'"],
    "model.ckpt": ["'model.ckpt'", "eval.checkpoint_path=model.ckpt"],
    "help": ["'help'", "KEY=VALUE"],
    # the last part of a key, and words of other programs
    "lr=1e-3": ["lr", "'optim.lr'"],
    "+lr=1e-3": ["lr", "'optim.lr'"],
    "learning_rate=1e-3": ["learning_rate", "'optim.lr'"],
    "optim.learning_rate=1e-3": ["optim.learning_rate", "'optim.lr'"],
    "batch_size=8": ["'loader.global_batch_size' or 'loader.batch_size'"],
    "loader.batchsize=8": ["loader.batchsize", "'loader.batch_size'"],
    "max_steps=10": ["'trainer.max_steps'"],
    "steps=10": ["'trainer.max_steps' or 'sampling.steps'"],
    "epochs=3": ["epochs", "'trainer.max_steps'"],
    "length=128": ["'model.length'"],
    "seq_len=128": ["'model.length'"],
    "hidden_size=64": ["'model.hidden_size'"],
    "n_layers=4": ["'model.n_blocks'"],
    "dropout=0.1": ["'model.dropout'"],
    "ckpt=a.ckpt": ["ckpt", "'eval.checkpoint_path'"],
    "checkpoint_path=a.ckpt": ["'eval.checkpoint_path'"],
    "tokenizer=gpt2": ["'data.tokenizer_name_or_path'"],
    "dataset=text8": ["dataset", "'data'"],
    "path=a.txt": ["'data.path'"],
    "top_p=0.9": ["'sampling.p_nucleus'"],
    "sampler=psi": ["'sampling.predictor'"],
    "prompt=hello": ["'sampling.prompt'"],
    "output_dir=out": ["'hydra.run.dir'"],
    "devices=2": ["'trainer.devices'"],
    "precision=bf16": ["'trainer.precision'"],
    "ema=0.99": ["'training.ema'"],
    "warmup=100": ["'lr_scheduler.num_warmup_steps'"],
    "num_workers=2": ["'loader.num_workers'"],
    # names of arguments and keys
    "trainer.max_stepss=3": ["trainer.max_stepss", "'trainer.max_steps'"],
    "+trainer.max_stepss=3": ["trainer.max_stepss", "'max_steps'"],
    "trainer.max_epochs=3": ["trainer.max_epochs", "write +trainer.max_epochs="],
    "trainer.max_time=00:01:00:00": ["write +trainer.max_time="],
    "trainer.strategy=ddp": ["trainer.strategy", "strategy=..."],
    "trainer.gpus=2": ["trainer.gpus", "'trainer.devices'"],
    "optim.momentum=0.9": ["optim.momentum"],
    "optim.beta=0.9": ["optim.beta", "'optim.beta"],
    "sampling.stepss=8": ["sampling.stepss", "'sampling.steps'"],
    "wandb.projct=x": ["wandb.projct", "'wandb.project'"],
    "trainer=ddp": ["trainer='ddp'", "trainer.KEY=VALUE"],
    "optim=adamw": ["optim='adamw'", "optim.KEY=VALUE"],
    "~algo": ["algo is empty", "configs/algo"],
    # values of the wrong kind
    "trainer.precision=foo": ["trainer.precision='foo'", "bf16-mixed"],
    "trainer.max_steps=ten": ["trainer.max_steps='ten'", "whole number"],
    "trainer.max_steps=": ["trainer.max_steps=''", "whole number"],
    "trainer.max_steps=1e3": ["trainer.max_steps=1000.0", "Write 1000."],
    "trainer.max_steps=-1": ["trainer.max_steps=-1", "at least 1"],
    "trainer.devices=all": ["trainer.devices='all'", "whole number"],
    "trainer.devices=0": ["trainer.devices=0", "at least 1"],
    "trainer.gradient_clip_val=-1": ["trainer.gradient_clip_val=-1", "at least 0"],
    "trainer.val_check_interval=never": ["trainer.val_check_interval='never'"],
    "+trainer.max_time=abc": ["trainer.max_time='abc'", "00:12:00:00"],
    "+trainer.max_time=3": ["trainer.max_time=3", "00:12:00:00"],
    "+trainer.max_epochs=ten": ["trainer.max_epochs='ten'", "whole number"],
    "+trainer.min_steps=x": ["trainer.min_steps='x'"],
    "+trainer.detect_anomaly=foo": ["trainer.detect_anomaly='foo'", "True"],
    "+trainer.deterministic=foo": ["trainer.deterministic='foo'", "warn"],
    "+trainer.benchmark=foo": ["trainer.benchmark='foo'", "True"],
    "+trainer.enable_progress_bar=maybe": ["trainer.enable_progress_bar='maybe'"],
    "+trainer.gradient_clip_algorithm=x": ["algorithm='x'", "norm, null, value"],
    "+trainer.fast_dev_run=True": ["trainer.fast_dev_run=True", "False"],
    "+trainer.limit_test_batches=x": ["trainer.limit_test_batches='x'"],
    "optim.lr=-1": ["optim.lr=-1", "at least 0"],
    "optim.lr=high": ["optim.lr='high'", "number"],
    "optim.lr=nan": ["optim.lr=nan", "number"],
    "optim.lr=inf": ["optim.lr=inf", "at most"],
    "optim.beta1=1": ["optim.beta1=1", "at most 0.99"],
    "optim.beta2=-0.1": ["optim.beta2=-0.1", "at least 0"],
    "optim.eps=0": ["optim.eps=0", "at least 1e-30"],
    "optim.weight_decay=-1": ["optim.weight_decay=-1", "at least 0"],
    "seed=abc": ["seed='abc'", "whole number"],
    "training.ema=2": ["training.ema=2", "at most 1"],
    "training.compile=maybe": ["training.compile='maybe'", "False, True"],
    "sampling.steps=0": ["sampling.steps=0", "at least 1"],
    "sampling.p_nucleus=2": ["sampling.p_nucleus=2", "at most 1"],
    "sampling.predictor=ddim": ["sampling.predictor='ddim'", "ancestral"],
    "loader.global_batch_size=0": ["loader.global_batch_size=0", "at least 1"],
    "print_config=yes": ["print_config='yes'", "False, True"],
    # choices
    "algo=MDLM": ["algo='MDLM'", "'mdlm'"],
    "algo=": ["algo=''", "Choose from", "mdlm"],
    "algo=bert": ["algo='bert'", "duo"],
    "algo=duo,mdlm": ["algo=duo,mdlm", "add -m"],
    "trainer.max_steps=10,20": ["trainer.max_steps=10,20", "add -m"],
    "data=wikitext": ["data='wikitext'", "'wikitext2'"],
    "data=./my.txt": ["data='./my.txt'", "data=text_files data.path=./my.txt"],
    "model=big": ["model='big'", "small"],
    "model=": ["model=''", "small"],
    "noise=cosin": ["noise='cosin'", "'cosine'"],
    "lr_scheduler=cosine": ["lr_scheduler='cosine'", "'cosine_decay_warmup'"],
    "strategy=dpp": ["strategy='dpp'", "'ddp'"],
    "logger=tensorbord": ["logger='tensorbord'", "csv"],
    "callbacks=foo": ["callbacks='foo'", "checkpoint_monitor"],
    "experiment=dmo": ["experiment='dmo'", "'demo'"],
    # paths
    "data=text_files": ["data.path is empty", "corpus/*.txt"],
    f"{OWN} data.path=/tmp": ["data.path='/tmp' is a folder", "/tmp/*."],
    f"{OWN} data.path=/no/x.txt": ["data.path='/no/x.txt'", "matches no file"],
    f"{OWN} data.valid_fraction=2": ["data.valid_fraction=2", "at most 1"],
    "mode=ppl_eval": ["eval.checkpoint_path is empty", "checkpoint"],
    "mode=sample_eval eval.checkpoint_path=/no.ckpt": ["'/no.ckpt'", "no such file"],
    "training.finetune_path=/no.ckpt": ["training.finetune_path='/no.ckpt'"],
}


def line_of(compose, words: list[str]) -> str:
    """What `main.py` says of a command line, by the same functions."""
    try:
        words = arguments(words)
        ours = [word for word in words if not word.startswith("~")]
        config = compose(*ours)
        for word in words:
            if word.startswith("~"):
                group, _, name = word[1:].rpartition(".")
                with open_dict(config):
                    del (config[group] if group else config)[name]
        choose(OF_MAIN, config.mode, "mode")
        check(config)
        return "nothing"
    except HydraException as error:
        return explain(error)
    except ConfigError as error:
        return str(error)
    except OmegaConfBaseException as error:
        return missing_key(error)
    except (OSError, ValueError) as error:
        return no_choice(words, error)


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_with_its_cure(compose, command):
    line = line_of(compose, command.split())
    assert "\n" not in line
    for part in MISTAKES[command]:
        assert part in line


def test_a_key_that_is_read_was_removed(compose):
    config = compose()
    with open_dict(config):
        del config.optim["lr"]
    with pytest.raises(OmegaConfBaseException) as error:
        _ = config.optim.lr
    line = missing_key(error.value)
    assert line == (
        "optim.lr is not there, and is needed: leave ~optim.lr out, or give "
        "optim.lr=VALUE."
    )
    assert missing_key(ConfigError("x")) == ""


def test_they_are_a_hundred():
    assert len(MISTAKES) >= 100


def test_what_is_meant_is_there():
    """Keys, or groups of which one is chosen, in the config or in that of Hydra."""
    there = known_keys() | set(groups()) | {"hydra.run.dir"}
    assert {key for keys in MEANT.values() for key in keys} <= there
    assert not MEANT.keys() & known_keys() - {"name"}


def test_modes_and_flags_are_all_there_are():
    assert set(MODES) == set(OF_MAIN)
    options = {x for y in get_args_parser()._actions for x in y.option_strings}
    assert options == set(FLAGS + WITH_WORD)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--cfg", "job"],
        ["--cfg=job", "algo=mdlm"],
        ["-cd", "conf", "experiment=mine"],
        ["--info", "defaults"],
        ["-m", "seed=1,2"],
        ["~callbacks"],
        ["sampling.prompt=a=b"],
    ],
)
def test_words_that_are_right(words):
    assert len(arguments(words)) == len(words)


@pytest.mark.parametrize(
    ("word", "becomes"),
    [
        ("+print_config=True", "++print_config=True"),
        ("+optim.lr=1", "++optim.lr=1"),
        ("++optim.lr=1", "++optim.lr=1"),
        ("+experiment=demo", "+experiment=demo"),
        ("+hydra.job.x=1", "+hydra.job.x=1"),
        ("optim.lr=1", "optim.lr=1"),
    ],
)
def test_a_plus_before_a_key_that_is_there_is_no_mistake(word, becomes):
    assert arguments([word]) == [becomes]


@pytest.mark.parametrize(
    ("word", "number", "at", "parts"),
    [
        ("hydra.run.dir=/proc/x", "ENOENT", "/proc/x", ["hydra.run.dir='/proc/x'"]),
        ("hydra.run.dir=/etc/fstab", "EEXIST", "/etc/fstab", ["no folder"]),
        ("hydra.run.dir=/etc/fstab/x", "ENOTDIR", "/etc/fstab/x", ["no folder"]),
        ("hydra.sweep.dir=/root/x", "EACCES", "/root", ["hydra.sweep.dir="]),
        ("hydra.run.dir=", "ENOENT", "", ["is empty"]),
        ("hydra.run.dir=a", "EIO", "/somewhere/else", []),
        ("optim.lr=1", "ENOENT", "/proc/x", []),
    ],
)
def test_folders_that_cannot_be_made(word, number, at, parts):
    code = getattr(errno, number)
    line = no_folder([word], OSError(code, "why", at))
    assert bool(line) is bool(parts)
    for part in parts:
        assert part in line


def test_nothing_heavy_is_waited_for():
    """A refusal of a misspelt argument imports neither torch nor Lightning."""
    code = (
        "import sys; sys.argv = ['main.py', '+trainer.max_stepss=3'];"
        "sys.path.insert(0, '.');"
        "import main\n"
        "try: main.main()\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
        "print('status', status, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "status 2 set()" in done.stdout
    assert "trainer.max_stepss" in done.stderr
