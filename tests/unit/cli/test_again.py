"""The command that goes on with a stopped run, as a shell and Hydra read it."""

import shlex
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cli import again
from cli.again import command_again, split

CWD = "/work/a b"


@pytest.fixture
def words(compose, monkeypatch):
    """The words of the command that goes on after those given, from the program on."""

    def go(*given: str, folder="/runs/1", task=None, number=0, overrides=()):
        mode = "RunMode.RUN" if task is None else "RunMode.MULTIRUN"
        hydra = {
            "mode": mode,
            "overrides": {"task": task or []},
            "job": {"num": number},
            "runtime": {"cwd": CWD, "output_dir": folder},
        }
        stub = SimpleNamespace(
            initialized=lambda: True, get=lambda: OmegaConf.create(hydra)
        )
        monkeypatch.setattr(again, "HydraConfig", stub)
        config = compose("checkpointing.save_dir=/runs/1", *overrides)
        line = command_again(config, ["main.py", *given])
        place, command = line.split(" && ", 1)
        assert shlex.split(place) == ["cd", CWD]
        _, program, *rest = shlex.split(command)
        assert program == f"{CWD}/main.py"
        return rest

    return go


def test_the_words_that_were_given_and_the_folder(words):
    given = ["algo=mdlm", "data.path='a,b c.txt'", "+wandb.offline=true", "~noise.eps"]
    assert words(*given) == [*given, "hydra.run.dir=/runs/1"]


@pytest.mark.parametrize(
    "folder", ["/runs/it's", "/runs/a b", "/runs/a=b,c", "/a\\", "/[1]", "/{x}"]
)
def test_any_folder(words, folder):
    *_, last = words("seed=1", folder=folder)
    (override,) = OverridesParser.create().parse_overrides([last])
    assert override.key_or_group == "hydra.run.dir"
    value = override.value()
    assert (value if isinstance(value, str) else value.text) == folder


def test_an_earlier_folder_is_replaced(words):
    given = ["hydra.run.dir=r", "++hydra.run.dir=q", "seed=2", "hydra.verbose=true"]
    assert words(*given) == ["seed=2", "hydra.verbose=true", "hydra.run.dir=/runs/1"]


def test_flags_stay(words):
    given = ["--config-dir", "my configs", "experiment=x"]
    assert words(*given) == [*given, "hydra.run.dir=/runs/1"]


def test_a_job_of_a_sweep_goes_on_alone(words):
    given = ["-m", "seed=1,2", "algo=mdlm,ar", "hydra.sweep.dir=s", "-cn", "config"]
    given += ["hydra/launcher=basic", "hydra.verbose=true"]
    found = words(*given, task=["seed=2", "algo=ar"], number=3, folder="/s/3")
    job = ["seed=2", "algo=ar", "hydra.verbose=true", "hydra.run.dir=/s/3"]
    assert found == ["-cn", "config", *job]


def test_a_job_that_knows_its_number(words):
    task = ["checkpointing.save_dir=r/${hydra:job.num}"]
    found = words("-m", "seed=1,2", *task, task=task, number=3)
    assert "hydra.job.num=3" in found


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ("checkpointing.resume_from_ckpt=False", "resume_from_ckpt=True"),
        (
            "checkpointing.resume_ckpt_path=null",
            "resume_ckpt_path=/runs/1/checkpoints/last.ckpt",
        ),
    ],
)
def test_what_forbids_to_go_on_is_not_said_again(words, given, more):
    expected = [f"checkpointing.{more}", "hydra.run.dir=/runs/1"]
    assert words(given, overrides=[given]) == expected
    assert words(overrides=[given]) == expected  # of an experiment


def test_outside_of_a_job_there_is_none(compose):
    assert command_again(compose()) == ""


def test_flags_and_overrides():
    assert split(["-m", "a=1", "--config-dir=x", "-cn", "b", "~c"]) == (
        ["--config-dir=x", "-cn", "b"],
        ["a=1", "~c"],
    )
