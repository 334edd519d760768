"""Loggers: which are asked for, what each is built with, and what is refused."""

import csv
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import OmegaConf
from refusals import refused
from short_run import train_in

from cli.checks import check_loggers
from cli.commandline import explain
from training.loggers import TensorBoard, build_loggers, logger_names

CHOICES = {
    "logger=csv": ["csv"],
    "logger=wandb": ["wandb"],
    "logger=[csv,wandb]": ["csv", "wandb"],
    "logger=[wandb]": ["wandb"],
    "logger=tensorboard": ["tensorboard"],
    "logger=[csv,tensorboard]": ["csv", "tensorboard"],
    "logger=none": [],
    "logger=[]": [],
}


@pytest.fixture
def command_line(monkeypatch):
    """Puts words on the command line as Hydra remembers them."""

    def put(*overrides: str) -> None:
        hydra = SimpleNamespace(overrides=SimpleNamespace(task=list(overrides)))
        monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
        monkeypatch.setattr(HydraConfig, "get", lambda: hydra)

    return put


@pytest.mark.parametrize("choice", CHOICES)
def test_loggers_by_name(compose, choice):
    assert logger_names(compose(choice)) == CHOICES[choice]


def test_numbers_go_to_csv_files_by_default(compose, tmp_path):
    (logger,) = build_loggers(compose(f"checkpointing.save_dir={tmp_path}"))
    assert isinstance(logger, CSVLogger)
    assert logger.log_dir == f"{tmp_path}/csv/version_0"


def test_the_command_line_wins_over_an_experiment(compose):
    published = "experiment=train_owt_mdlm"
    assert logger_names(compose(published)) == ["csv", "wandb"]
    assert logger_names(compose(published, "logger=csv")) == ["csv"]
    assert logger_names(compose(published, "logger=none")) == []


@pytest.mark.parametrize("word", ["wandb.name=x", "+wandb.offline=true", "++wandb.a=1"])
@pytest.mark.parametrize("choice", ["csv", "none", "[csv,wandb]"])
def test_a_wandb_key_adds_the_logger(compose, command_line, word, choice):
    config = compose(f"logger={choice}")
    before = logger_names(config)
    command_line("seed=2", word)
    assert logger_names(config) == [x for x in before if x != "wandb"] + ["wandb"]
    command_line("seed=2", "data.path=wandb.txt")
    assert logger_names(config) == before


@pytest.mark.parametrize("is_chosen", [True, False])
def test_wandb_is_built_with_its_settings(
    compose, command_line, monkeypatch, tmp_path, is_chosen
):
    """Whether it is chosen or added; it logs the whole config."""
    monkeypatch.setattr("training.loggers.WandbLogger", SimpleNamespace)
    words = ["+wandb.offline=true", "wandb.project=mine", "wandb.name=run", "seed=3"]
    choice = "wandb" if is_chosen else "none"
    save_dir = f"checkpointing.save_dir={tmp_path}"
    config = compose(*words, f"logger={choice}", save_dir)
    command_line(*words)
    (built,) = build_loggers(config)
    assert built.save_dir == str(tmp_path)
    assert (built.project, built.name, built.id) == ("mine", "run", "run_3")
    assert built.offline
    assert built.config == OmegaConf.to_container(config, resolve=True)


NETRC = "machine api.wandb.ai login user password x"
# Variables and files of the home, and whether the run is offline.
ACCOUNTS = {
    "none": ({}, {}, True),
    "key": ({"WANDB_API_KEY": "x"}, {}, False),
    "token": ({"WANDB_IDENTITY_TOKEN_FILE": "x"}, {}, False),
    "empty key": ({"WANDB_API_KEY": ""}, {}, True),
    "mode": ({"WANDB_MODE": "disabled"}, {}, False),
    "netrc": ({}, {".netrc": NETRC}, False),
    "netrc elsewhere": ({"NETRC": "mine"}, {"mine": NETRC}, False),
    "no netrc": ({"NETRC": "mine"}, {".netrc": NETRC}, True),
    "another machine": ({}, {".netrc": NETRC.replace("wandb", "other")}, True),
    "another server": ({"WANDB_BASE_URL": "https://a.b"}, {".netrc": NETRC}, True),
    "own server": (
        {"WANDB_BASE_URL": "http://a.b:80"},
        {".netrc": NETRC.replace("api.wandb.ai", "a.b:80")},
        False,
    ),
    "no file of accounts": ({}, {".netrc": "\0 machine {"}, True),
    "settings": ({}, {".config/wandb/settings": "[default]\napi_key = x"}, False),
    "no settings": ({}, {".config/wandb/settings": "api_key"}, True),
}


