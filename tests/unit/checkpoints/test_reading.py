"""Checkpoint files: objects in them become records, and nothing of them runs."""

import os
import pickle

import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused

import main
from checkpoints.about import describe, disagreements
from checkpoints.checkpoint import Checkpoint
from checkpoints.reading import Record, read_checkpoint

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
    found = read_checkpoint(path, KEY).lightning["hyper_parameters"]["x"]
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
    settings = read_checkpoint(path, KEY).lightning["hyper_parameters"]
    assert settings == {"config": content, "k": 3}
    assert type(settings["config"]["a"]["b"]) is list


def test_a_tokenizer_becomes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr("dataloader.Text8Tokenizer", Text8Tokenizer, raising=False)
    tokenizer = Text8Tokenizer()
    tokenizer.size = 35
    path = save(tmp_path, {"hyper_parameters": {"tokenizer": tokenizer}})
    found = read_checkpoint(path, KEY).lightning["hyper_parameters"]["tokenizer"]
    assert isinstance(found, Record)
    assert found.name == "dataloader.Text8Tokenizer"
    assert found.state == {"size": 35}


def test_a_teacher_is_left_out(tmp_path):
    weights = {"backbone.w": torch.ones(1), "teacher.w": torch.zeros(1)}
    path = save(tmp_path, {"state_dict": weights})
    assert list(read_checkpoint(path, KEY).weights) == ["backbone.w"]


def test_classes_elsewhere_are_refused_by_name(tmp_path):
    path = save(tmp_path, {"x": Runs(Record)})
    refused(
        lambda: read_checkpoint(path, KEY), "class checkpoints.reading.Record", path
    )


# ---------------------------------------------------------------- what a file is


def of(algo: str, **more) -> Checkpoint:
    """A checkpoint of a run with an algorithm."""
    settings = {
        "algo": {"name": algo},
        "data": {"tokenizer_name_or_path": "gpt2", "train": "openwebtext"},
        "model": {"length": 1024},
    }
    weights = {
        "backbone.vocab_embed.embedding": torch.zeros(9, 4),
        "backbone.rotary_emb.inv_freq": torch.zeros(2),
    }
    content = {"hyper_parameters": {"config": settings}, "state_dict": weights}
    return Checkpoint.of_lightning(content | {"global_step": 7, "epoch": 1} | more)


def test_description():
    ema = {"decay": 0.5, "num_updates": 3, "shadow_params": []}
    lines = describe(of("mdlm", ema=ema, optimizer_states=[{}]))
    assert lines == {
        "algorithm": "mdlm",
        "likelihood": "an upper bound, comparable",
        "tokenizer": "gpt2",
        "training data": "openwebtext",
        "length": "1024",
        "vocabulary": "9",
        "parameters": "36",
        "step": "7",
        "epoch": "1",
        "EMA": "decay 0.5, 3 updates",
        "optimiser state": "yes",
    }
    assert describe(of("ar"))["likelihood"] == "exact"
    distilled = describe(of("distillation", teacher={"round": 2, "sha256": ""}))
    assert distilled["likelihood"].startswith("not comparable")
    assert distilled["distillation round"] == "2"


def test_description_of_what_says_little():
    lines = describe(Checkpoint(weights={}))
    assert lines["algorithm"] == lines["parameters"] == "not stated"
    assert lines["EMA"] == "none"
    assert "likelihood" not in lines


def test_inspect_prints_it(compose, tmp_path, capsys):
    path = save(tmp_path, of("distillation").lightning)
    config = compose("mode=inspect", f"eval.checkpoint_path={path}")
    assert main.MODES["inspect"](config)["algorithm"] == "distillation"
    assert "not comparable" in capsys.readouterr().out.replace("\n", " ")
    config.eval.checkpoint_path = ""
    refused(lambda: main.inspect(config), "eval.checkpoint_path is empty")


@pytest.mark.parametrize(
    ("algo", "overrides", "named"),
    [
        ("mdlm", ["algo=mdlm"], []),
        ("duo", ["algo=duo_base"], []),
        ("duo", ["algo=distillation"], []),
        ("mdlm", ["algo=duo_base"], ["algo=mdlm, not duo_base"]),
        ("sedd", ["algo=ar", "model.length=8"], ["algo=sedd", "model.length=1024"]),
        ("mdlm", ["algo=mdlm", "data.tokenizer_name_or_path=b"], ["gpt2, not b"]),
        ("distillation", ["algo=duo_base"], []),
        ("distillation", ["algo=duo_base", "mode=ppl_eval"], ["not comparable"]),
    ],
)
def test_disagreements_with_the_command_line(compose, algo, overrides, named):
    same = {"model.length": 1024, "data.tokenizer_name_or_path": "gpt2"}
    rest = (f"{k}={v}" for k, v in same.items() if f"{k}=" not in " ".join(overrides))
    lines = disagreements(of(algo), compose(*rest, *overrides, tiny=False))
    assert len(lines) == len(named)
    for line, part in zip(lines, named, strict=True):
        assert part in line
        assert "\n" not in line


def test_what_a_network_was_told_of_the_noise_is_compared(compose):
    """The time after a change of variables; not where it was told nothing."""
    key = "training.change_of_variables"
    checkpoint = Checkpoint(weights={}, config={"training": {key.split(".")[1]: True}})
    timed = ("algo=mdlm", "algo.time_conditioning=True")
    (line,) = disagreements(checkpoint, compose(*timed))
    assert f"{key}=True, not False" in line
    assert disagreements(checkpoint, compose(*timed, f"{key}=True")) == []
    assert disagreements(checkpoint, compose("algo=mdlm")) == []


def test_loading_warns(make_model, compose):
    model = make_model("algo=mdlm")
    checkpoint = of("sedd", state_dict=model.state_dict())
    with pytest.warns(UserWarning, match=r"eval\.checkpoint_path.*algo=sedd, not mdlm"):
        model.load_weights(checkpoint, "eval.checkpoint_path")


@pytest.mark.parametrize("odd", [None, 3, "x", [1]])
def test_a_file_may_hold_anything_under_these_names(make_model, tmp_path, odd):
    """What is no config states nothing, what are no weights is not loaded."""
    settings = {"hyper_parameters": odd}, {"hyper_parameters": {"config": odd}}
    for content in settings:
        found = read_checkpoint(save(tmp_path, content | {"state_dict": odd}), KEY)
        assert found.setting("algo.name") is None
        assert found.weights is None
        model = make_model("algo=mdlm")
        refused(lambda m=model, x=found: m.load_weights(x, KEY), KEY, "no state_dict")
    nested = Checkpoint(config={"algo": odd})
    assert nested.setting("algo.name") is None
    assert nested.setting("algo") == odd


def test_a_file_that_says_nothing_disagrees_with_nothing(compose):
    assert disagreements(Checkpoint(weights={}), compose("algo=mdlm")) == []
