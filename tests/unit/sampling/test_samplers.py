"""Samplers by name, the skeleton's calls, precision, and the end of sampling."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from nursery import ROOT
from refusals import refused

from algo import AR, DUO_BASE, MDLM, D3PMAbsorb, SEDDAbsorb
from cli.settle import algorithm_class
from diffusion.uniform import UniformState
from sampling.autoregressive import AutoRegressive
from sampling.categorical import exponential_race, inverse_cdf
from sampling.correctors import Gibbs
from sampling.ordered import Confidence, EntropyBound
from sampling.predictors import Analytic, Ancestral, AncestralCache, FirstHitting
from sampling.psi import Psi
from sampling.registry import (
    CORRECTORS,
    SAMPLERS,
    build_sampler,
    check_sampler,
    sampler_class,
    samplers_of,
)
from utils import ConfigError, imported

# ---------------------------------------------------------------- look-up


@pytest.mark.parametrize(
    ("predictor", "algorithm", "expected"),
    [
        ("ancestral", MDLM, Ancestral),
        ("ancestral", DUO_BASE, Ancestral),
        ("ancestral", AR, AutoRegressive),
        ("analytic", MDLM, Analytic),
        ("analytic", SEDDAbsorb, Analytic),
        ("ancestral_cache", D3PMAbsorb, AncestralCache),
        ("first_hitting", SEDDAbsorb, FirstHitting),
        ("psi", DUO_BASE, Psi),
        ("confidence", MDLM, Confidence),
        ("entropy_bound", D3PMAbsorb, EntropyBound),
    ],
)
def test_the_sampler_that_fits_is_chosen(predictor, algorithm, expected):
    assert sampler_class(predictor, algorithm) is expected


@pytest.mark.parametrize(
    ("predictor", "algorithm"),
    [
        ("analytic", AR),
        ("analytic", DUO_BASE),
        ("first_hitting", DUO_BASE),
        ("ancestral_cache", DUO_BASE),
        ("psi", AR),
        ("confidence", DUO_BASE),
        ("entropy_bound", AR),
        ("x", MDLM),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(predictor, algorithm):
    """The choices are those that fit this algorithm."""
    with pytest.raises(ConfigError) as error:
        sampler_class(predictor, algorithm)
    text = str(error.value)
    assert "\n" not in text
    assert f"sampling.predictor={predictor!r}" in text
    choices = text.split("Choose from: ")[1]
    fitting = [n for n in SAMPLERS if any(s.fits(algorithm) for s in samplers_of(n))]
    assert choices == f"{', '.join(sorted(fitting))}."


def test_at_most_one_sampler_of_a_name_fits(algo_name, compose):
    algorithm = algorithm_class(compose(f"algo={algo_name}"))
    for samplers in map(samplers_of, SAMPLERS):
        assert sum(sampler.fits(algorithm) for sampler in samplers) <= 1


# ---------------------------------------------------------------- the skeleton


@pytest.fixture
def model(make_model):
    return make_model("algo=mdlm", "sampling.steps=5")


def visited(model, **kwargs):
    """The pairs (alpha_t, alpha_s) that a sampler steps through."""
    pairs, reverse = [], model.sampler.reverse

    def spy(chain, xt, alpha_t, alpha_s, where):
        assert alpha_t.shape == alpha_s.shape == (len(xt), 1)
        assert alpha_t.dtype == alpha_s.dtype == torch.float64
        pairs.append((float(alpha_t[0]), float(alpha_s[0])))
        return reverse(chain, xt, alpha_t, alpha_s, where)

    model.sampler.reverse = spy
    model.generate_samples(2, torch.Generator().manual_seed(0), **kwargs)
    return pairs


def test_steps_follow_the_schedule_from_1_to_eps(model):
    """sampling.steps of them, each from where the last one ended; then to alpha = 1."""
    pairs = visited(model)
    times = torch.linspace(1, 1e-5, 6, dtype=torch.float64)
    alphas = model.noise(times).alpha_t.tolist()
    expected = [*pairwise(alphas), (alphas[-1], 1.0)]
    assert pairs == [pytest.approx(pair) for pair in expected]


def test_the_number_of_steps_can_be_given(model):
    assert len(visited(model, num_steps=3)) == 4


@pytest.mark.parametrize("removal", ["greedy", "none"])
def test_other_removals_take_no_last_step(make_model, removal):
    model = make_model(
        "algo=mdlm", "sampling.steps=5", f"sampling.noise_removal={removal}"
    )
    assert len(visited(model)) == 5


def stands_still(model):
    """Replaces the steps of a model's sampler by none."""
    model.sampler.step = lambda chain, xt, step: xt


