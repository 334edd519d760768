"""Loggers: which are asked for, what each is built with, and what is refused."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import OmegaConf
from refusals import refused

from cli.commandline import explain
from training.loggers import build_loggers, logger_names

CHOICES = {
    "logger=csv": ["csv"],
    "logger=wandb": ["wandb"],
    "logger=[csv,wandb]": ["csv", "wandb"],
    "logger=[wandb]": ["wandb"],
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
            "Unknown logger='cvs'. Did you mean 'csv'? Choose from: csv, none, wandb."
        )


def test_what_is_no_logger_is_refused(compose):
    refused(partial(logger_names, compose("+logger.mine=3")), "logger.mine=3")
    config = compose()
    config.logger = "csv"  # as in a config file of the user's
    refused(partial(logger_names, config), "logger='csv'", "override /logger: csv")
