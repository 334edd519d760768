"""Distribution of samples against exact enumeration over two tokens.

The denoiser is a fixed table that depends on all of x_t (`enumeration.Belief`). Each
chi-square test is of 100 000 samples of one seed, the same for all. The significance
is 1e-3 for all tests together (Bonferroni, for 400 of them; there are fewer).
"""

import pytest
import torch
from enumeration import (
    JOINTS,
    K,
    N,
    configure,
    draw_counts,
    enumerate_samples,
    first_hitting,
    ordered,
    p_value,
    pair_model,
    x_theta,
)
from tiny import SAMPLING

from models.noise import SCHEDULES

SIGNIFICANCE = 1e-3 / 400
STEPPING = [pair for pair in SAMPLING if pair[0] not in JOINTS and pair[1] != "ar"]
ORDERED = [pair for pair in SAMPLING if JOINTS.get(pair[0]) is ordered]
HITTING = [name for predictor, name in SAMPLING if predictor == "first_hitting"]
# A sampler knows a schedule by its levels alone: most have one number of steps.
GRIDS = [
    (name, num_steps)
    for name in sorted(SCHEDULES)
    for num_steps in (1, 2, 5)
    if num_steps == 5 or name in ("log-linear", "cosine")
]
PSI = [name for predictor, name in SAMPLING if predictor == "psi"]
# Kappas of every phase differ, and no phase is empty from two steps on.
MIXED = {
    "psi__high_mode": "constant-0.3",
    "psi__middle_mode": "pure-pc",
    "psi__low_mode": "max-rescale-0.3",
    "psi__high_frac": 0.4,
    "psi__middle_frac": 0.3,
}
pairs = pytest.mark.parametrize(
    ("predictor", "name"), STEPPING, ids=["-".join(pair) for pair in STEPPING]
)


@pytest.fixture
def build(make_model, give_logits):
    """Model and belief of an algorithm and a sampler; psi with mixed modes."""

    def build(predictor, name, noise="log-linear", is_timed=None, **sampling):
        if name == "d3pm" and noise != "log-linear":
            pytest.skip("d3pm is for noise=log-linear")
        overrides = f"algo={name}", f"noise={noise}", f"sampling.predictor={predictor}"
        model, belief = pair_model(
            make_model, give_logits, *overrides, is_timed=is_timed
        )
        configure(model, **(MIXED if predictor == "psi" else {}), **sampling)
        return model, belief

    return build


@pytest.fixture
def seed() -> int:
    return 1


# ---------------------------------------------------------------- steps


@pairs
@pytest.mark.parametrize(
    ("schedule_name", "num_steps"), GRIDS, indirect=["schedule_name"]
)
def test_samples_follow_the_enumeration(
    build, predictor, name, schedule_name, num_steps, seed
):
    """Of every sampler of every algorithm: lean draws are exact."""
    model, belief = build(predictor, name, schedule_name)
    assert model.sampler.is_lean
    expected = enumerate_samples(model, belief, num_steps)
    assert p_value(draw_counts(model, num_steps, seed), expected) > SIGNIFICANCE


@pytest.mark.parametrize("name", PSI)
@pytest.mark.parametrize("profile", ["linear", "linear-constant-linear-0.5"])
@pytest.mark.parametrize(
    "mode", ["pure-pc", "constant-0.5", "max-capped-0.1", "constant-remdm-0.2"]
)
def test_psi_samples_follow_the_enumeration(build, name, profile, mode, seed):
    """For kinds of modes and of time profiles, a plateau without denoising among them.

    The plan itself is held against the formulas in `test_psi`.
    """
    modes = {f"psi__{phase}_mode": mode for phase in ("high", "middle", "low")}
    model, belief = build("psi", name)
    configure(model, psi__time_profile=profile, **modes)
    kappas = {step.kappa for step in model.sampler.plan(model.noise, 5)}
    assert kappas != {1.0}
    expected = enumerate_samples(model, belief, 5)
    assert p_value(draw_counts(model, 5, seed), expected) > SIGNIFICANCE


