"""Lightning files of MDLM's code: what they say, in the words of this one."""

import os

import pytest
import torch
from mdlm_files import CONFIG, write_file
from omegaconf import OmegaConf
from refusals import refused

from checkpoints.about import describe, disagreements
from checkpoints.mdlm import ALGORITHMS, MOVED, OWN_PARAMETERIZATIONS, own_config
from checkpoints.reading import read_checkpoint
from cli.settle import adopt_network
from utils import ConfigError

KEY = "eval.checkpoint_path"


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("told", [True, False])
def test_the_config_of_a_file(tmp_path, name, told):
    """The algorithm and its keys are where they are here; all else stays."""
    path, T = str(tmp_path / "a.ckpt"), 1000 if name == "d3pm" else 0
    changes = {"parameterization": name, "time_conditioning": told, "T": T}
    write_file(path, 7, backbone="ar" if name == "ar" else "dit", **changes)
    found = read_checkpoint(path, KEY)
    assert found.config["algo"] == {
        "name": ALGORITHMS[name],
        "backbone": "dit",
        "parameterization": OWN_PARAMETERIZATIONS[ALGORITHMS[name]],
        "time_conditioning": told,
        "T": T,
        "subs_masking": False,
        "causal_attention": name == "ar",
    }
    assert found.setting("noise.type") == "log-linear"
    gone = {"diffusion", "parameterization", *MOVED}
    assert found.config.keys() == CONFIG.keys() - gone | {"algo"}
    assert found.config["model"] == CONFIG["model"]
    assert found.config["checkpointing"]["save_dir"] == "${cwd:}"
    assert found.lightning["hyper_parameters"]["config"] is found.config


def test_what_a_file_is(tmp_path):
    path = str(tmp_path / "a.ckpt")
    write_file(path, 7)
    lines = describe(read_checkpoint(path, KEY))
    assert lines["algorithm"] == "mdlm"
    assert lines["likelihood"] == "an upper bound, comparable"
    assert lines["tokenizer"] == "gpt2"
    assert (lines["length"], lines["vocabulary"]) == ("16", "7")
    assert (lines["step"], lines["optimiser state"]) == ("1000000", "yes")
    assert lines["EMA"] == "decay 0.9999, 1000000 updates"


def test_it_is_compared_with_the_command_line(tmp_path, compose):
    path = str(tmp_path / "a.ckpt")
    write_file(path, 7, parameterization="sedd", time_conditioning=True)
    found = read_checkpoint(path, KEY)
    more = ("model.length=16", "data.tokenizer_name_or_path=gpt2")
    same = compose("algo=sedd", "data=openwebtext", *more)
    assert disagreements(found, same) == []
    other = compose("algo=mdlm", "data=openwebtext", *more)
    assert disagreements(found, other) == [
        "the file was made with algo=sedd, not mdlm",
        "the file was made with algo.time_conditioning=True, not False",
    ]


def test_a_file_of_a_run_from_the_hub(tmp_path, compose):
    """Its weights have two prefixes; the network is as large as it says."""
    path = str(tmp_path / "a.ckpt")
    content = write_file(path, 7, backbone="hf_dit")
    assert all(x.startswith("backbone.backbone.") for x in content["state_dict"])
    found = read_checkpoint(path, KEY)
    assert "backbone.vocab_embed.embedding" in found.weights
    config = compose(
        "mode=ppl_eval", "algo=mdlm", "algo.backbone=hf_dit", f"{KEY}={path}"
    )
    adopt_network(config)
    assert config.model.hidden_size == CONFIG["model"]["hidden_size"]
    assert config.model.length == 8  # that of the command


def test_a_file_of_ar_is_causal(tmp_path, compose):
    path = str(tmp_path / "a.ckpt")
    write_file(path, 7, parameterization="ar", backbone="ar")
    words = ("mode=ppl_eval", "algo.backbone=hf_dit", f"{KEY}={path}")
    adopt_network(compose("algo=ar", *words))
    refused(lambda: adopt_network(compose("algo=mdlm", *words)), "causal=True")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"algo": {"name": "mdlm"}},
        {"algo": {"name": "mine"}, "parameterization": "subs"},
        {"backbone": "dit", "T": 0},
    ],
)
def test_a_config_of_ours_stays(config):
    assert own_config(config) is None


ODD = [[], {}, None, 3, "mine", "${x}", ["subs"], {"a": 1}, float("nan")]


@pytest.mark.parametrize("odd", ODD, ids=map(str, ODD))
@pytest.mark.parametrize("key", ["parameterization", *MOVED, "noise", "diffusion"])
def test_odd_values(tmp_path, key, odd):
    """What has no meaning is kept, or refused in one line; nothing else fails."""
    assert own_config({"parameterization": "subs"} | {key: odd}) is not None
    config = OmegaConf.create(CONFIG | {key: odd})
    path = str(tmp_path / "a.ckpt")
    torch.save({"hyper_parameters": {"config": config}}, path)
    try:
        found = read_checkpoint(path, KEY)
    except ConfigError as error:
        said = str(error)
    else:
        assert "parameterization" not in found.config
        return
    own = {"parameterization": "algo.name", "noise": "noise.type"}
    assert f"{KEY}={path!r} cannot be read safely: its config's " in said
    assert own.get(key, f"algo.{key}") in said


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("loglinear", "log-linear"), ("cosine", "cosine-mdlm"), ("linear", "linear")],
)
def test_names_of_schedules(theirs, ours):
    config = {"parameterization": "subs", "noise": {"type": theirs, "eps": 1e-3}}
    assert own_config(config)["noise"] == {"type": ours, "eps": 1e-3}
    config["noise"]["sigma_max"] = 20  # which the first never reads
    is_read = theirs != "loglinear"
    assert ("sigma_max" in own_config(config)["noise"]) is is_read


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["tokenizer", "sampler", "loops"])
def test_nothing_of_a_file_is_executed(tmp_path, place):
    path, marker = str(tmp_path / "a.ckpt"), tmp_path / "RAN"
    content = write_file(path, 7)
    call = Runs(f"touch {marker}")
    if place == "tokenizer":
        content["hyper_parameters"]["tokenizer"] = call
    else:
        content[place] = {"x": call}
    torch.save(content, path)
    refused(lambda: read_checkpoint(path, KEY), "class posix.system")
    assert not marker.exists()
