"""Hugging Face folders and hub ids as checkpoints."""

import json
import time

import pytest
import torch
from exported import export, save_tiny
from refusals import refused
from released import SIZES, random_weights, write_released
from safetensors.torch import save_file

import main
import utils
from checkpoints import huggingface
from checkpoints.about import adopt, describe, disagreements
from checkpoints.checkpoint import Checkpoint
from checkpoints.huggingface import DOWNLOADED, INDEX, read_about, read_hub
from checkpoints.locating import is_folder_or_hub_id
from checkpoints.reading import read_checkpoint
from cli.settle import adopt_network

KEY = "eval.checkpoint_path"
NUMBERS = ("vocab_size", "model_length", *SIZES)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def folder(tmp_path):
    write_released(tmp_path / "mdlm", "mdlm", vocab_size=7, length=8)
    return tmp_path / "mdlm"


def change(folder, **fields) -> str:
    """Sets fields of config.json; None takes one away."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(content))
    return str(folder)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("kind", "algo", "told"), [("DUO", "duo", True), ("mdlm", "mdlm", False)]
)
def test_a_released_folder(tmp_path, kind, algo, told):
    weights = write_released(tmp_path / "a", kind, vocab_size=7, length=8)
    found = read_checkpoint(str(tmp_path / "a"), KEY)
    assert same(found.weights, weights)
    assert found.config == {
        "algo": {"name": algo, "causal_attention": False, "time_conditioning": told},
        "model": {
            "length": 8,
            "hidden_size": 32,
            "cond_dim": 12,
            "n_blocks": 2,
            "n_heads": 2,
            "dropout": 0.0,
        },
    }
    assert not (tmp_path / "a" / "RAN").exists()


@pytest.mark.parametrize("prefix", ["", "backbone.backbone."])
def test_names_with_another_prefix(folder, prefix):
    weights = random_weights(7)
    renamed = {prefix + k.removeprefix("backbone."): x for k, x in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    assert same(read_hub(str(folder), KEY).weights, weights)


def test_weights_in_several_files(folder):
    weights = random_weights(7)
    (folder / "model.safetensors").unlink()
    files = [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
    places = {name: files[i % 3] for i, name in enumerate(weights)}
    for file in files:
        part = {name: x for name, x in weights.items() if places[name] == file}
        save_file(part, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    assert same(read_hub(str(folder), KEY).weights, weights)
    (folder / files[1]).unlink()
    refused(lambda: read_hub(str(folder), KEY), KEY, files[1], "cannot be read")


@pytest.mark.parametrize("names", [{"a": "../b.safetensors"}, {"a": 3}, {}, [1]])
def test_an_index_that_lists_no_files(folder, names):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    refused(lambda: read_hub(str(folder), KEY), KEY, INDEX, "does not list files")


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(
        lambda: read_hub(str(folder), KEY),
        f"{KEY}={str(folder)!r} holds no model.safetensors",
        "pytorch_model.bin is a pickle",
    )


def test_a_broken_file(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refused(lambda: read_hub(str(folder), KEY), KEY, "model.safetensors", "be read")


@pytest.mark.parametrize("name", [x for x in NUMBERS if x != "dropout"])
@pytest.mark.parametrize("value", [None, "32", 0, True, 2.0])
def test_sizes_are_numbers(folder, name, value):
    path = change(folder, **{name: value})
    refused(lambda: read_hub(path, KEY), KEY, path, "config.json", f"{name}={value!r}")


@pytest.mark.parametrize("name", ["dropout", "causal", "time_conditioning"])
def test_other_fields_are_of_their_type(folder, name):
    path = change(folder, **{name: "no"})
    refused(lambda: read_hub(path, KEY), KEY, "config.json", f"{name}='no', not a")


def test_the_width_of_the_conditioning_is_the_files(folder):
    """The default of the published class, 129, is a misprint."""
    assert read_hub(str(folder), KEY).setting("model.cond_dim") == 12


def test_folders_of_others_are_refused(folder, tmp_path):
    path = change(folder, model_type="gpt2")
    refused(lambda: read_hub(path, KEY), "model_type='gpt2'", "DUO, mdlm")
    (folder / "config.json").write_text("{")
    refused(lambda: read_hub(path, KEY), KEY, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refused(lambda: read_hub(path, KEY), KEY, "config.json holds no fields")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(lambda: read_hub(str(empty), KEY), str(empty), "config.json", "is none")


def test_other_shapes_are_reported(folder, make_model):
    model = make_model("algo=mdlm", "model.cond_dim=12", "model.n_blocks=1")
    found = read_checkpoint(str(folder), KEY)
    refused(lambda: model.load_weights(found, KEY), KEY, "unexpected", "blocks.1")
    model = make_model("algo=mdlm", "model.cond_dim=13")
    refused(lambda: model.load_weights(found, KEY), "reshaped", "12")


# ---------------------------------------------------------------- hub ids


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_folder_or_hub_id("kuleshov-group/mdlm-no_flashattn-fp32-owt")
    for path in ("gpt2", "/no/such.ckpt", "runs/last.ckpt", "a/b/c", "memory://a/b"):
        assert not is_folder_or_hub_id(path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "file").touch()
    assert not is_folder_or_hub_id("owner/file")
    assert is_folder_or_hub_id("owner")


def test_a_hub_id_out_of_reach_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(utils, "hub_answers", lambda: False)
    start = time.monotonic()
    refused(
        lambda: read_checkpoint("no-such-owner/no-such-model", KEY),
        f"{KEY}='no-such-owner/no-such-model' is no local folder",
        "hub",
    )
    assert time.monotonic() - start < 5


def test_code_and_pickles_are_not_downloaded(folder, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface, "hub_options", lambda _: {"local_files_only": False}
    )
    found = read_checkpoint("owner/name", KEY)
    assert found.setting("algo.name") == "mdlm"
    assert asked == {
        "name": "owner/name",
        "allow_patterns": DOWNLOADED,
        "local_files_only": False,
    }
    assert not any(name.endswith((".py", ".bin", "*")) for name in DOWNLOADED)


def test_the_distilled_model_is_known_by_its_id(tmp_path, monkeypatch):
    """Its config.json is that of the other one."""
    write_released(tmp_path / "a", "DUO", vocab_size=7, length=8)
    monkeypatch.setattr(huggingface, "downloaded_folder", lambda *_: tmp_path / "a")
    lines = describe(read_hub("s-sahoo/duo-distilled", KEY))
    assert lines["algorithm"] == "distillation"
    assert "not comparable" in lines["likelihood"]
    assert "unless distilled" in describe(read_hub("s-sahoo/duo", KEY))["likelihood"]


# ---------------------------------------------------------------- in a run


def test_the_network_is_that_of_the_folder(folder, compose):
    config = compose("algo=mdlm", "algo.backbone=hf_dit", f"{KEY}={folder}")
    config.mode, config.model.length = "ppl_eval", 5
    adopt_network(config)
    sizes = {"hidden_size": 32, "cond_dim": 12, "n_blocks": 2, "n_heads": 2}
    assert sizes.items() <= dict(config.model).items()
    assert config.model.length == 5


@pytest.mark.parametrize("key", ["training.finetune_path", KEY])
def test_fine_tuning_starts_from_either_path(folder, compose, key):
    """MDLM's commands name the folder as the checkpoint to evaluate."""
    config = compose("algo=mdlm", "algo.backbone=hf_dit", f"{key}={folder}")
    adopt_network(config)
    assert config.training.finetune_path == str(folder)
    assert config.model.cond_dim == 12


