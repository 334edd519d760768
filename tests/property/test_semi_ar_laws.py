"""Laws of semi-autoregressive samples: windows from left to right, each of which keeps
what the one before it drew.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny import SAMPLING, compose, tiny_model

from cli.settle import algorithm_class
from sampling.autoregressive import SemiAutoRegressive
from sampling.prompts import Given

DIFFUSION_PAIRS = [pair for pair in SAMPLING if pair[1] != "ar"]
OF_MDLM = [predictor for predictor, name in SAMPLING if name == "mdlm"]
L = 8


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def windows(stride, num_strides):
    return (
        "sampling.semi_ar=True",
        f"sampling.stride_length={stride}",
        f"sampling.num_strides={num_strides}",
    )


@pytest.fixture(
    params=DIFFUSION_PAIRS, ids=["-".join(pair) for pair in DIFFUSION_PAIRS]
)
def pair(request):
    """Overrides for a diffusion algorithm and a sampler that fits it."""
    predictor, name = request.param
    return f"algo={name}", f"sampling.predictor={predictor}"


def test_no_stride_is_a_plain_sample(make_model, pair):
    """K = 0: token for token what the sampler alone draws."""
    model, plain = make_model(*pair, *windows(3, 0)), make_model(*pair)
    assert isinstance(model.sampler, SemiAutoRegressive)
    got, expected = (m.generate_samples(5, seeded()) for m in (model, plain))
    assert got.tokens.shape == (5, L)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.evaluations, expected.evaluations)


@pytest.mark.parametrize(("stride", "num_strides"), [(1, 3), (5, 2), (7, 1)])
def test_a_denoiser_sure_of_one_id_writes_nothing_else(
    make_model, pair, laws, give_logits, stride, num_strides
):
    """L + K S tokens of it."""
    model = make_model(*pair, *windows(stride, num_strides))
    sure = F.one_hot(torch.tensor(4), 7).double()
    logits = laws.logits_for(model, sure)
    give_logits(model, lambda xt, sigma: logits.expand(*xt.shape, 7))
    x = model.generate_samples(3, seeded(), num_steps=2).tokens
    assert x.tolist() == [[4] * (L + num_strides * stride)] * 3


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_windows_keep_what_was_drawn(make_model, pair, stride):
    """The first L - S tokens of a window are the last L - S of the one before it, its
    last S are new, and the windows make up the sample."""
    model = make_model(*pair, *windows(stride, 3))
    drawn, sampler = [], model.sampler.sampler

    def spy(*args, given, **options):
        samples = sampler(*args, given=given, **options)
        drawn.append(samples.tokens)
        assert bool((samples.tokens == given.tokens)[given.known].all())
        assert (~given.known).sum(dim=-1).tolist() == [
            L if len(drawn) == 1 else stride
        ] * 4
        return samples

    model.sampler.sampler = spy
    x = model.generate_samples(4, seeded()).tokens
    assert len(drawn) == 4
    for left, right in pairwise(drawn):
        assert torch.equal(right[:, : L - stride], left[:, stride:])
    whole = torch.cat([drawn[0], *(window[:, -stride:] for window in drawn[1:])], dim=1)
    assert torch.equal(x, whole)


@pytest.mark.parametrize("predictor", OF_MDLM)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("use_float64", [True, False])
def test_no_mask_is_left(make_model, predictor, num_steps, use_float64):
    model = make_model(
        "algo=mdlm",
        f"sampling.predictor={predictor}",
        f"sampling.use_float64={use_float64}",
        *windows(5, 2),
    )
    x = model.generate_samples(32, seeded(), num_steps).tokens
    assert x.shape == (32, 18)
    assert bool((x >= 0).all())
    assert bool((x < model.mask_index).all())


@pytest.mark.parametrize("removal", ["ancestral", "greedy"])
def test_steps_and_evaluations_of_a_window(make_model, removal):
    """N steps and the removal of noise, so at most (K + 1) (N + 1) evaluations."""
    model = make_model(
        "algo=duo_base", f"sampling.noise_removal={removal}", *windows(3, 2)
    )
    sampler, calls = model.sampler.sampler, []

    def watch(name):
        function = getattr(sampler, name)

        def call(*args):
            calls.append(name)
            return function(*args)

        setattr(sampler, name, call)

    watch("step")
    watch("remove_noise")
    evaluations = model.generate_samples(4, seeded(), num_steps=93).evaluations
    assert calls == 3 * (93 * ["step"] + ["remove_noise"])
    assert bool((evaluations <= 3 * 94).all())
    assert bool((evaluations > 0).all())


def test_evaluations_add_up_over_windows(make_model):
    """First hitting makes exactly one a token that is drawn."""
    model = make_model("algo=mdlm", "sampling.predictor=first_hitting", *windows(3, 2))
    known = torch.zeros(2, L + 6, dtype=torch.bool)
    known[1, 2:11] = True
    given = Given(torch.zeros(2, L + 6, dtype=torch.long), known)
    samples = model.generate_samples(2, seeded(), given=given)
    assert samples.evaluations.tolist() == [14, 5]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("algo=mdlm", *windows(8, 1)), ("sampling.stride_length=8", "model.length=8")),
        (("algo=mdlm", *windows(0, 1)), ("sampling.stride_length=0",)),
        (("algo=mdlm", *windows(-1, 1)), ("sampling.stride_length=-1",)),
        (("algo=ar", *windows(3, 1)), ("sampling.semi_ar=True", "algo=ar")),
        (
            ("algo=mdlm", *windows(3, 1), "sampling.noise_removal=none"),
            ("sampling.noise_removal='none'", "ancestral", "greedy"),
        ),
        (
            ("algo=mdlm", *windows(3, 1), "sampling.noise_removal=False"),
            ("sampling.noise_removal=False", "ancestral", "greedy"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, parts):
    """In one line, when a config is checked and when a model is built."""
    config = compose(*overrides)
    for build in (
        lambda: algorithm_class(config).validate_config(config),
        lambda: tiny_model(*overrides),
    ):
        refused(build, *parts)
