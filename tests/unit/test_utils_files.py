"""Reading checkpoints without executing code, writing JSON whole, fitting weights."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import fsspec
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import utils
from checkpoints.keys import key_report
from checkpoints.reading import read_checkpoint
from cli.commandline import find_inputs
from utils import ConfigError, Process, path_exists, write_json

KEY = "eval.checkpoint_path"


# ---------------------------------------------------------------- checkpoints


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def refused(path):
    with pytest.raises(ConfigError) as error:
        read_checkpoint(str(path), KEY)
    text = str(error.value)
    assert KEY in text
    assert "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrap", [pickle.dump, torch.save])
def test_a_checkpoint_cannot_execute_code(tmp_path, wrap):
    target, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    with open(path, "wb") as file:
        wrap({"state_dict": {}, "extra": Malicious(target)}, file)
    assert "cannot be read safely" in refused(path)
    assert not target.exists()
    # The same file does execute where it is trusted.
    torch.load(path, weights_only=False) if wrap is torch.save else pickle.loads(
        path.read_bytes()
    )
    assert target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"\x80\x04K\x01."]
)
def test_a_broken_file_is_refused(tmp_path, content):
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"w": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:-50])
    assert str(path) in refused(path)


@pytest.mark.parametrize("content", [5, torch.ones(2), [1]])
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    assert type(content).__name__ in refused(path)


def test_a_missing_file_an_empty_path_and_a_folder_are_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "none.ckpt")
    assert "empty" in refused("")
    assert str(tmp_path) in refused(tmp_path)


def test_a_plain_checkpoint_is_read_to_the_cpu(tmp_path):
    path = tmp_path / "good.ckpt"
    ema = {"decay": 0.9, "num_updates": None, "shadow_params": []}
    state = {"state_dict": {"w": torch.arange(3.0)}, "ema": ema}
    torch.save(state, path)
    read = read_checkpoint(str(path), KEY)
    assert torch.equal(read.weights["w"], torch.arange(3.0))
    assert read.ema == ema


def test_checkpoints_may_be_behind_fsspec(tmp_path):
    with fsspec.open("memory://store/good.ckpt", "wb") as file:
        torch.save({"w": torch.ones(2)}, file)
    assert path_exists("memory://store/good.ckpt")
    assert not path_exists("memory://store/other.ckpt")
    assert read_checkpoint("memory://store/good.ckpt", KEY).lightning["w"].tolist() == [
        1,
        1,
    ]


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (None, True),
        (urllib.error.HTTPError("url", 404, "not found", None, None), True),
        (urllib.error.URLError("no route"), False),
        (TimeoutError(), False),
    ],
)
def test_an_unreachable_hub_is_not_asked_twice(
    monkeypatch, tmp_path, answer, reachable
):
    """One short question; then only local files, instead of a minute of retries."""
    asked = []

    def urlopen(request, timeout):
        asked.append(request.get_method())
        assert timeout <= 10
        if answer is not None:
            raise answer
        return io.BytesIO()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    utils.answers.cache_clear()
    try:
        assert utils.hub_options(str(tmp_path)) == {"local_files_only": True}
        assert not asked  # a folder needs no hub
        for _ in range(2):
            assert utils.hub_options("gpt2") == {"local_files_only": not reachable}
        assert asked == ["HEAD"]
    finally:
        utils.answers.cache_clear()


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("remote", [False, True])
def test_json_is_written_to_new_folders_and_over_old_files(tmp_path, remote):
    root = f"memory://json/{tmp_path.name}" if remote else str(tmp_path)
    path = f"{root}/a/b/results.json"
    for data in ({"x": [1, None, "é"]}, {"y": 2}):
        write_json(path, data)
        with fsspec.open(path) as file:
            assert json.load(file) == data


def test_json_is_written_whole_or_not_at_all(tmp_path):
    """A failure half-way leaves the old file as it was."""
    path = tmp_path / "results.json"
    write_json(str(path), {"old": True})
    with pytest.raises(TypeError):
        write_json(str(path), {"long": ["text"] * 10_000, "bad": object()})
    assert json.loads(path.read_text()) == {"old": True}


# ---------------------------------------------------------------- weights


def test_a_fitting_state_has_nothing_to_report():
    module = nn.Linear(2, 3)
    report = key_report(module, module.state_dict())
    assert report == ([], [], [], [])
    report.raise_if_any("here")


def test_what_does_not_fit_is_named():
    state = {"weight": torch.zeros(5, 2), "surplus": torch.zeros(1)}
    report = key_report(nn.Linear(2, 3), state)
    assert report.missing == ["bias"]
    assert report.unexpected == ["surplus"]
    assert report.reshaped == ["weight (5, 2) for (3, 2)"]
    with pytest.raises(ConfigError) as error:
        report.raise_if_any("eval.checkpoint_path='x.ckpt'")
    text = str(error.value)
    assert "\n" not in text
    for part in ("x.ckpt", "1 missing (e.g. bias)", "surplus", "weight (5, 2)"):
        assert part in text


# ---------------------------------------------------------------- relative paths


def test_inputs_are_found_where_the_command_was_given(tmp_path, monkeypatch):
    """Files, globs and lists of them; what leads nowhere stays as it was."""
    for name in ("a.ckpt", "b.txt", "folder"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
    monkeypatch.chdir("/")
    config = OmegaConf.create(
        {
            "eval": {"checkpoint_path": "a.ckpt", "mauve_references": None},
            "training": {"finetune_path": "nowhere.ckpt"},
            "data": {
                "path": ["*.txt", "/etc/hosts"],
                "tokenizer_name_or_path": "gpt2",
            },
            "sampling": {"prompt_file": "memory://b.txt"},
            "checkpointing": {"resume_ckpt_path": f"{tmp_path}/a.ckpt"},
        }
    )
    before = copy.deepcopy(config)
    find_inputs(config, str(tmp_path))
    assert config.eval.checkpoint_path == f"{tmp_path}/a.ckpt"
    assert config.data.path == [f"{tmp_path}/*.txt", "/etc/hosts"]
    config.eval.checkpoint_path, config.data.path = "a.ckpt", before.data.path
    assert config == before
    config.data.tokenizer_name_or_path = "folder"
    find_inputs(config, str(tmp_path))
    assert config.data.tokenizer_name_or_path == f"{tmp_path}/folder"


# ---------------------------------------------------------------- local and stored

LOCAL = (
    "a::b",
    "run::notes/last.ckpt",
    "a::b::c",
    "x/zip::y.zip",
    "a b/s3:/x",
    "./a::b",
    "file:a",
    "local:a",
    "a/memory://b",
    "[a]/*::?",
)


@pytest.mark.parametrize("prefix", ["", "file://", "local://"])
@pytest.mark.parametrize("name", LOCAL)
def test_a_local_path_is_never_a_chain(tmp_path, monkeypatch, name, prefix):
    """Relative or absolute, written, found, read and copied under its own name."""
    monkeypatch.chdir(tmp_path)
    for first in ("a", "run", "x", "file", "local"):  # what a chain would begin with
        if not name.startswith(f"{first}/"):
            (tmp_path / first).write_text("mine")
    paths = [f"{tmp_path}/{name.removeprefix('./')}"]
    paths += [] if prefix else [name]
    for path in paths:
        write_json(f"{prefix}{path}", [1])
        assert json.loads(Path(path).read_text()) == [1]
        assert path_exists(f"{prefix}{path}")
        with utils.open_file(f"{prefix}{path}", "r") as file:
            assert json.load(file) == [1]
        utils.copy_file(f"{prefix}{path}", f"{prefix}{path}.copy")
        assert json.loads(Path(f"{path}.copy").read_text()) == [1]
        os.remove(path)
        assert not path_exists(f"{prefix}{path}")
    for first in ("a", "run", "x", "file", "local"):
        if (tmp_path / first).is_file():
            assert (tmp_path / first).read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["memory://a/b", "simplecache::memory://a/b", "zip://x::memory://a.zip"]
)
def test_what_has_a_protocol_is_for_fsspec(path):
    fsspec.filesystem("memory").pipe("/a.zip", b"PK\x05\x06" + bytes(18))
    ours, theirs = utils.filesystem_of(path), fsspec.core.url_to_fs(path)
    assert type(ours[0]) is type(theirs[0])
    assert ours[1] == theirs[1]


# ---------------------------------------------------------------- processes


@pytest.fixture
def sleeper():
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    ) as p:
        yield p
        p.kill()


def process_of(pid: int) -> Process:
    return Process.this()._replace(pid=pid, started=utils._start_of(pid))


def test_a_process_lives_until_it_is_dead(sleeper):
    assert Process.this().lives() is True
    other = process_of(sleeper.pid)
    assert other.lives() is True
    sleeper.kill()
    while utils._start_of(sleeper.pid) is not None:  # it has no grave yet
        time.sleep(0.01)
    assert other.lives() is False
    sleeper.wait()
    assert other.lives() is False


def test_a_pid_that_has_come_back_is_another_process(sleeper):
    earlier = process_of(sleeper.pid)._replace(started="1")
    assert earlier.lives() is False
    assert Process.this()._replace(started="").lives() is False


def test_another_container_or_boot_cannot_be_seen(sleeper):
    assert process_of(sleeper.pid)._replace(space="another").lives() is None


def test_a_process_goes_through_json(sleeper):
    there = Process(*json.loads(json.dumps(Process.this())))
    assert there == Process.this()
    assert there.lives()