def test_the_network_of_a_checkpoint_file(compose, tmp_path):
    made = {"model": {"hidden_size": 48, "n_heads": 4, "dropout": "${a.b}"}}
    weights = {"backbone.vocab_embed.embedding": torch.ones(9, 48)}
    content = {"state_dict": weights, "hyper_parameters": {"config": made}}
    torch.save(content, tmp_path / "a.ckpt")
    path = f"{KEY}={tmp_path}/a.ckpt"
    config = compose("mode=ppl_eval", "algo=mdlm", "algo.backbone=hf_dit", path)
    before = config.model.copy()
    adopt_network(config)
    assert (config.model.hidden_size, config.model.n_heads) == (48, 4)
    assert config.model.cond_dim == before.cond_dim
    assert config.model.dropout == before.dropout


HUGE = {"hidden_size": 1 << 30, "n_blocks": 1 << 30, "cond_dim": 1 << 30, "n_heads": 7}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_that_the_weights_do_not_have_are_refused(compose, tmp_path, name):
    """Before a network of them is built, which would take all memory."""
    made = {"hidden_size": 48, "n_blocks": 1, "cond_dim": 3, "n_heads": 4}
    weights = {
        "backbone.vocab_embed.embedding": torch.ones(9, 48),
        "backbone.sigma_map.mlp.0.weight": torch.ones(3, 256),
        "backbone.blocks.0.norm1.weight": torch.ones(48),
    }
    content = {"state_dict": weights}
    content |= {"hyper_parameters": {"config": {"model": made | {name: HUGE[name]}}}}
    torch.save(content, tmp_path / "a.ckpt")
    path = f"{KEY}={tmp_path}/a.ckpt"
    config = compose("mode=ppl_eval", "algo=mdlm", "algo.backbone=hf_dit", path)
    refused(lambda: adopt_network(config), f"{name}={HUGE[name]}")