@pytest.mark.parametrize("case", ACCOUNTS)
def test_without_an_account_wandb_is_offline(compose, monkeypatch, tmp_path, case):
    """And wandb has not been set up, which would ask for an account."""
    environment, files, offline = ACCOUNTS[case]
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("wandb.setup", None)
    monkeypatch.setattr("wandb.api", None)
    monkeypatch.setattr("training.loggers.WandbLogger", SimpleNamespace)
    (built,) = build_loggers(compose("logger=wandb"))
    assert built.offline is offline
    assert built.id is None  # of a run without a name


def test_wandb_builds(compose, tmp_path, monkeypatch):
    """With wandb's own class, which starts nothing yet."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (built,) = build_loggers(
        compose("logger=wandb", f"checkpointing.save_dir={tmp_path}")
    )
    assert isinstance(built, WandbLogger)
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_wandb_has_not_is_refused(compose):
    config = compose("logger=wandb", "+wandb.colour=red")
    refused(partial(logger_names, config), "'colour'", "wandb", "Choose from")
    assert logger_names(compose("+wandb.colour=red")) == ["csv"]  # not in use
    assert logger_names(compose("logger=wandb", "+wandb.notes=red")) == ["wandb"]


def test_an_unknown_logger_is_one_line(compose):
    for choice in ("cvs", "[csv,cvs]"):
        with pytest.raises(HydraException) as error:
            compose(f"logger={choice}")
        assert explain(error.value) == (
            "Unknown logger='cvs'. Did you mean 'csv'? Choose from: csv, none, "
            "tensorboard, wandb."
        )


def test_what_is_no_logger_is_refused(compose):
    refused(partial(logger_names, compose("+logger.mine=3")), "logger.mine=3")
    config = compose()
    config.logger = "csv"  # as in a config file of the user's
    refused(partial(logger_names, config), "logger='csv'", "override /logger: csv")


# ---------------------------------------------------------------- tensorboard


def test_without_its_package_tensorboard_is_refused(compose, monkeypatch):
    """At once; other loggers need nothing, and tensorboardX will do."""
    there = {}
    monkeypatch.setattr("importlib.util.find_spec", there.get)
    config = compose("logger=[csv,tensorboard]")
    words = "logger=tensorboard", "pip install tensorboard", "logger=csv"
    refused(partial(check_loggers, config), *words)
    for choice in ("csv", "none", "[]"):
        check_loggers(compose(f"logger={choice}"))
    there["tensorboardX"] = True
    check_loggers(config)


@pytest.fixture
def events():
    """events(folder): the log of a run, read by TensorBoard's own reader."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(module)

    def read(folder):
        log = reader.EventAccumulator(str(folder), {reader.TENSORS: 0})
        return log.Reload()

    return read


def scalars(log) -> dict[tuple[str, int], float]:
    return {
        (name, event.step): pytest.approx(event.value, rel=1e-6)
        for name in log.Tags()["scalars"]
        for event in log.Scalars(name)
    }


def in_csv(folder) -> dict[tuple[str, int], float]:
    found = {}
    for path in sorted(folder.glob("csv/version_*/metrics.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                found |= {(k, step): float(x) for k, x in row.items() if x}
    return found


def test_tensorboard_has_what_the_csv_file_has(events, tmp_path):
    """Names, updates, numbers; samples as texts; a resumed run adds to the same log."""
    words = ["logger=[csv,tensorboard]", "eval.generate_samples=True"]
    words += ["trainer.log_every_n_steps=1", "sampling.num_sample_log=2"]
    train_in(tmp_path, *words)
    log = events(tmp_path / "tensorboard")
    first = scalars(log)
    assert first == in_csv(tmp_path)
    assert {"train/nll", "val/ppl", "val/ppl_stderr"} <= {name for name, _ in first}
    assert {step for _, step in first} == {0, 1}
    (texts,) = log.Tensors("samples/text_summary")
    assert texts.step == 2
    (text,) = texts.tensor_proto.string_val
    assert text.startswith(b"    ")
    assert text.count(b"---") >= 1
    train_in(tmp_path, *words, "trainer.max_steps=4")
    both = scalars(events(tmp_path / "tensorboard"))
    assert first.items() <= both.items()
    assert {step for _, step in both} == {0, 1, 2, 3}
    assert both == in_csv(tmp_path)


def test_tensorboard_shows_texts_as_they_are_and_pictures(events, tmp_path):
    logger = TensorBoard(str(tmp_path))
    logger.log_table("samples@global_step7", ["x"], [["a\n# b"], ["`\x1b[0m`"]])
    images = [np.full((2, 3, 3), x, dtype=np.uint8) for x in (0, 255)]
    logger.log_image("samples@global_step7", images)
    logger.save()
    log = events(tmp_path / "tensorboard")
    (text,) = log.Tensors("samples/text_summary")
    (said,) = text.tensor_proto.string_val
    assert said.decode() == "    a\n    # b\n\n---\n\n    `\\x1b[0m`"
    assert text.step == 7
    (picture,) = log.Images("samples")
    assert (picture.step, picture.width, picture.height) == (7, 6, 2)
