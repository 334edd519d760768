"""Checkpoints that the reference wrote: read without executing code, and fine-tuned."""

import pytest
import torch
from golden_cases import Case, for_cases
from golden_models import composed
from omegaconf import OmegaConf

import main
from algo import algorithm_class
from checkpoints import Record, read_checkpoint
from dataloader import get_tokenizer

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