@pairs
def test_dense_samples_follow_the_enumeration(build, predictor, name, seed):
    """sampling.use_float64=False draws rare tokens too rarely, by parts of 2^-24: no
    more is claimed than that 100 000 samples do not show it."""
    model, belief = build(predictor, name, use_float64=False)
    assert not model.sampler.is_lean
    expected = enumerate_samples(model, belief, 5)
    assert p_value(draw_counts(model, 5, seed), expected) > SIGNIFICANCE


@pytest.mark.parametrize(
    ("predictor", "name"),
    [("ancestral", "mdlm"), ("ancestral", "duo_base"), ("analytic", "sedd")],
)
@pytest.mark.parametrize("use_float64", [True, False])
def test_nucleus_truncates_the_belief(build, predictor, name, use_float64, seed):
    """Samples are those of the truncated belief, and not those of the whole one."""
    model, belief = build(predictor, name, p_nucleus=0.8, use_float64=use_float64)
    counts = draw_counts(model, 4, seed)
    truncated = enumerate_samples(model, belief, 4)
    assert p_value(counts, truncated) > SIGNIFICANCE
    model.sampler.p_nucleus = 1.0
    assert p_value(counts, enumerate_samples(model, belief, 4)) < SIGNIFICANCE


@pytest.mark.parametrize(
    ("predictor", "name"),
    [*STEPPING, ("confidence", "mdlm"), ("entropy_bound", "sedd")],
)
@pytest.mark.parametrize("use_float64", [True, False])
def test_temperature_sharpens_the_belief(build, predictor, name, use_float64, seed):
    """Of every kernel, and before the nucleus; samples are not those of the belief
    itself."""
    settings = {"temperature": 0.6, "p_nucleus": 0.95, "use_float64": use_float64}
    model, belief = build(predictor, name, **settings)
    enumerated = ordered if predictor in JOINTS else enumerate_samples
    counts = draw_counts(model, 3, seed)
    assert p_value(counts, enumerated(model, belief, 3)) > SIGNIFICANCE
    model.sampler.temperature = 1.0
    assert p_value(counts, enumerated(model, belief, 3)) < SIGNIFICANCE


@pairs
@pytest.mark.parametrize("use_float64", [True, False])
def test_samples_given_a_token_follow_the_enumeration(
    build, predictor, name, use_float64, seed
):
    """The first token is known from the start, and the second one drawn given it."""
    model, belief = build(predictor, name, use_float64=use_float64)
    expected = enumerate_samples(model, belief, 3, first=3)
    counts = draw_counts(model, 3, seed, first=3)
    assert counts[3].sum() == N
    assert p_value(counts, expected) > SIGNIFICANCE


@pytest.mark.parametrize("name", ["duo_base", "mdlm"])
def test_windows_follow_the_enumeration_given_what_they_keep(build, name, seed):
    """Semi-autoregressive: the second window keeps a token of the first one."""
    model, belief = build("ancestral", name)
    first_window = enumerate_samples(model, belief, 2)
    expected = sum(
        p * enumerate_samples(model, belief, 2, first=token)
        for token, p in enumerate(first_window.sum(dim=0))
        if p
    )
    configure(model, semi_ar=True, stride_length=1, num_strides=1)
    generator = torch.Generator().manual_seed(seed)
    x = model.generate_samples(N, generator, num_steps=2).tokens
    assert x.shape == (N, 3)
    for pair, probs in ((x[:, :2], first_window), (x[:, 1:], expected)):
        counts = (pair[:, 0] * K + pair[:, 1]).bincount(minlength=K * K)
        assert p_value(counts, probs) > SIGNIFICANCE


# ---------------------------------------------------------------- chosen order


