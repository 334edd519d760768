"""The checks of the entry point; whole runs are in tests/integration."""

from functools import partial

import pytest
from omegaconf import OmegaConf
from refusals import refused

import main
from checks import NUMBERS, check_batches, check_devices, check_numbers
from main import LOGGERS


def test_defaults_pass_every_check(compose):
    config = compose("trainer.accelerator=cpu", tiny=False)
    check_numbers(config)
    check_devices(config)
    check_batches(config)


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_numbers_are_numbers_in_their_range(compose, key):
    """And each key that is checked exists."""
    config = compose(tiny=False)
    kind, low, high = NUMBERS[key]
    assert OmegaConf.select(config, key, throw_on_missing=True) is not None
    wrong = ["ten", True, float("nan"), low - 1]
    wrong += [high + 1] if high is not None else []
    wrong += [low + 0.5] if kind is int else []
    for value in wrong:
        OmegaConf.update(config, key, value)
        refused(partial(check_numbers, config), f"{key}={value!r}", f"at least {low}")
    for value in [low] if high is None else [low, high]:
        OmegaConf.update(config, key, value)
        check_numbers(config)


def test_batches_must_make_up_the_global_one(compose):
    config = compose("loader.global_batch_size=16", "loader.batch_size=3")
    refused(
        partial(check_batches, config),
        "loader.global_batch_size=16",
        "batch_size=3",
        "18",
    )
    check_batches(compose("loader.global_batch_size=16", "loader.batch_size=4"))


def test_absent_devices_are_refused(compose, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = compose()
    for name in ("gpu", "cuda"):
        gpu.trainer.accelerator = name
        refused(partial(check_devices, gpu), f"trainer.accelerator={name!r}", "cpu")
    gpu.trainer.accelerator = "tpu"
    refused(partial(check_devices, gpu), "trainer.accelerator='tpu'", "auto")
    refused(partial(check_devices, compose("strategy=fsdp")), "strategy=fsdp", "ddp")


@pytest.mark.parametrize(
    ("logger", "names"),
    [
        ("csv", ["csv"]),
        ("none", []),
        ("null", []),
        ("[csv,wandb]", ["csv", "wandb"]),
    ],
)
def test_loggers_by_name(compose, logger, names):
    assert main.logger_names(compose(f"logger={logger}")) == names
    assert set(names) <= set(LOGGERS)


def test_an_unknown_logger_is_refused(compose):
    refused(partial(main.logger_names, compose("logger=cvs")), "logger='cvs'", "'csv'")


def test_evaluation_runs_on_the_configured_device(compose):
    assert main.device_of(compose("trainer.accelerator=cpu")).type == "cpu"
