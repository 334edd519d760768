"""Samplers by name, the skeleton's calls, precision, and the end of sampling."""

from itertools import pairwise

import pytest
import torch

from algo import AR, DUO_BASE, MDLM, SEDDAbsorb
from samplers import SAMPLERS, Analytic, Ancestral, AutoRegressive, sampler_class
from utils import ConfigError

# ---------------------------------------------------------------- look-up


@pytest.mark.parametrize(
    ("predictor", "algorithm", "expected"),
    [
        ("ancestral", MDLM, Ancestral),
        ("ancestral", DUO_BASE, Ancestral),
        ("ancestral", AR, AutoRegressive),
        ("analytic", MDLM, Analytic),
        ("analytic", SEDDAbsorb, Analytic),
    ],
)
def test_the_sampler_that_fits_is_chosen(predictor, algorithm, expected):
    assert sampler_class(predictor, algorithm) is expected


@pytest.mark.parametrize(
    ("predictor", "algorithm"), [("analytic", AR), ("analytic", DUO_BASE), ("x", MDLM)]
)
def test_a_sampler_that_does_not_fit_is_refused(predictor, algorithm):
    """The choices are those that fit this algorithm."""
    with pytest.raises(ConfigError) as error:
        sampler_class(predictor, algorithm)
    text = str(error.value)
    assert "\n" not in text
    assert f"sampling.predictor={predictor!r}" in text
    choices = text.split("Choose from: ")[1]
    fitting = [n for n, c in SAMPLERS.items() if any(s.fits(algorithm) for s in c)]
    assert choices == f"{', '.join(sorted(fitting))}."


def test_at_most_one_sampler_of_a_name_fits(algo_name, compose):
    from algo import algorithm_class

    algorithm = algorithm_class(compose(f"algo={algo_name}"))
    for samplers in SAMPLERS.values():
        assert sum(sampler.fits(algorithm) for sampler in samplers) <= 1


# ---------------------------------------------------------------- the skeleton


@pytest.fixture
def model(make_model):
    return make_model("algo=mdlm", "sampling.steps=5")


def visited(model, **kwargs):
    """The pairs (alpha_t, alpha_s) that a sampler steps through."""
    pairs, step = [], model.sampler.step

    def spy(model, xt, alpha_t, alpha_s, generator):
        assert alpha_t.shape == alpha_s.shape == (len(xt), 1)
        pairs.append((float(alpha_t[0]), float(alpha_s[0])))
        return step(model, xt, alpha_t, alpha_s, generator)

    model.sampler.step = spy
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


def test_none_leaves_what_is_masked(make_model):
    """After one step to t = 1e-5 a mask stays with probability about 1e-5."""
    model = make_model("algo=mdlm", "sampling.noise_removal=none")
    model.sampler.step = lambda model, xt, *rest: xt
    x = model.generate_samples(2, torch.Generator())
    assert (x == model.mask_index).all()


def test_greedy_removal_is_the_denoisers_argmax(make_model):
    model = make_model("algo=duo_base", "sampling.noise_removal=greedy")
    model.sampler.step = lambda model, xt, *rest: xt
    x = model.generate_samples(4, torch.Generator().manual_seed(0))
    xt = model.prior_sample(4, torch.Generator().manual_seed(0))
    alpha = model.noise(torch.full((4, 1), 1e-5, dtype=torch.float64)).alpha_t
    assert torch.equal(x, model.predict_x0(xt, alpha).argmax(dim=-1))


def test_no_gradient_is_recorded(model):
    seen = []
    model.backbone.register_forward_hook(lambda *args: None)
    trunk = model.backbone.trunk

    def spy(*args):
        seen.append(torch.is_grad_enabled())
        return trunk(*args)

    model.backbone.trunk = spy
    model.generate_samples(2, torch.Generator().manual_seed(0))
    assert set(seen) == {False}


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("use_float64", [True, False])
def test_use_float64_is_the_type_of_probabilities(make_model, monkeypatch, use_float64):
    """Of the denoiser's, of the posterior's and of the noise, for every sampler."""
    for name, predictor in (
        ("mdlm", "ancestral"),
        ("mdlm", "analytic"),
        ("duo_base", "ancestral"),
        ("ar", "ancestral"),
    ):
        model = make_model(
            f"algo={name}",
            f"sampling.predictor={predictor}",
            f"sampling.use_float64={use_float64}",
        )
        seen = []

        def spy(probs, generator, seen=seen):
            seen.append(probs.dtype)
            return probs.argmax(dim=-1)

        monkeypatch.setattr("samplers.sample_categorical", spy)
        model.generate_samples(2, torch.Generator().manual_seed(0))
        assert set(seen) == {torch.float64 if use_float64 else torch.float32}


def test_draws_are_wide_under_half_precision_autocast(make_model, monkeypatch):
    """trainer.precision=bf16 narrows the network, not the softmax and the draws."""
    model = make_model("algo=duo_base", "trainer.precision=bf16")
    dtypes = []
    predict = model.predict_x0

    def spy(xt, alpha_t):
        log_x_theta = predict(xt, alpha_t)
        dtypes.append(log_x_theta.dtype)
        return log_x_theta

    monkeypatch.setattr(model, "predict_x0", spy)
    model.generate_samples(2, torch.Generator().manual_seed(0))
    assert set(dtypes) == {torch.float32}
