"""User errors, table look-up, config resolvers, the gradient callback."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

import utils
from training.gradients import GradientInspectionCallback
from utils import ConfigError, arithmetic, choose

TABLE = {"ancestral": 1, "analytic": 2, "psi": 3}


# ---------------------------------------------------------------- look-up


def test_choose_returns_the_entry():
    assert choose(TABLE, "psi", "sampling.predictor") == 3


def test_choose_names_key_value_choices_and_a_hint():
    with pytest.raises(ConfigError) as error:
        choose(TABLE, "ancestrl", "sampling.predictor", "algo=mdlm")
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "sampling.predictor='ancestrl'",
        "algo=mdlm",
        "Did you mean 'ancestral'?",
        "analytic, ancestral, psi",
    ):
        assert part in text


@pytest.mark.parametrize("value", ["zzz", None, 3, True])
def test_far_values_get_no_hint_and_any_type_is_refused(value):
    with pytest.raises(ConfigError) as error:
        choose(TABLE, value, "key")
    assert f"key={value!r}" in str(error.value)
    assert "Did you mean" not in str(error.value)


def test_require_passes_a_choice():
    utils.require("a", ("a", "b"), "key")
    with pytest.raises(ConfigError, match="key='c'"):
        utils.require("c", ("a", "b"), "key")


def test_one_line():
    assert utils.one_line("a\n  b\t c\r\n") == "a b c"


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2*3+4", 10),
        ("2 * (3 + 4)", 14),
        ("-3 + +5", 2),
        ("7 // 2", 3),
        ("7 % 4", 3),
        ("1e-3 / 2", 5e-4),
        ("0.1*1000", 100.0),
        (12, 12),
        (" 5 ", 5),
    ],
)
def test_arithmetic(expression, value):
    assert arithmetic(expression) == pytest.approx(value)


@given(st.integers(-99, 99), st.integers(1, 99), st.sampled_from("+-*/"))
def test_arithmetic_agrees_with_python(a, b, op):
    expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
    assert arithmetic(f"({a}) {op} ({b})") == expected


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getcwd()",
        "open('x')",
        "x + 1",
        "len",
        "(1).__class__",
        "[1][0]",
        "'a' * 3",
        "True + 1",
        "2 ** 3",
        "9 if 1 else 0",
        "lambda: 1",
        "1; 2",
        "1 +",
        "1 / 0",
        "5 % 0",
        "",
        "1j",
        "{1: 2}",
        "f'{1}'",
        "(a := 1)",
        "1 < 2",
        "~1",
    ],
)
def test_arithmetic_refuses_everything_else(expression):
    """Names, calls, attributes, strings, comparisons: one line, nothing executed."""
    with pytest.raises(ConfigError) as error:
        arithmetic(expression)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- resolvers


def resolved(text):
    utils.register_resolvers()
    return OmegaConf.create({"x": text, "n": 10, "accelerator": "cpu"}).x


def test_resolvers():
    assert resolved("${eval:${n}*2}") == 20
    assert resolved("${eval:'0.1 * ${n}'}") == pytest.approx(1.0)
    assert resolved("${div_up:${n},4}") == 3
    assert resolved("${div_up:12,4}") == 3
    assert resolved("${device_count:${accelerator}}") == 1
    assert resolved("${default_precision:${accelerator}}") == "32"
    assert resolved("${default_num_workers:${accelerator}}") == 0


def test_registering_twice_is_harmless():
    utils.register_resolvers()
    utils.register_resolvers()
    assert resolved("${eval:1+1}") == 2


def test_cwd_follows_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolved("${cwd:}") == str(tmp_path)


def test_cache_dir_follows_the_environment(monkeypatch, compose):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("DUO_CACHE_DIR", raising=False)
    assert utils.user_cache_dir() == "/somewhere/duo"
    assert compose().data.cache_dir == "/somewhere/duo"
    monkeypatch.setenv("DUO_CACHE_DIR", "/elsewhere")
    assert compose().data.cache_dir == "/elsewhere"


def test_num_cpus_is_what_this_process_may_use(monkeypatch):
    """A process pinned to two cores has two, however many the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert utils.num_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows have none
    for count, expected in ((7, 7), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert utils.num_cpus() == expected


# ---------------------------------------------------------------- the callback


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (10, 3)])
def test_as_many_gradients_are_logged_as_asked_for(asked, given):
    """The largest norms, largest first; parameters without gradient are left out."""
    module = nn.Module()
    for name, size in {"a": 3.0, "b": 1.0, "c": 2.0, "frozen": 0.0}.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(4)))
        if name != "frozen":
            getattr(module, name).grad = torch.full((4,), size)
    logged = {}
    module.log = lambda name, value: logged.update({name: float(value)})
    trainer = SimpleNamespace(global_step=20, log_every_n_steps=10)
    callback = GradientInspectionCallback(num_grads_log=asked)
    callback.on_before_optimizer_step(trainer, module, None)
    largest = [("grad_norm/a", 6.0), ("grad_norm/c", 4.0), ("grad_norm/b", 2.0)]
    assert list(logged.items()) == largest[:given]
    logged.clear()
    trainer.global_step = 21
    callback.on_before_optimizer_step(trainer, module, None)
    assert not logged