def test_none_leaves_what_is_masked(make_model):
    """After one step to t = 1e-5 a mask stays with probability about 1e-5."""
    model = make_model("algo=mdlm", "sampling.noise_removal=none")
    stands_still(model)
    x, evaluations, _ = model.generate_samples(2, torch.Generator())
    assert (x == model.mask_index).all()
    assert evaluations.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["duo_base", "mdlm"])
def test_greedy_removal_is_the_denoisers_argmax(make_model, name):
    """At the last time of the grid."""
    model = make_model(f"algo={name}", "sampling.noise_removal=greedy")
    stands_still(model)
    x, evaluations, _ = model.generate_samples(4, torch.Generator().manual_seed(0))
    xt = model.prior_sample(4, torch.Generator().manual_seed(0))
    alpha = model.noise(torch.full((4, 1), 1e-5, dtype=torch.float64)).alpha_t
    log_x_theta = model(xt, model.sigma(alpha))
    assert torch.equal(x, log_x_theta.argmax(dim=-1))
    assert evaluations.tolist() == [1] * 4


def test_greedy_removal_leaves_revealed_tokens(make_model):
    model = make_model("algo=mdlm", "sampling.noise_removal=greedy")
    stands_still(model)
    half = torch.arange(8) % 2 == 0
    model.prior_sample = lambda n, generator: torch.where(half, 3, 6).expand(n, 8)
    x = model.generate_samples(4, torch.Generator().manual_seed(0)).tokens
    assert (x[:, ::2] == 3).all()
    assert (x != 6).all()


def test_no_gradient_is_recorded(make_model, sampling_pair):
    predictor, name = sampling_pair
    model = make_model(f"algo={name}", f"sampling.predictor={predictor}")
    seen, trunk = [], model.backbone.trunk

    def spy(*args, **kwargs):
        seen.append(torch.is_grad_enabled())
        return trunk(*args, **kwargs)

    model.backbone.trunk = spy
    model.generate_samples(2, torch.Generator().manual_seed(0))
    assert set(seen) == {False}


def test_samples_have_the_length_that_the_sampler_says(make_model):
    model = make_model(
        "algo=mdlm",
        "sampling.semi_ar=True",
        "sampling.stride_length=3",
        "sampling.num_strides=4",
    )
    assert model.sampler.length(8) == 20
    assert model.generate_samples(2).tokens.shape == (2, 20)
    assert make_model("algo=mdlm").sampler.length(8) == 8


# ---------------------------------------------------------------- old configs


@pytest.mark.parametrize(
    ("alias", "name"), [("ddpm", "ancestral"), ("ddpm_cache", "ancestral_cache")]
)
def test_mdlms_names_are_aliases(make_model, alias, name):
    """The same class, and the same samples."""
    assert sampler_class(alias, MDLM) is sampler_class(name, MDLM)
    x, expected = (
        make_model("algo=mdlm", f"sampling.predictor={predictor}").generate_samples(
            4, torch.Generator().manual_seed(0)
        )
        for predictor in (alias, name)
    )
    assert torch.equal(x.tokens, expected.tokens)


def test_an_alias_is_refused_where_its_sampler_does_not_fit():
    refused(lambda: sampler_class("ddpm_cache", DUO_BASE), "_cache", "ancestral, psi")


