"""Laws of tokens that are given: samples hold them, and nothing else is left to chance
that should not be. Every sampler, lean and dense, in one window and in several.

Which distribution the other tokens then have is in `test_sampler_distribution`.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SAMPLING, tiny_model

from sampling.prompts import Given

B, L, STRIDE, STRIDES = 4, 8, 3, 2
WINDOWS = (
    "sampling.semi_ar=True",
    f"sampling.stride_length={STRIDE}",
    f"sampling.num_strides={STRIDES}",
)
VARIANTS = {
    "lean": (),
    "dense": ("sampling.use_float64=False",),
    "windows": WINDOWS,
    "dense-windows": ("sampling.use_float64=False", *WINDOWS),
}
CASES = [
    (*pair, variant)
    for pair in SAMPLING
    for variant in VARIANTS
    if pair[1] != "ar" or "windows" not in variant
]


@functools.cache
def model_of(predictor, name, variant):
    return tiny_model(
        f"algo={name}", f"sampling.predictor={predictor}", *VARIANTS[variant]
    )


def random_given(model, seed, share):
    """Random tokens at random positions; for AR at the start, bos first."""
    generator = torch.Generator().manual_seed(seed)
    length = model.sampler.length(L)
    clean = model.vocab_size if model.mask_index is None else model.mask_index
    tokens = torch.randint(clean, (B, length), generator=generator)
    if not model.is_autoregressive:
        known = torch.rand(B, length, generator=generator) < share
        return Given(tokens, known)
    lengths = (share * torch.rand(B, 1, generator=generator) * length).ceil()
    tokens[:, 0] = model.tokenizer.bos_token_id
    return Given(tokens, torch.arange(length) < lengths)


@pytest.mark.parametrize(
    ("predictor", "name", "variant"), CASES, ids=["-".join(case) for case in CASES]
)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    num_steps=st.sampled_from([1, 3]),
)
def test_samples_hold_what_is_given(predictor, name, variant, seed, share, num_steps):
    """Exactly; the other tokens are clean ones, and what is given is left alone."""
    model = model_of(predictor, name, variant)
    tokens, known = random_given(model, seed, share)
    # What stands at unknown positions does not matter, be it no token at all.
    hole = torch.where(known, tokens, -7)
    before = hole.clone(), known.clone()
    generator = torch.Generator().manual_seed(seed)
    x = model.generate_samples(B, generator, num_steps, given=Given(hole, known)).tokens
    assert x.shape == tokens.shape
    assert torch.equal(x[known], tokens[known])
    assert bool((x >= 0).all())
    assert bool((x < model.vocab_size).all())
    if model.mask_index is not None:
        assert not (x == model.mask_index).any()
    assert torch.equal(hole, before[0])
    assert torch.equal(known, before[1])


def test_a_sample_that_is_given_whole_costs_nothing(make_model, sampling_pair):
    predictor, name = sampling_pair
    model = make_model(f"algo={name}", f"sampling.predictor={predictor}")
    tokens = torch.arange(B * L).view(B, L) % 6
    tokens[:, 0] = model.tokenizer.bos_token_id
    given = Given(tokens, torch.ones(B, L, dtype=torch.bool))
    samples = model.generate_samples(B, given=given)
    assert torch.equal(samples.tokens, tokens)
    assert samples.evaluations.tolist() == [0] * B


def test_what_is_given_matters_to_the_rest(make_model, sampling_pair):
    """The network sees it: under one seed, other first tokens give other samples."""
    predictor, name = sampling_pair
    model = make_model(f"algo={name}", f"sampling.predictor={predictor}")
    samples = []
    for token in (2, 3):
        known = torch.arange(L).expand(32, L) == 1
        given = Given(torch.full((32, L), token), known)
        generator = torch.Generator().manual_seed(0)
        samples.append(model.generate_samples(32, generator, given=given).tokens)
    assert (samples[0][:, 2:] != samples[1][:, 2:]).any()


@pytest.mark.parametrize("windows", [(), WINDOWS], ids=["plain", "windows"])
def test_bos_is_kept_at_the_start_only(make_model, diffusion_name, windows):
    """algo.ignore_bos: first of the sample, not of each window; unless given."""
    model = make_model(
        f"algo={diffusion_name}", "algo.ignore_bos=True", "sampling.steps=4", *windows
    )
    model.tokenizer.bos_token_id = 5
    length = model.sampler.length(L)
    generator = torch.Generator().manual_seed(0)
    x = model.generate_samples(64, generator).tokens
    assert bool((x[:, 0] == 5).all())
    assert not (x == 5).all(dim=0)[1:].any()
    first = torch.arange(length).expand(64, length) == 0
    given = Given(torch.full((64, length), 2), first)
    assert bool(
        (model.generate_samples(64, generator, given=given).tokens[:, 0] == 2).all()
    )
