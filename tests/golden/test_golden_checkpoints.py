"""Checkpoints that the reference wrote: read without executing code, and fine-tuned."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Case, approx, for_cases
from golden_models import composed, configured, derivative_factor
from omegaconf import DictConfig, OmegaConf

import main
from checkpoints.checkpoint import Checkpoint
from checkpoints.reading import Record, read_checkpoint
from cli.settle import algorithm_class
from data.registry import DATASETS, DatasetSpec
from data.rows import TokenRows
from data.tokenizers import get_tokenizer
from evaluation.likelihood import ppl_eval

KEY = "training.finetune_path"


def path_of(case: Case) -> str:
    return str(case.folder / "checkpoint.ckpt")


def config_of(case: Case, algo: str, **settings: Any) -> DictConfig:
    """Ours, with the settings of the run that wrote the file.

    Where they leave out the vocabulary of the synthetic tokenizer, it is that of the
    weights; all but uniform-state models have one entry more, for the mask.
    """
    config = configured(case, algo, **settings)
    if "vocab_size" not in config.data:
        kind = algorithm_class(config)
        has_more = kind.has_mask or kind.is_autoregressive
        config.data.vocab_size = num_embeddings(case) - has_more
    return config


def loss_factor(config: DictConfig) -> float:
    """By what our losses differ; see `derivative_factor`."""
    is_continuous = not algorithm_class(config).is_autoregressive and config.algo.T == 0
    return derivative_factor(config) if is_continuous else 1.0


def num_embeddings(case: Case) -> int:
    return case.values["state_dict"]["backbone.vocab_embed.embedding"][1][0]


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_probe(case, weights, replay):
    """Losses of the first rows with the recorded draws, by either weights."""
    settings = {"eval__disable_ema": weights == "raw"}
    config = config_of(case, case.values["evaluated_as"], **settings)
    model = algorithm_class(config)(config, get_tokenizer(config))
    model.load_weights(read_checkpoint(path_of(case), KEY), KEY)
    replay.uniforms = [case[n] for n in ("probe_u_time", "probe_u_move") if n in case]
    if "probe_random_tokens" in case:
        replay.integers = [case["probe_random_tokens"]]
    name, limits = f"{weights}_probe_loss_per_token", case.tolerance("probe")
    x0 = case["valid_ids"][: len(case[name])]
    with torch.no_grad(), model.eval_weights():
        nll = model.nll(x0).nll
    case.check(name, nll, factor=loss_factor(config), default=limits)


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
def test_file_is_plain_data(case):
    """The config is dicts and values; of other objects there are records."""
    checkpoint = read_checkpoint(path_of(case), KEY)
    assert checkpoint.step == case.values["global_step"]
    settings = checkpoint.lightning["hyper_parameters"]
    assert checkpoint.setting("algo.name") == case.config.algo.name
    theirs = case.config.model
    ours = OmegaConf.create(checkpoint.config).model
    assert {k: ours[k] for k in theirs} == dict(theirs)
    assert isinstance(settings["tokenizer"], Record)
    *_, kind = settings["tokenizer"].name.split(".")
    assert kind == case.values["hyper_parameters"]["tokenizer"]


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
def test_inspect_names_it(case, capsys):
    config = composed("mode=inspect", f"eval.checkpoint_path={path_of(case)}")
    lines = main.inspect(config)
    ema = case.values["ema"]
    expected = {
        "algorithm": case.config.algo.name,
        "length": case.config.model.length,
        "vocabulary": num_embeddings(case),
        "step": case.values["global_step"],
        "EMA": f"decay {ema['decay']}, {ema['num_updates']} updates",
        "lightning": case.values["lightning_version"],
    }
    assert {name: lines[name] for name in expected} == {
        name: str(value) for name, value in expected.items()
    }


def on_recorded_rows(
    monkeypatch: pytest.MonkeyPatch, case: Case, folder: Path, **settings: Any
) -> DictConfig:
    """A config whose data are the recorded validation rows; for training as often as
    they fill a batch. Its run writes to `folder`."""
    monkeypatch.chdir(folder)
    config = config_of(
        case,
        case.values["evaluated_as"],
        data__train="recorded",
        data__valid="recorded",
        trainer__num_sanity_val_steps=0,
        trainer__enable_progress_bar=False,
        eval__generate_samples=False,
        checkpointing__save_dir=str(folder),
        training__finetune_path="",
        **settings,
    )
    ids = case["valid_ids"].numpy()
    copies = math.ceil(config.loader.global_batch_size / len(ids))
    rows = {"valid": TokenRows(ids), "train": TokenRows(np.tile(ids, (copies, 1)))}
    # `is_made`: they are there, whether the run that wrote the file streamed or not.
    spec = DatasetSpec(lambda config, tokenizer, split: rows[split], is_made=True)
    monkeypatch.setitem(DATASETS, "recorded", spec)
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
        mode="ppl_eval",
        eval__checkpoint_path=path_of(case),
        eval__disable_ema=weights == "disable_ema",
    )
    results = ppl_eval(config)
    golden = recorded["nll_mean"] * loss_factor(config)
    if recorded["seeds"] == 1:
        limits = case.tolerance("validation nll", {"rtol": 1e-5})
        assert results["nll"] == approx(golden, limits)
    else:
        theirs = recorded["nll_std"] / math.sqrt(recorded["seeds"])
        bound = 4 * theirs + 4 * results["nll_stderr"]
        assert abs(results["nll"] - golden) < bound


NUM_UPDATES = 12


@for_cases("checkpoint", holding="ema_probe_loss_per_token")
def test_training_resumes(case, tmp_path, monkeypatch):
    """Weights, EMA, optimiser and rate are those of the file, and move on."""
    before = read_checkpoint(path_of(case), KEY)
    steps = case.values["global_step"] + NUM_UPDATES
    config = on_recorded_rows(
        monkeypatch,
        case,
        tmp_path,
        checkpointing__resume_ckpt_path=path_of(case),
        trainer__max_steps=steps,
        trainer__val_check_interval=4,
    )
    results = main.train(config)
    recorded = case.values["validation"]["ema"]["nll_mean"] * loss_factor(config)
    assert results["nll"] < recorded + 4 * results["nll_stderr"]  # not from scratch
    after = read_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"), KEY)
    assert after.step == steps
    assert after.ema["num_updates"] == before.ema["num_updates"] + NUM_UPDATES
    moments = [x.optimizer_states[0]["state"][0]["step"] for x in (before, after)]
    assert moments[1] == moments[0] + NUM_UPDATES
    assert after.lightning["lr_schedulers"][0]["last_epoch"] == steps
    check_moved(before, after, 4 * NUM_UPDATES * config.optim.lr)


def check_moved(before: Checkpoint, after: Checkpoint, atol: float) -> None:
    """No weight moved by more than `atol`: Adam takes steps of about its rate."""
    for name, value in before.weights.items():
        torch.testing.assert_close(after.weights[name], value, atol=atol, rtol=0)


def is_uniform(case: Case) -> bool:
    return case.values["evaluated_as"] == "duo_base"


@for_cases("checkpoint", holding="ema_probe_loss_per_token", where=is_uniform)
@pytest.mark.parametrize("algo", ["duo_base", "distillation"])
def test_fine_tuning(case, algo, tmp_path, monkeypatch):
    """Second stage and distillation start from the file; `training.ema` holds."""
    monkeypatch.chdir(tmp_path)
    before = read_checkpoint(path_of(case), KEY)
    ema = before.ema["decay"] / 2
    synthetic = {"train": "synthetic", "tokenizer_name_or_path": "synthetic"}
    if algo == "distillation":  # a teacher has the tokenizer of its student
        del synthetic["tokenizer_name_or_path"]
    sizes = {"vocab_size": num_embeddings(case), "num_train": 16, "num_valid": 8}
    batches = {"global_batch_size": 4, "batch_size": 4, "eval_batch_size": 4}
    config = config_of(
        case,
        algo,
        data=synthetic | {"valid": "synthetic"} | sizes,
        loader=batches,
        trainer__max_steps=2,
        trainer__val_check_interval=2,
        trainer__num_sanity_val_steps=0,
        eval__generate_samples=False,
        checkpointing__save_dir=str(tmp_path),
        training__finetune_path=path_of(case),
        training__ema=ema,
    )
    if "curriculum" in config.algo:  # its table stayed where the file was made
        config.algo.curriculum.integral_cache_path = None
    main.train(config)
    after = read_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"), KEY)
    assert after.ema["decay"] == ema
    assert after.ema["num_updates"] == before.ema["num_updates"] + 2
    check_moved(before, after, 4 * 2 * config.optim.lr)
