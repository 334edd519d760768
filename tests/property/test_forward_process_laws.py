"""Laws of the forward processes q(x_t | x_0) of every diffusion model.

Frequencies are compared with probabilities at 5 sigma: one cell fails by chance with
probability 6e-7, all cells of this file together with less than 1e-3; the seed is
fixed, so a run that passes once always passes.
"""

import pytest
import torch


def outside_5_sigma(counts, probs, num_draws):
    """Cells whose count is further from its mean than 5 standard deviations."""
    mean = num_draws * probs
    deviation = (mean * (1 - probs)).clamp(min=0).sqrt()
    return (counts - mean).abs() > 5 * deviation + 1e-6


def histogram(ids, K):
    """Counts of each id along the last axis, (R, N) -> (R, K)."""
    return torch.stack([row.bincount(minlength=K) for row in ids]).double()


@pytest.fixture(params=[None, 2], ids=["mask-last", "mask-inside"])
def model(request, make_model, stub_tokenizer, diffusion_name):
    """Each process with the mask as an added last id and as an id in the middle."""
    tokenizer = stub_tokenizer()
    if request.param is not None:
        tokenizer = stub_tokenizer(vocab_size=7, num_added=0, mask_token_id=2)
    return make_model(f"algo={diffusion_name}", tokenizer=tokenizer)


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.9, 1.0])
def test_frequencies_match_the_marginal(model, laws, generator, alpha):
    x0 = laws.clean(model)[:, None].expand(-1, 20_000)
    alpha_t = torch.full((len(x0), 1), alpha, dtype=torch.float64)
    xt = model.q_xt(x0, alpha_t, generator)
    probs = laws.marginal(model, x0[:, 0], alpha)
    bad = outside_5_sigma(histogram(xt, model.vocab_size), probs, x0.shape[1])
    assert not bad.any()


def test_each_sequence_has_its_own_level(model, laws, generator):
    x0 = laws.clean(model)[0].expand(3, 10_000)
    alpha_t = torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64)
    xt = model.q_xt(x0, alpha_t, generator)
    probs = laws.marginal(model, x0[:, 0], alpha_t[:, 0])
    bad = outside_5_sigma(histogram(xt, model.vocab_size), probs, x0.shape[1])
    assert not bad.any()


def test_the_last_time_looks_like_the_prior(model, laws, generator):
    """prior_sample draws from q(x_1 | x_0) as alpha goes to 0."""
    xt = model.prior_sample(4000, generator)
    assert xt.shape == (4000, model.num_tokens)
    assert xt.dtype == torch.int64
    probs = laws.marginal(model, laws.clean(model)[:1], 0.0)
    counts = histogram(xt.reshape(1, -1), model.vocab_size)
    assert not outside_5_sigma(counts, probs, xt.numel()).any()


def test_corrupt_leaves_its_inputs_alone(model, laws):
    x0 = laws.clean(model)[torch.arange(32).view(4, 8) % 6]
    t = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    before = x0.clone(), t.clone()
    z = model.corrupt(x0, t)
    assert torch.equal(x0, before[0])
    assert torch.equal(t, before[1])
    assert z.xt.shape == x0.shape
    assert z.alpha_t.shape == z.dalpha_t.shape == (4, 1)


def test_corrupt_uses_the_configured_schedule(make_model, schedule_name, uniform_name):
    """The share of changed tokens is (1 - alpha_t)(1 - 1/K), within 5 sigma."""
    model = make_model(f"algo={uniform_name}", f"noise={schedule_name}")
    x0 = torch.zeros(1, 50_000, dtype=torch.long)
    z = model.corrupt(x0, torch.tensor([0.6], dtype=torch.float64))
    probs = (1 - z.alpha_t[0]) * (1 - 1 / model.vocab_size)
    changed = (z.xt != 0).sum()
    assert not outside_5_sigma(changed, probs, x0.numel()).any()
    expected = model.noise(torch.tensor([[0.6]], dtype=torch.float64))
    assert torch.equal(z.alpha_t, expected.alpha_t)


def test_ignore_bos_neither_noises_nor_scores_position_0(make_model, diffusion_name):
    """With it, position 0 stays at the last time; without it, it does not."""
    x0 = torch.full((64, 8), 3)
    t = torch.ones(64, dtype=torch.float64)
    changed, scored = {}, {}
    for flag in (True, False):
        model = make_model(f"algo={diffusion_name}", f"algo.ignore_bos={flag}")
        changed[flag] = (model.corrupt(x0, t).xt != x0).any(dim=0)
        scored[flag] = model.valid_tokens(torch.ones(2, 8))
    assert changed[True].tolist() == [False] + [True] * 7
    assert changed[False].all()
    assert scored[True].tolist() == [[0] + [1] * 7] * 2
    assert scored[False].tolist() == [[1] * 8] * 2


def test_ignore_bos_takes_the_first_token_out_of_the_loss(make_model, diffusion_name):
    model = make_model(f"algo={diffusion_name}", "algo.ignore_bos=True")
    batch = {
        "input_ids": torch.full((4, 8), 3),
        "attention_mask": torch.ones(4, 8),
    }
    losses = model.loss(batch)
    nll = model.nll(batch["input_ids"]).nll
    assert losses.num_tokens.tolist() == [7] * 4
    torch.testing.assert_close(losses.nlls, nll[:, 1:].sum(dim=-1))
    assert batch["attention_mask"].all()
