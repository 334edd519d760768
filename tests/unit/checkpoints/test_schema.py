"""What a file says of itself is compared with a schema when it is read; nothing of its
config is interpolated, and its names are no paths.
"""

import pytest
import torch
from exported import export, save_tiny
from omegaconf import OmegaConf
from refusals import refused

from checkpoints.about import adopt, describe
from checkpoints.checkpoint import Checkpoint
from checkpoints.keys import key_report
from checkpoints.reading import read_checkpoint
from evaluation.harness import complete

KEY = "eval.checkpoint_path"
EMA = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(2)]}
MISFITS = {
    "ema": (3, [], "x", {}, {"decay": 0.9}, EMA | {"decay": 7}, EMA | {"decay": "x"}),
    "ema ": (
        *(EMA | {"num_updates": -1}, EMA | {"num_updates": 0.5}),
        *(EMA | {"shadow_params": None}, EMA | {"shadow_params": [3]}),
        EMA | {"shadow_params": [torch.ones(2, dtype=torch.int64)]},
    ),
    "global_step": (-1, "x", 0.5, True, 1 << 60, [], torch.ones(2)),
    "epoch": (-1, "x", {}),
    "teacher": (3, {"round": -1}, {"sha256": 3}, {"round": "x"}),
    "pytorch-lightning_version": (3, [], "x" * 20_000),
    "state_dict": ({"w": 3}, {3: torch.ones(1)}, {"w": [torch.ones(1)]}, {"w": None}),
}
CASES = [(name, i) for name, values in MISFITS.items() for i in range(len(values))]


def save(tmp_path, content) -> str:
    torch.save(content, tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt")


@pytest.mark.parametrize(("name", "index"), CASES)
def test_entries_of_another_kind_are_refused(tmp_path, name, index):
    path = save(tmp_path, {name.strip(): MISFITS[name][index]})
    refused(lambda: read_checkpoint(path, KEY), KEY, path, name.strip())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("algo.name", x) for x in ("../x", "/etc/x", "a/b", ".", "", 3, [], "a\nb")),
        *(("model.length", x) for x in (0, -1, "8", 1 << 40, True, 8.0, [8])),
        *(("model.dropout", x) for x in ("x", 2, -0.5, float("nan"))),
        *(("algo.T", x) for x in (-1, "x", None.__class__)),
        *(("algo.time_conditioning", x) for x in ("False", 1, [])),
        *(("data.tokenizer_name_or_path", x) for x in (3, ["gpt2"], {})),
        *(("noise.type", x) for x in ("../x", ["${x}"], 3)),
        ("loader.batch_size", 0),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, key, value):
    group, name = key.split(".")
    config = {group: {name: value if not isinstance(value, type) else b"x"}}
    path = save(tmp_path, {"hyper_parameters": {"config": config}})
    refused(lambda: read_checkpoint(path, KEY), KEY, path, key)


@pytest.mark.parametrize("settings", [{}, {"config": {}}, {"config": {"algo": 3}}])
def test_what_is_not_there_is_not_stated(tmp_path, settings):
    found = read_checkpoint(save(tmp_path, {"hyper_parameters": settings}), KEY)
    assert found.setting("algo.name") is None
    assert describe(found)["algorithm"] == "not stated"


# ---------------------------------------------------------------- references

SECRET = "${oc.env:DOORS_SECRET}"
REFERENCES = (
    *(SECRET, f"a{SECRET}b", [SECRET], ["a", [SECRET]], ("x", SECRET), {"a": SECRET}),
    *({SECRET: 1}, [{"a": SECRET}], "${model.length}", "${"),
)


@pytest.mark.parametrize("value", REFERENCES)
def test_nothing_is_interpolated(compose, monkeypatch, value):
    monkeypatch.setenv("DOORS_SECRET", "hunter2")
    config = compose("algo=mdlm")
    before = OmegaConf.to_container(config, resolve=False)
    adopt(config, Checkpoint(config={"noise": {"x": value}}), ["noise.x"])
    assert OmegaConf.to_container(config, resolve=False) == before


@pytest.mark.parametrize("value", [3, 0.5, "gpt2", True, [1, [2]], ["a"]])
def test_plain_values_are_taken_over(compose, value):
    config = compose("algo=mdlm")
    adopt(config, Checkpoint(config={"noise": {"x": value}}), ["noise.x"])
    assert config.noise.x == value


# ---------------------------------------------------------------- names

PATHS = (
    "../../x/evil",
    "/x/evil",
    "evil",
    "mdlm.yaml",
    "mdlm/../mdlm",
    "${x}",
    "mdlm ",
)


@pytest.mark.parametrize("name", PATHS)
def test_an_algorithm_is_found_by_its_name_alone(tmp_path, monkeypatch, capsys, name):
    """No YAML elsewhere is loaded, wherever it is; nothing is exported."""
    monkeypatch.setenv("DOORS_SECRET", "hunter2")
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", "data.tokenizer_name_or_path=bytes")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"name: evil\n_target_: algo.MDLM\nT: {SECRET}\n")
    if "evil" in name:
        name = name.replace("x/evil", f"{'../' * 15}{tmp_path}/evil")
    content["hyper_parameters"]["config"]["algo"] = {"name": name}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(SystemExit) as end:
        export(tmp_path / "a.ckpt", tmp_path / "out")
    assert end.value.code == 2
    assert "hunter2" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PATHS)
def test_downstream_tasks_find_an_algorithm_by_its_name_alone(name):
    checkpoint = Checkpoint(config={"algo": {"name": name}})
    refused(lambda: complete([], checkpoint), "overrides='algo=...'")


# ---------------------------------------------------------------- types of weights


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_no_floats_do_not_fit(kind):
    """Bits of floats that are taken for whole numbers would be weights, too."""
    module = torch.nn.Linear(2, 3)
    weights = module.state_dict() | {"weight": torch.ones(3, 2).to(kind)}
    report = key_report(module, weights)
    assert len(report.retyped) == 1
    refused(lambda: report.raise_if_any("a.ckpt"), "retyped", "weight")
