"""`mode=export`: what the folder holds, what is refused, what a failure leaves."""

import ast
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exported import export, files_of, save_tiny
from released import write_released
from safetensors.torch import load_file

from checkpoints import export as exporter
from checkpoints.reading import read_checkpoint
from models.noise import SCHEDULES, settings_of

FOREIGN = Path(exporter.__file__).parent / "modeling"
MODELLING = sorted(FOREIGN.glob("*_discrete_diffusion.py"))
BYTES = "data.tokenizer_name_or_path=bytes"


@pytest.fixture
def source(tmp_path):
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", BYTES)
    return tmp_path / "a.ckpt"


def refused(capsys, *arguments) -> str:
    """The line that ends a refused export."""
    with pytest.raises(SystemExit) as end:
        export(*arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------- what is written


def test_the_folder(source, tmp_path):
    lines = export(source, tmp_path / "out")
    assert sorted(files_of(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "configuration_discrete_diffusion.py",
        "model.safetensors",
        "modeling_discrete_diffusion.py",
        "network_discrete_diffusion.py",
        "sampling_discrete_diffusion.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "model_type": "discrete_diffusion",
        "vocab_size": 260,
        "model_length": 8,
        "causal": False,
        "hidden_dim": 32,
        "cond_dim": 16,
        "n_blocks": 2,
        "n_heads": 2,
        "dropout": 0,
        "algorithm": "mdlm",
        "process": "absorbing",
        "time_conditioning": False,
        "mask_index": 258,
        "tokenizer": "bytes",
        "training_data": "synthetic",
        "step": 7,
        "weights": "EMA",
    }
    assert expected.items() <= fields.items()
    card = (tmp_path / "out" / "README.md").read_text()
    for shown in ("mdlm", "comparable", "| 7 |", "EMA", "licence", lines["parameters"]):
        assert shown in card
    assert "{" not in card
    for path in MODELLING:
        assert (tmp_path / "out" / path.name).read_text() == path.read_text()


def test_ema_weights_unless_disabled(source, tmp_path):
    saved = read_checkpoint(str(source), "x")
    raw, ema = saved.weights, saved.ema["shadow_params"]
    export(source, tmp_path / "ema")
    lines = export(source, tmp_path / "raw", "eval.disable_ema=True")
    assert lines["weights"] == "raw"
    assert "| weights | raw |" in (tmp_path / "raw" / "README.md").read_text()
    written = weights_of(tmp_path / "raw")
    assert written.keys() == raw.keys()
    assert all(torch.equal(x, raw[name]) for name, x in written.items())
    written = weights_of(tmp_path / "ema")
    names = [name for name in raw if "inv_freq" not in name]
    for name, x in zip(names, ema, strict=True):
        assert torch.equal(written[name], x)


@pytest.mark.parametrize("stated", [True, False])
def test_the_checkpoint_says_what_it_is(stated, tmp_path):
    """Where it does not, the command line does."""
    missing = "" if stated else "algo"
    save_tiny(tmp_path / "a.ckpt", "algo=duo_base", BYTES, config_of=missing)
    export(tmp_path / "a.ckpt", tmp_path / "out", "algo=distillation")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["algorithm"] == ("duo_base" if stated else "distillation")
    assert ("not comparable" in fields["likelihood"]) is not stated


def test_all_of_the_algorithm_is_that_of_the_checkpoint(tmp_path):
    """Also where it is silent: the defaults are those of its algorithm."""
    write_released(tmp_path / "mdlm", "mdlm", vocab_size=260, length=8)
    export(tmp_path / "mdlm", tmp_path / "out", "algo=d3pm", BYTES)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"algorithm": "mdlm", "parameterization": "subs", "T": 0}
    assert expected.items() <= fields.items()
    assert fields["training_data"] is None
    assert fields["step"] is None
    assert fields["weights"] == "raw"


def test_what_may_be_distilled_says_so(tmp_path):
    write_released(tmp_path / "duo", "DUO", vocab_size=260, length=8)
    export(tmp_path / "duo", tmp_path / "out", BYTES)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "comparable unless distilled" in card


def test_a_path_of_another_machine_says_nothing(source, tmp_path):
    saved = torch.load(source, weights_only=True)
    node = saved["hyper_parameters"]["config"]
    node["data"]["tokenizer_name_or_path"] = "/of/somebody/else"
    torch.save(saved, source)
    export(source, tmp_path / "out", BYTES)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["tokenizer"] == "bytes"


def test_a_published_tokenizer(pretrained, tmp_path):
    """The same ids, without a path of this machine, in a file old versions read."""
    from transformers import AutoTokenizer

    overrides = ("algo=mdlm", f"data.tokenizer_name_or_path={pretrained}")
    save_tiny(tmp_path / "a.ckpt", *overrides, "model.hidden_size=4")
    export(tmp_path / "a.ckpt", tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    options = {"trust_remote_code": False}
    one = AutoTokenizer.from_pretrained(pretrained)
    two = AutoTokenizer.from_pretrained(tmp_path / "out", **options)
    text = "Hello, wörld! It's 12345 \n ok"
    assert one(text)["input_ids"] == two(text)["input_ids"]
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert all(isinstance(merge, str) for merge in merges.get("merges", []))
    for path in (tmp_path / "out").glob("*.json"):
        assert pretrained not in path.read_text()
        assert "is_local" not in path.read_text()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_says(umask, source, tmp_path):
    before = os.umask(umask)
    try:
        export(source, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(
    ("algo", "tokenizer", "tag", "auto_class"),
    [
        ("ar", "bytes", "text-generation", "AutoModelForCausalLM"),
        ("mdlm", "bytes", "fill-mask", "AutoModelForMaskedLM"),
        ("mdlm", "text8", "fill-mask", "AutoModelForMaskedLM"),
        ("duo_base", "bytes", None, "AutoModelForMaskedLM"),
    ],
)
def test_the_pipeline_of_the_card_is_one_that_works(
    algo, tokenizer, tag, auto_class, tmp_path
):
    given = f"data.tokenizer_name_or_path={tokenizer}"
    save_tiny(tmp_path / "a.ckpt", f"algo={algo}", given)
    export(tmp_path / "a.ckpt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    found = re.findall(r"pipeline_tag: (.*)|pipeline\(\"(.*?)\"", card)
    assert {name for pair in found for name in pair if name} == ({tag} - {None})
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(fields["auto_map"]) == {"AutoConfig", "AutoModel", auto_class}
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_mask_beyond_the_tokenizer_is_for_no_pipeline(pretrained, tmp_path):
    """As with GPT-2's; BERT's has a mask."""
    given = f"data.tokenizer_name_or_path={pretrained}"
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", given, "model.hidden_size=4")
    export(tmp_path / "a.ckpt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("pipeline" in card) is ("bert" in pretrained)


def test_the_lowest_perplexity_of_the_run(source, tmp_path):
    """Which is that of the EMA weights; what is no such note says nothing."""
    saved = torch.load(source, weights_only=True)
    note = {"monitor": "val/nll", "best_model_score": torch.tensor(1.5)}
    saved["callbacks"] = {"a": {"monitor": "b"}, "ModelCheckpoint": note}
    torch.save(saved, source)
    export(source, tmp_path / "out")
    export(source, tmp_path / "raw", "eval.disable_ema=True")
    export(tmp_path / "out", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation perplexity | 4.48169, the lowest of its run |" in card
    raw = (tmp_path / "raw" / "README.md").read_text()
    assert "| validation perplexity | not stated |" in raw
    for bad in ("1.5", None, float("nan"), -1.0, 1e9, torch.zeros(2), torch.tensor(1)):
        note["best_model_score"] = bad
        torch.save(saved, source)
        assert read_checkpoint(str(source), "x").val_ppl is None
    for bad in ([], {"a": 3}, {"a": {"monitor": ["val/nll"]}}):
        saved["callbacks"] = bad
        torch.save(saved, source)
        assert read_checkpoint(str(source), "x").val_ppl is None


def test_an_older_export_is_read(source, tmp_path):
    """One without the fields and files that have come since."""
    export(source, tmp_path / "old")
    new = files_of(tmp_path / "old")
    fields = json.loads(new["config.json"])
    for name in ("val_ppl", "validation_data", "tokenizer_class"):
        del fields[name]
    del fields["auto_map"]["AutoModel"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(fields))
    for name in ("network", "sampling"):
        (tmp_path / "old" / f"{name}_discrete_diffusion.py").unlink()
    export(tmp_path / "old", tmp_path / "new")
    again = files_of(tmp_path / "new")
    assert again.keys() == new.keys()
    assert again["model.safetensors"] == new["model.safetensors"]


# ---------------------------------------------------------------- what is refused


def test_a_link_out_of_a_folder_is_not_followed(source, tmp_path, capsys):
    """A downloaded folder could lead to any file of this machine; the hub's own links
    stay in its cache."""
    snapshot, blobs = tmp_path / "hub/snapshots/1", tmp_path / "hub/blobs"
    export(source, snapshot)
    blobs.mkdir()
    (snapshot / "tokenizer.json").rename(blobs / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    export(snapshot, tmp_path / "fine")
    assert not (tmp_path / "fine/tokenizer.json").is_symlink()
    (tmp_path / "id_rsa").write_text("my keys")
    (snapshot / "merges.txt").symlink_to(tmp_path / "id_rsa")
    line = refused(capsys, snapshot, tmp_path / "out")
    assert "merges.txt is a link out of the folder" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_nothing_is_overwritten(taken, tmp_path, capsys):
    """Found out before the checkpoint is read, which is none."""
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    if taken == "file":
        (tmp_path / "out").write_text("precious")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("precious")
    line = refused(capsys, tmp_path / "a.ckpt", tmp_path / "out")
    assert f"export.path='{tmp_path}/out' exists" in line


def test_an_empty_folder_may_be_there(source, tmp_path):
    (tmp_path / "out").mkdir()
    export(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("path", ["", "s3://bucket/out"])
def test_the_folder_must_be_a_local_one(path, source, capsys):
    assert f"export.path='{path}'" in refused(capsys, source, path)


def test_a_model_of_images(tmp_path, capsys):
    own = ("data=images", "data.size=4", "model.length=12")
    save_tiny(tmp_path / "b.ckpt", "algo=mdlm", *own)
    line = refused(capsys, tmp_path / "b.ckpt", tmp_path / "out")
    assert "images" in line
    assert "data.tokenizer_name_or_path=pixels" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_algorithm(source, tmp_path, capsys):
    saved = torch.load(source, weights_only=True)
    saved["hyper_parameters"]["config"]["algo"]["name"] = "mine"
    torch.save(saved, source)
    line = refused(capsys, source, tmp_path / "out")
    assert "eval.checkpoint_path" in line
    assert "give algo=mine" in line


def test_weights_that_do_not_fit(source, tmp_path, capsys):
    saved = torch.load(source, weights_only=True)
    name = "backbone.blocks.0.mlp.0.bias"
    saved["ema"]["shadow_params"][0] = torch.zeros(3)
    torch.save(saved, source)
    assert "EMA weights of another" in refused(capsys, source, tmp_path / "out")
    del saved["state_dict"][name]
    torch.save(saved, source)
    line = refused(capsys, source, tmp_path / "out")
    assert f"1 missing (e.g. {name})" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt])
def test_a_failure_leaves_nothing(error, source, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(exporter, "card", fails)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        export(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt"]


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes what it is given."""
    calls = []

    class HfApi:
        def create_repo(self, *args, **kwargs):
            calls.append(("create", args, kwargs))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(files_of(folder_path))))

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    monkeypatch.setattr(exporter, "hub_answers", lambda: True)
    return SimpleNamespace(calls=calls, api=HfApi)


def test_the_whole_folder_is_uploaded(hub, source, tmp_path):
    export(source, tmp_path / "out", "export.push_to_hub=me/mine")
    created, uploaded = hub.calls
    assert created == ("create", ("me/mine",), {"private": True, "exist_ok": True})
    assert uploaded == ("upload", "me/mine", sorted(files_of(tmp_path / "out")))


def test_a_refusal_of_the_hub_is_one_line(hub, source, tmp_path, capsys, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("no account\nand more")

    monkeypatch.setattr(hub.api, "create_repo", refuses)
    line = refused(capsys, source, tmp_path / "out", "export.push_to_hub=me/mine")
    assert "export.push_to_hub='me/mine' failed (no account)" in line
    assert (tmp_path / "out" / "config.json").exists()


def test_what_the_hub_cannot_take_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporter, "hub_answers", lambda: False)
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    nothing = (tmp_path / "a.ckpt", tmp_path / "out")
    line = refused(capsys, *nothing, "export.push_to_hub=me/mine")
    assert "export.push_to_hub='me/mine'" in line
    assert "out of reach" in line
    line = refused(capsys, *nothing, "export.push_to_hub=mine")
    assert "export.push_to_hub='mine'" in line
    assert "owner/name" in line


# ---------------------------------------------------------------- modelling files


@pytest.mark.parametrize("path", MODELLING, ids=lambda p: p.stem)
def test_modelling_files_need_torch_and_transformers_alone(path):
    allowed = {"torch", "transformers"} | sys.stdlib_module_names
    beside = {x.stem for x in MODELLING}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.module in beside


@pytest.mark.parametrize("name", SCHEDULES)
def test_models_of_a_folder_know_every_schedule(name):
    """Their signal levels are those of the schedule, at any of its settings."""
    from checkpoints.modeling.configuration_discrete_diffusion import (
        DiscreteDiffusionConfig,
    )
    from checkpoints.modeling.sampling_discrete_diffusion import ALPHAS

    schedule = SCHEDULES[name]
    keys = settings_of(schedule)
    values = {"eps": 0.02, "sigma_min": 0.01, "sigma_max": 5.0}
    own = {f"noise_{key}": x if key in keys else None for key, x in values.items()}
    config = DiscreteDiffusionConfig(noise=name, **own)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    ours = schedule(**{key: values[key] for key in keys})(t).alpha_t
    torch.testing.assert_close(ALPHAS[name](t, *config.noise_settings), ours)


def test_the_schedule_of_the_checkpoint_is_stated(tmp_path):
    settings = ("noise=linear", "noise.sigma_min=0.01", "noise.sigma_max=5.0")
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", *settings, BYTES)
    export(tmp_path / "a.ckpt", tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    names = ("noise", "noise_eps", "noise_sigma_min", "noise_sigma_max")
    assert [fields[name] for name in names] == ["linear", None, 0.01, 5.0]
    export(tmp_path / "out", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_a_network_that_is_told_another_time_is_refused(capsys, tmp_path):
    settings = ("training.change_of_variables=True", "algo.time_conditioning=True")
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", *settings, BYTES)
    line = refused(capsys, tmp_path / "a.ckpt", tmp_path / "out")
    assert "training.change_of_variables=True" in line
