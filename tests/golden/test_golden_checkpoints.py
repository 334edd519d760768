"""Checkpoints that the reference wrote: read without executing code, and fine-tuned."""

import math

import pytest
import torch
from golden_cases import Case, for_cases
from golden_models import composed
from omegaconf import OmegaConf

import main
from checkpoints.reading import Record, read_checkpoint
from cli.settle import algorithm_class
from data.registry import DATASETS, DatasetSpec
from data.rows import TokenRows
from data.tokenizers import get_tokenizer

KEY = "training.finetune_path"


def path_of(case: Case) -> str:
    return str(case.folder / "checkpoint.ckpt")


def config_of(case: Case, algo: str, *overrides: str):
    """Ours, with the network and the tokenizer that the file itself names."""
    theirs = read_checkpoint(path_of(case), KEY)["hyper_parameters"]["config"]
    name = theirs["data"]["tokenizer_name_or_path"]
    own = (f"algo={algo}", "model=tiny", f"{KEY}={path_of(case)}")
    config = composed(*own, f"data.tokenizer_name_or_path={name}", *overrides)
    model = {k: v for k, v in theirs["model"].items() if k in config.model}
    return OmegaConf.merge(config, {"model": model, "noise": theirs["noise"]})


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_probe(case, weights, replay):
    """Losses of four rows with the recorded draws, by either weights."""
    config = config_of(case, case.values["evaluated_as"])
    config.eval.disable_ema = weights == "raw"
    model = algorithm_class(config)(config, get_tokenizer(config))
    model.load_weights(read_checkpoint(path_of(case), KEY), KEY)
    replay.uniforms = [case[n] for n in ("probe_u_time", "probe_u_move") if n in case]
    if "probe_random_tokens" in case:
        replay.integers = [case["probe_random_tokens"]]
    x0 = case["valid_ids"][:4]
    with torch.no_grad(), model.eval_weights():
        nll = model.nll(x0).nll
    name, limits = f"{weights}_probe_loss_per_token", case.tolerance("probe")
    case.check(name, nll, default=limits)


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
def test_file_is_plain_data(case):
    """The config is dicts and values; of other objects there are records."""
    checkpoint = read_checkpoint(path_of(case), KEY)
    assert checkpoint["global_step"] == case.values["global_step"]
    settings = checkpoint["hyper_parameters"]
    assert settings["config"]["algo"]["name"] == case.config.algo.name
    theirs = case.config.model
    ours = OmegaConf.create(settings["config"]).model
    assert {k: ours[k] for k in theirs} == dict(theirs)
    assert isinstance(settings["tokenizer"], Record)
    assert settings["tokenizer"].name.endswith("Tokenizer")


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
def test_inspect_names_it(case, capsys):
    config = composed("mode=inspect", f"eval.checkpoint_path={path_of(case)}")
    lines = main.inspect(config)
    embedding = case.values["state_dict"]["backbone.vocab_embed.embedding"][1]
    ema = case.values["ema"]
    expected = {
        "algorithm": case.config.algo.name,
        "length": case.config.model.length,
        "vocabulary": embedding[0],
        "step": case.values["global_step"],
        "EMA": f"decay {ema['decay']}, {ema['num_updates']} updates",
        "lightning": case.values["lightning_version"],
    }
    assert {name: lines[name] for name in expected} == {
        name: str(value) for name, value in expected.items()
    }


