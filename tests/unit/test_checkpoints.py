"""Checkpoint files: objects in them become records, and nothing of them runs."""

import os
import pickle

import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused

from checkpoints import Record, read_checkpoint

KEY = "training.finetune_path"


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Text8Tokenizer:
    """A stranger in a module of a known name."""


Text8Tokenizer.__module__ = "dataloader"


def save(tmp_path, content) -> str:
    torch.save(content, tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt")


@pytest.mark.parametrize("place", ["top", "state_dict", "hyper_parameters", "deep"])
def test_calls_are_refused_by_name(tmp_path, place):
    marker = tmp_path / "marker"
    call = Runs(os.system, f"touch {marker}")
    content = {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {}}
    if place == "deep":
        content["hyper_parameters"] = {"config": [{"a": (1, call)}]}
    else:
        content[place] = call
    path = save(tmp_path, content)
    pickled = pickle.dumps(call)
    pickle.loads(pickled)
    assert marker.exists()  # it would run
    marker.unlink()
    refused(lambda: read_checkpoint(path, KEY), KEY, "class posix.system")
    assert not marker.exists()


def spy(*args):
    spy.calls.append(args)


spy.__module__ = "omegaconf"


def test_functions_of_known_modules_do_not_run(tmp_path, monkeypatch):
    """A name that is known stands for a record, whatever the module has under it."""
    monkeypatch.setattr("omegaconf.spy", spy, raising=False)
    monkeypatch.setattr(spy, "calls", [], raising=False)
    path = save(tmp_path, {"hyper_parameters": {"x": Runs(spy, 1, "a")}})
    torch.load(path, weights_only=False)
    assert spy.calls == [(1, "a")]
    found = read_checkpoint(path, KEY)["hyper_parameters"]["x"]
    assert len(spy.calls) == 1
    assert (found.name, found.args) == ("omegaconf.spy", (1, "a"))


def test_a_config_becomes_plain_data(tmp_path):
    content = {
        "a": {"b": [1, {"c": None}], "d": "${a.e}", "e": 0.5},
        "f": True,
        "g": [],
    }
    config = OmegaConf.create(content)
    path = save(tmp_path, {"hyper_parameters": {"config": config, "k": 3}})
    settings = read_checkpoint(path, KEY)["hyper_parameters"]
    assert settings == {"config": content, "k": 3}
    assert type(settings["config"]["a"]["b"]) is list


def test_a_tokenizer_becomes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr("dataloader.Text8Tokenizer", Text8Tokenizer, raising=False)
    tokenizer = Text8Tokenizer()
    tokenizer.size = 35
    path = save(tmp_path, {"hyper_parameters": {"tokenizer": tokenizer}})
    found = read_checkpoint(path, KEY)["hyper_parameters"]["tokenizer"]
    assert isinstance(found, Record)
    assert found.name == "dataloader.Text8Tokenizer"
    assert found.state == {"size": 35}


def test_a_teacher_is_left_out(tmp_path):
    weights = {"backbone.w": torch.ones(1), "teacher.w": torch.zeros(1)}
    path = save(tmp_path, {"state_dict": weights})
    assert list(read_checkpoint(path, KEY)["state_dict"]) == ["backbone.w"]


def test_classes_elsewhere_are_refused_by_name(tmp_path):
    path = save(tmp_path, {"x": Runs(Record)})
    refused(lambda: read_checkpoint(path, KEY), "class checkpoints.Record", path)
