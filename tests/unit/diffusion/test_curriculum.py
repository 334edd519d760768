"""Settings of the curriculum and of distillation: what is refused, before any work, and
what they come to."""

import pytest
import torch
from refusals import refused
from tiny import ALGORITHMS, compose

from diffusion.curriculum import DEFAULT_TOP_K, Curriculum
from diffusion.gaussian import DenseLatents, TopLatents

SETTINGS = "algo.curriculum."
REFUSED = {
    "mode": ("duo", ["mode=poly8"], ["'poly8'", "poly7", "simple"]),
    "end before start": ("duo", ["start=9", "end=8"], ["start=9", "end=8"]),
    "top_k of simple": ("duo", ["top_k=4"], ["top_k=4", "efficient_cached"]),
    "no entry": ("duo", ["mode=poly9", "top_k=0"], ["top_k=0", "at least 1"]),
    "end that is no number": ("duo", ["gamma_min=low"], ["gamma_min='low'", "auto"]),
    "a range without length": ("duo", ["gamma_min=-1", "gamma_max=-1"], []),
    "tau of distillation": ("distillation", ["gumbel_tau_log10_end=-2"], ["-1"]),
    "top_k of distillation": ("distillation", ["top_k=4"], ["top_k=4", "-1"]),
    "steps of distillation": ("distillation", ["end=7"], ["end=7", "-1"]),
}
ALGO = {
    "discrete time": ("duo", ["algo.T=32"], ["algo.T=32", "algo=duo"]),
    "divergence": ("distillation", ["algo.loss_type=kl"], ["'kl'", "kl-bwd", "kl-fwd"]),
    "no gap": ("distillation", ["algo.T=0"], ["algo.T=0"]),
    "no growth": ("distillation", ["algo.linear_growth_min=0"], ["(0, 1]"]),
    "teacher": ("distillation", ["algo.teacher_ema=maybe"], ["'maybe'", "True"]),
    "ema": ("distillation", ["algo.teacher_ema=True", "training.ema=0"], ["ema"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_without_a_meaning(case, make_model):
    algo, settings, parts = REFUSED[case]
    overrides = [f"algo={algo}", *(SETTINGS + setting for setting in settings)]
    named = [SETTINGS + setting.split("=")[0] for setting in settings[-1:]]
    refused(lambda: make_model(*overrides), *named, *parts)


@pytest.mark.parametrize("case", ALGO)
def test_keys_of_the_algorithm(case):
    algo, overrides, parts = ALGO[case]
    config = compose(f"algo={algo}", *overrides)
    refused(lambda: ALGORITHMS[algo].validate_config(config), *parts)


def test_published_code_needs_two_entries():
    settings = ("algo.curriculum.mode=poly9", "algo.curriculum.top_k=1")
    config = compose("algo=duo", "algo.compat=reference", *settings)
    refused(lambda: Curriculum.validate_config(config), "top_k=1", "algo.compat")


def draw(*overrides: str, K: int = 200, step: int = 0):
    curriculum = Curriculum(compose("algo=duo", *overrides), K)
    x0, t = torch.zeros(2, 3, dtype=torch.long), torch.tensor([0.1, 0.9]).double()
    return curriculum.draw(x0, t, step, range(2))


def test_top_k_has_a_default_and_a_limit():
    mode = "algo.curriculum.mode=efficient_cached"
    assert draw(mode).ids.shape == (2, 3, DEFAULT_TOP_K)
    assert draw(mode, "algo.curriculum.top_k=5").ids.shape == (2, 3, 5)
    assert draw(mode, "algo.curriculum.top_k=1").ids.shape == (2, 3, 1)
    assert draw(mode, K=7).ids.shape == (2, 3, 6)


def test_simple_draws_what_its_temperature_needs():
    hot, cold = (f"{SETTINGS}gumbel_tau_log10_start={tau}" for tau in (-1, -3))
    assert isinstance(draw(hot, K=50258), DenseLatents)
    assert isinstance(draw(cold, K=50258), TopLatents)


def test_auto_is_where_alpha_is_097_and_003():
    config = compose("algo=duo", *(f"{SETTINGS}gamma_{x}=auto" for x in ("min", "max")))
    alpha = Curriculum(config, 1000).operator(torch.tensor([0.0, 1.0]).double()).alpha_t
    torch.testing.assert_close(alpha, torch.tensor([0.97, 0.03]).double())


def test_the_same_generator_gives_the_same_input():
    for tau in ("-1", "-3"):
        one, two = (draw(f"{SETTINGS}gumbel_tau_log10_start={tau}") for _ in range(2))
        assert torch.equal(one.xt, two.xt)
        table = torch.randn(200, 4)
        assert torch.equal(one.embed(table), two.embed(table))