@pytest.mark.parametrize(
    ("predictor", "old", "new"),
    [
        ("ancestral", True, "greedy"),
        ("ancestral", False, "none"),
        ("ancestral_cache", True, "greedy"),
        ("analytic", True, "ancestral"),
        ("analytic", False, "none"),
        ("psi", True, "greedy"),
    ],
)
def test_noise_removal_of_old_configs(make_model, predictor, old, new):
    """True and False mean what they did."""
    model = make_model("algo=mdlm", f"sampling.predictor={predictor}")
    kind, sampling = type(model.sampler), model.config.sampling
    removals = []
    for value in (old, new):
        sampling.noise_removal = value
        sampler = kind(sampling)
        removals.append(sampler.remove_noise.__code__)
        model.sampler = sampler
        model.generate_samples(2, num_steps=1)
    assert removals[0] is removals[1]


def test_an_unknown_noise_removal_is_refused(make_model):
    for predictor in ("ancestral", "first_hitting"):
        refused(
            lambda predictor=predictor: make_model(
                "algo=mdlm",
                f"sampling.predictor={predictor}",
                "sampling.noise_removal=x",
            ),
            "sampling.noise_removal='x'",
            "ancestral",
        )


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sampling.noise_removal=x", "sampling.noise_removal='x'"),
        ("sampling.psi.high_mode=x", "sampling.psi.high_mode='x'"),
        ("sampling.psi.time_profile=x", "sampling.psi.time_profile='x'"),
    ],
)
def test_settings_are_refused_without_a_sampler_and_by_the_sampler(
    compose, monkeypatch, override, part
):
    """A config is checked without building what it asks for; a sampler that is built
    directly refuses the same."""
    config = compose("algo=mdlm", "sampling.predictor=psi", override)
    refused(lambda: Psi(config.sampling), part)
    monkeypatch.setattr(Psi, "__init__", None)
    refused(lambda: check_sampler(config, MDLM), part)


KEYS_OF_OTHERS = {
    "order": ("sampling.order=margin", "sampling.predictor=confidence"),
    "order_noise": ("sampling.order_noise=0.5", "sampling.predictor=confidence"),
    "gamma": ("sampling.gamma=0.2", "sampling.predictor=entropy_bound"),
    "corrector_steps": ("sampling.corrector_steps=2", "sampling.corrector=gibbs"),
    "corrector_parallel": ("sampling.corrector_parallel=2", "sampling.corrector=gibbs"),
    "corrector_select": (
        "sampling.corrector_select=lowest_max",
        "sampling.corrector=gibbs",
    ),
    "corrector_temperature": (
        "sampling.corrector_temperature=0",
        "sampling.corrector=gibbs",
    ),
    "corrector_t_min": ("sampling.corrector_t_min=0.1", "sampling.corrector=gibbs"),
    "corrector_t_max": ("sampling.corrector_t_max=0.9", "sampling.corrector=gibbs"),
}


@pytest.mark.parametrize("key", KEYS_OF_OTHERS)
def test_a_key_of_another_sampler_is_refused(compose, sampling_pair, key):
    """Its value without effect is not, whoever reads it."""
    predictor, name = sampling_pair
    override, reader = KEYS_OF_OTHERS[key]
    algorithm = algorithm_class(compose(f"algo={name}"))
    config = compose(f"algo={name}", f"sampling.predictor={predictor}", override)
    if reader == f"sampling.predictor={predictor}":
        check_sampler(config, algorithm)
        return
    refused(
        lambda: check_sampler(config, algorithm),
        f"{override.partition('=')[0]}=",
        f"is for {reader}; with {reader.partition('=')[0]}=",
        "the only value is",
    )