def on_recorded_rows(monkeypatch, case: Case, tmp_path, *overrides: str):
    """A config whose data are the recorded validation rows."""
    monkeypatch.chdir(tmp_path)
    rows = TokenRows(case["valid_ids"].numpy())
    spec = DatasetSpec(lambda config, tokenizer, split: rows)
    monkeypatch.setitem(DATASETS, "recorded", spec)
    config = config_of(
        case,
        case.values["evaluated_as"],
        "data.train=recorded",
        "data.valid=recorded",
        "trainer.num_sanity_val_steps=0",
        "+trainer.enable_progress_bar=False",
        "eval.generate_samples=False",
        f"checkpointing.save_dir={tmp_path}",
        *overrides,
    )
    config.training.finetune_path = ""
    return config


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
@pytest.mark.parametrize("weights", ["ema", "disable_ema"])
def test_validation(case, weights, tmp_path, monkeypatch):
    """The recorded nll within the errors of both; without a draw of times, equal."""
    recorded = case.values["validation"][weights]
    config = on_recorded_rows(
        monkeypatch,
        case,
        tmp_path,
        "mode=ppl_eval",
        f"eval.checkpoint_path={path_of(case)}",
        f"eval.disable_ema={weights == 'disable_ema'}",
        "loader.eval_global_batch_size=16",
    )
    results = main.ppl_eval(config)
    if recorded["seeds"] == 1:
        assert results["nll"] == pytest.approx(recorded["nll_mean"], rel=1e-5)
    else:
        theirs = recorded["nll_std"] / math.sqrt(recorded["seeds"])
        bound = 4 * theirs + 4 * results["nll_stderr"]
        assert abs(results["nll"] - recorded["nll_mean"]) < bound


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
def test_training_resumes(case, tmp_path, monkeypatch):
    """Weights, EMA, optimiser and rate are those of the file, and move on."""
    before = read_checkpoint(path_of(case), KEY)
    steps = case.values["global_step"]
    config = on_recorded_rows(
        monkeypatch,
        case,
        tmp_path,
        f"checkpointing.resume_ckpt_path={path_of(case)}",
        f"trainer.max_steps={steps + 12}",
        "trainer.val_check_interval=4",
        "loader.global_batch_size=16",
        f"optim.lr={case.config.optim.lr}",
        f"lr_scheduler.num_warmup_steps={case.config.lr_scheduler.num_warmup_steps}",
        f"training.ema={case.config.training.ema}",
    )
    results = main.train(config)
    recorded = case.values["validation"]["ema"]["nll_mean"]
    assert results["nll"] < recorded + 4 * results["nll_stderr"]  # not from scratch
    after = read_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"), KEY)
    assert after["global_step"] == steps + 12
    assert after["ema"]["num_updates"] == before["ema"]["num_updates"] + 12
    moments = after["optimizer_states"][0]["state"][0]
    assert moments["step"] == before["optimizer_states"][0]["state"][0]["step"] + 12
    assert after["lr_schedulers"][0]["last_epoch"] == steps + 12
    for name, value in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][name], value, atol=0.1, rtol=0)


def is_uniform(case: Case) -> bool:
    return case.values["evaluated_as"] == "duo_base"


@for_cases("checkpoint", holding="ema_probe_loss_per_token", where=is_uniform)
@pytest.mark.parametrize("algo", ["duo_base", "distillation"])
def test_fine_tuning(case, algo, tmp_path, monkeypatch):
    """Second stage and distillation start from the file; `training.ema` holds."""
    monkeypatch.chdir(tmp_path)
    config = config_of(
        case,
        algo,
        "data=synthetic",
        "data.num_train=16",
        "data.num_valid=8",
        "loader.global_batch_size=4",
        "loader.eval_batch_size=4",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.num_sanity_val_steps=0",
        "eval.generate_samples=False",
        f"checkpointing.save_dir={tmp_path}",
    )
    config.data.tokenizer_name_or_path = "synthetic"
    before = read_checkpoint(path_of(case), KEY)
    size = len(before["state_dict"]["backbone.vocab_embed.embedding"])
    config.data.vocab_size = size
    main.train(config)
    after = read_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"), KEY)
    assert after["ema"]["decay"] == config.training.ema
    assert after["ema"]["num_updates"] == before["ema"]["num_updates"] + 2
    for name, value in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][name], value, atol=1e-3, rtol=0)
