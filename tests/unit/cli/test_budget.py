"""`training.flops` sets `trainer.max_steps`, or is refused in one line."""

from functools import partial

import pytest
from omegaconf import OmegaConf
from refusals import refused

from cli.checks import refuse_two_lengths
from cli.settle import algorithm_class, settle
from cli.values import check_numbers
from data.tokenizers import get_tokenizer
from models.flops import compute_of

SIZES = ("data=text_files", "data.tokenizer_name_or_path=bytes", "model.length=32")


def settled(compose, *overrides: str):
    config = compose(*SIZES, *overrides)
    settle(config)
    return config


@pytest.mark.parametrize("name", ["ar", "mdlm", "sedd", "d3pm", "duo_base"])
def test_the_budget_sets_the_steps(compose, name):
    """As many as the model itself says, and what is made of them follows."""
    cosine = "lr_scheduler=cosine_decay_warmup"
    config = settled(compose, f"algo={name}", "training.flops=1e-7", cosine)
    algorithm = algorithm_class(config)
    model = algorithm(config, get_tokenizer(config))
    compute = compute_of(config, model.backbone, algorithm.passes(config))
    steps = config.trainer.max_steps
    assert steps * compute.step_flops <= 1e11 < (steps + 1) * compute.step_flops
    assert compute.step_tokens == 4 * 32
    assert config.lr_scheduler.warmup_t == pytest.approx(0.1 * steps)
    assert "meta" not in {x.device.type for x in model.parameters()}


def test_what_costs_more_gets_fewer_steps(compose):
    """D3PM passes twice, MDLM's head sees masks alone, AR leaves the last token out."""
    found = {
        name: settled(compose, f"algo={name}", "training.flops=1e-6").trainer.max_steps
        for name in ("ar", "mdlm", "d3pm", "duo_base")
    }
    assert found["d3pm"] < found["duo_base"] < found["mdlm"]
    assert found["mdlm"] / found["d3pm"] == pytest.approx(2, rel=0.35)
    twice = settled(compose, "algo=mdlm", "training.flops=2e-6").trainer.max_steps
    assert abs(twice - 2 * found["mdlm"]) <= 1


def test_other_modes_and_no_budget_leave_the_steps_alone(compose):
    for overrides in ((), ("training.flops=1", "mode=ppl_eval")):
        assert settled(compose, *overrides).trainer.max_steps == 1_000_000


def test_a_budget_that_buys_nothing_is_refused(compose):
    def call(*overrides):
        return lambda: settled(compose, *overrides)

    small = call("algo=mdlm", "training.flops=1e-12")
    refused(small, "training.flops=1e-12", "less than one step", "global_batch_size")
    for name in ("duo", "distillation", "sdtt", "dimo"):
        more = ("training.finetune_path=x",) if name != "duo" else ()
        refused(
            call(f"algo={name}", "training.flops=1", *more),
            *("training.flops=1", "not counted", "trainer.max_steps"),
        )
    blocks = ("algo=mdlm", "algo.block_size=8", "training.flops=1")
    blocks += ("eval.generate_samples=False",)
    refused(call(*blocks), "algo.block_size", "not counted")
    mamba = ("algo=mdlm", "algo.backbone=dimamba", "model=tiny-dimamba")
    refused(call(*mamba, "training.flops=1"), "algo.backbone=dimamba", "not counted")


@pytest.mark.parametrize("value", [-1, 0, "many", True, 1e13, float("nan")])
def test_a_budget_is_a_number(compose, value):
    config = compose()
    config.training.flops = value
    refused(partial(check_numbers, config), f"training.flops={value!r}")


def test_a_command_says_how_long_to_train_in_one_way(compose):
    """A recipe may have steps: those that the command's budget replaces."""
    config = compose("training.flops=1", "trainer.max_steps=7")
    call = partial(refuse_two_lengths, config, ["algo=mdlm", "trainer.max_steps=7"])
    refused(call, "trainer.max_steps=7 contradicts training.flops=1", "leave out")
    refuse_two_lengths(config, ["experiment=demo", "training.flops=1"])
    OmegaConf.update(config, "training.flops", None)
    refuse_two_lengths(config, ["trainer.max_steps=7"])