def test_every_key_of_one_sampler_is_refused_with_others(compose):
    """The table above is whole, and configs hold the values without effect."""
    classes = [*map(imported, CORRECTORS.values())]
    for name in SAMPLERS:
        classes += samplers_of(name)
    keys = {key: value for kind in classes for key, value in kind.keys.items()}
    assert keys.keys() == KEYS_OF_OTHERS.keys()
    sampling = compose("algo=mdlm").sampling
    assert {key: sampling[key] for key in keys} == keys


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("algo=mdlm", "corrector=gibbs"), ("algo=mdlm", "predictor=psi")),
        (("algo=sedd", "corrector=gibbs"), ("algo=sedd", "predictor=psi")),
        (("algo=ar", "corrector=gibbs"), ("algo=ar", "the only value is null")),
        (("algo=dimo", "corrector=gibbs"), ("algo=dimo", "the only value is null")),
        (("algo=duo", "corrector=gibs"), ("Did you mean 'gibbs'",)),
        (
            ("algo=duo", "corrector=gibbs", "corrector_select=lowest"),
            ("sampling.corrector_select='lowest'", "lowest_margin"),
        ),
        (
            ("algo=duo", "corrector=gibbs", "corrector_temperature=0.5"),
            ("corrector_temperature=0.5", "corrector_select=random"),
        ),
        (
            (
                "algo=duo",
                "corrector=gibbs",
                "corrector_t_min=0.5",
                "corrector_t_max=0.4",
            ),
            ("corrector_t_min=0.5", "corrector_t_max=0.4"),
        ),
        (
            (
                "algo=duo",
                "corrector=gibbs",
                "corrector_t_min=0.51",
                "corrector_t_max=0.6",
            ),
            ("corrector_t_min=0.51", "sampling.steps=8", "widen"),
        ),
        (("algo=mdlm", "predictor=confidence", "order=x"), ("order='x'", "margin")),
    ],
)
def test_correctors_and_orders_without_a_meaning_are_refused(compose, overrides, parts):
    algo, *others = overrides
    config = compose(algo, *(f"sampling.{other}" for other in others))
    refused(lambda: check_sampler(config, algorithm_class(config)), *parts)


def test_correctors_are_for_every_uniform_algorithm(compose, algo_name):
    config = compose(f"algo={algo_name}", "sampling.corrector=gibbs")
    algorithm = algorithm_class(config)
    is_uniform = issubclass(algorithm, UniformState)
    assert algorithm.has_leave_one_out is is_uniform
    if is_uniform:
        sampler = build_sampler(config, algorithm)
        assert type(sampler.corrector) is Gibbs


def test_names_of_samplers_cost_no_torch():
    code = "import sys, sampling.registry; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("use_float64", [True, False])
def test_use_float64_is_the_type_of_probabilities(
    make_model, sampling_pair, use_float64
):
    """Of the denoiser's, of the posterior's and of the noise, for every sampler."""
    predictor, name = sampling_pair
    model = make_model(
        f"algo={name}",
        f"sampling.predictor={predictor}",
        f"sampling.use_float64={use_float64}",
    )
    assert model.sampler.draw is (inverse_cdf if use_float64 else exponential_race)
    assert model.sampler.is_lean is use_float64
    seen = []

    def spy(probs, generator):
        seen.append(probs.dtype)
        return probs.argmax(dim=-1)

    model.sampler.draw = spy
    model.generate_samples(2, torch.Generator().manual_seed(0))
    wide = torch.float64 if use_float64 else torch.float32
    assert set(seen) == {wide}
    assert model.sampler.draw_dtype(torch.device("cpu")) == wide


def test_draws_are_wide_under_half_precision_autocast(make_model, monkeypatch):
    """trainer.precision=bf16 narrows the network, not the softmax and the draws."""
    model = make_model("algo=duo_base", "trainer.precision=bf16")
    dtypes = []
    denoised = model.denoised

    def spy(logits, **levels):
        log_x_theta = denoised(logits, **levels)
        dtypes.append((logits.dtype, log_x_theta.dtype))
        return log_x_theta

    monkeypatch.setattr(model, "denoised", spy)
    model.generate_samples(2, torch.Generator().manual_seed(0))
    assert set(dtypes) == {(torch.float64, torch.float64)}