@pytest.mark.parametrize(("predictor", "name"), ORDERED)
@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("is_timed", [True, False])
def test_ordered_samples_follow_the_enumeration(
    build, predictor, name, use_float64, is_timed, seed
):
    """And are not those of the model's law in as many steps."""
    model, belief = build(predictor, name, is_timed=is_timed, use_float64=use_float64)
    counts = draw_counts(model, 4, seed)
    assert p_value(counts, ordered(model, belief, 4)) > SIGNIFICANCE
    model, belief = build("ancestral", name, is_timed=is_timed)
    assert p_value(counts, enumerate_samples(model, belief, 4)) < SIGNIFICANCE


@pytest.mark.parametrize("order", ["top_prob", "margin", "entropy"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_orders_follow_the_enumeration(build, order, num_steps, seed):
    model, belief = build("confidence", "mdlm", order=order, p_nucleus=0.9)
    expected = ordered(model, belief, num_steps)
    assert p_value(draw_counts(model, num_steps, seed), expected) > SIGNIFICANCE


@pytest.mark.parametrize("gamma", [0, 1.2, 1.6, 1e9])
def test_bounds_follow_the_enumeration(build, gamma, seed):
    """From one token at a time to all at once."""
    model, belief = build("entropy_bound", "mdlm", gamma=gamma)
    expected = ordered(model, belief, 1)
    assert p_value(draw_counts(model, 1, seed), expected) > SIGNIFICANCE


@pytest.mark.parametrize(("predictor", "name"), ORDERED)
def test_ordered_samples_given_a_token(build, predictor, name, seed):
    model, belief = build(predictor, name)
    counts = draw_counts(model, 3, seed, first=3)
    assert counts[3].sum() == N
    assert p_value(counts, ordered(model, belief, 3, first=3)) > SIGNIFICANCE


# ---------------------------------------------------------------- first hitting


def test_first_hitting_of_a_belief_without_time_reveals_in_any_order(build, seed):
    """Each of the two tokens first in half of the samples, the other one given it."""
    model, belief = build("first_hitting", "mdlm")
    p = x_theta(model, belief, torch.tensor([[0.5]]).double()).view(K, K, 2, K)
    m = model.mask_index
    left_first = p[m, m, 0][:, None] * p[:, m, 1]
    right_first = p[m, m, 1][None, :] * p[m, :, 0].T
    expected = (left_first + right_first) / 2
    torch.testing.assert_close(first_hitting(model, belief), expected)
    assert p_value(draw_counts(model, 1, seed), expected) > SIGNIFICANCE


@pytest.mark.parametrize("name", HITTING)
@pytest.mark.parametrize("use_float64", [True, False])
def test_first_hitting_follows_its_joint(build, name, schedule_name, use_float64, seed):
    """With the network asked at the times of reveal."""
    model, belief = build(
        "first_hitting", name, schedule_name, is_timed=True, use_float64=use_float64
    )
    expected = first_hitting(model, belief)
    assert p_value(draw_counts(model, 1, seed), expected) > SIGNIFICANCE


@pytest.mark.parametrize("name", HITTING)
def test_ancestral_tends_to_first_hitting(build, name):
    """In 2000 steps to 1e-3; with one step the two differ by more."""
    model, belief = build("ancestral", name, is_timed=True)
    joint = first_hitting(model, belief)
    error = (enumerate_samples(model, belief, 2000) - joint).abs().max()
    assert error < 1e-3
    assert (enumerate_samples(model, belief, 1) - joint).abs().max() > 5e-3
    assert (joint.sum() - 1).abs() < 1e-9


@pytest.mark.parametrize("name", HITTING)
def test_first_hitting_given_a_token(build, name, seed):
    model, belief = build("first_hitting", name, is_timed=False)
    p = x_theta(model, belief, torch.tensor([[0.5]]).double()).view(K, K, 2, K)
    expected = torch.zeros(K, K, dtype=torch.float64)
    expected[3] = p[3, model.mask_index, 1]
    assert p_value(draw_counts(model, 1, seed, first=3), expected) > SIGNIFICANCE