@pytest.mark.parametrize("name", ["hidden_dim", "n_blocks", "cond_dim", "n_heads"])
@pytest.mark.parametrize("value", [7, 1 << 30, 1 << 40])
def test_sizes_of_a_folder_are_those_of_its_weights(tmp_path, name, value):
    write_released(tmp_path / "a", "DUO", vocab_size=9, length=8)
    fields = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(fields | {name: value}))
    refused(lambda: read_about(str(tmp_path / "a"), KEY), str(value))


def test_without_hf_dit_nothing_is_adopted(folder, compose):
    config = compose("mode=ppl_eval", "algo=mdlm", f"{KEY}={folder}")
    before = config.copy()
    adopt_network(config)
    assert config == before


@pytest.mark.parametrize("mode", ["train", "ppl_eval", "sample_eval"])
def test_hf_dit_needs_a_folder(compose, mode):
    config = compose(f"mode={mode}", "algo=mdlm", "algo.backbone=hf_dit")
    key = "training.finetune_path" if mode == "train" else KEY
    refused(lambda: adopt_network(config), f"{key} is empty", "algo.backbone=hf_dit")


def test_attention_of_the_other_kind_is_refused(folder, compose):
    more = ("mode=ppl_eval", "algo.backbone=hf_dit", f"{KEY}={folder}")
    config = compose("algo=ar", *more)
    refused(lambda: adopt_network(config), KEY, "causal=False", "algo=ar")


def test_adopting_creates_keys(compose):
    config = compose("algo=mdlm", "data=text8")
    stated = Checkpoint(config={"data": {"vocab_size": 9}})
    adopt(config, stated, [])
    assert "vocab_size" not in config.data
    adopt(config, stated, ["data.vocab_size", "model.length"])
    assert (config.data.vocab_size, config.model.length) == (9, 8)


def test_another_time_conditioning_is_named(folder, compose):
    found = read_checkpoint(str(folder), KEY)
    config = compose("algo=mdlm", "algo.time_conditioning=True")
    (line,) = disagreements(found, config)
    assert "algo.time_conditioning=False, not True" in line
    assert not disagreements(found, compose("algo=mdlm"))


def test_checkpoints_of_published_hf_dit_runs(tmp_path):
    weights = random_weights(7)
    state = {f"backbone.{name}": x for name, x in weights.items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert same(read_checkpoint(f"{tmp_path}/a.ckpt", KEY).weights, weights)


def test_inspecting_a_folder(folder, compose, capsys):
    lines = main.inspect(compose("mode=inspect", f"{KEY}={folder}"))
    assert lines["format"] == "Hugging Face, model_type mdlm"
    assert (lines["algorithm"], lines["length"]) == ("mdlm", "8")
    assert lines["vocabulary"] == "7"
    weights = random_weights(7).items()
    count = sum(x.numel() for name, x in weights if "inv_freq" not in name)
    assert lines["parameters"] == f"{count:,}"
    assert "model_type mdlm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("dropout", x) for x in (2.0, -1.0, float("nan"), float("inf"))),
        *(("algorithm", x) for x in ("../mdlm", "/etc/passwd", "${x}/y", "a\nb")),
        *(("noise", "../x"), ("noise_eps", -1.0), ("T", -5), ("step", -1)),
        *(("step", "x"), ("weights", 3), ("likelihood", [1]), ("model_type", ["x"])),
        *(("n_heads", 0), ("vocab_size", 1 << 99), ("tokenizer", "x" * 20_000)),
    ],
)
def test_fields_out_of_range_are_refused(tmp_path, field, value):
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", "data.tokenizer_name_or_path=bytes")
    export(tmp_path / "a.ckpt", tmp_path / "a")
    path = tmp_path / "a/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if isinstance(value, str) and value.startswith("${"):
        found = read_about(str(tmp_path / "a"), KEY)  # is not taken over
        assert found.setting("algo.name") == value
    else:
        refused(lambda: read_about(str(tmp_path / "a"), KEY), KEY, "config.json")


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5, "{", "\x00", "[]"])
def test_fields_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    refused(lambda: read_about(str(tmp_path), KEY), KEY, "config.json")


@pytest.mark.parametrize("fields", [{"model_type": "bd3lm"}, {"block_size": 16}])
def test_published_models_of_blocks_are_refused(folder, fields):
    """Their network is not known to be ours."""
    path = change(folder, **fields)
    refused(lambda: read_checkpoint(path, KEY), path, "algo.block_size")
