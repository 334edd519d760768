"""SDTT: what its targets are, whatever the teacher, and what its losses are minimal at.

The numbers of the tests are those of the list of invariants that SDTT has to have: 1
one step, 2 rows of targets, 3 teachers without context, 4 an exact teacher, 5 what is
revealed, 6 targets stay, 7 divergences. 8 to 10 are in tests/unit/distillation and
tests/integration/test_resumed_runs.py.
"""

import itertools

import pytest
import torch
from chunking import random_batch
from torch import Tensor

from distillation.divergences import DIVERGENCES
from distillation.sdtt import REVEAL_RATES, TIME_GRIDS
from models.head import Head, logits_of
from models.noise import SCHEDULES

K, MASK = 7, 6  # of the stub tokenizer


def sdtt(make_model, *overrides: str, B: int = 4):
    """In training mode, in float64; student and teacher are two networks."""
    sizes = (f"loader.global_batch_size={B}", f"loader.batch_size={B}")
    own = ("algo=sdtt", "algo.orig_num_sampling_steps=8", "training.sampling_eps=1e-5")
    own += ("algo.min_num_sampling_steps=1", "training.loss_precision=float64")
    return make_model(*own, *sizes, *overrides).double().train()


def masked_rows(model, x0: Tensor, batch_idx: int = 0):
    """(x_t, which are masked, log-probabilities of the targets (B, L, K), steps)."""
    t = model.sample_t(len(x0), batch_idx)
    z, steps = model.plan(x0, t, batch_idx)
    head = model.targets(z.xt, steps)
    return z.xt, z.xt == MASK, subs(model, head, z.xt), steps


def subs(model, head: Head, x: Tensor) -> Tensor:
    logits = logits_of(head, model.loss_precision())
    log_p = model.process_logits(logits, xt=x, sigma=torch.zeros(len(x), 1))
    return model.carry_over(log_p, x)


def believing(model, monkeypatch, belief):
    """A teacher whose log-probabilities are belief(x, condition), (B, L, K)."""
    eye = torch.eye(K, dtype=torch.float64)
    monkeypatch.setattr(
        model.teacher, "head", lambda x, condition: Head(belief(x), eye, None)
    )
    return model


# ---------------------------------------------------------------- 1, 2, 3


@pytest.mark.parametrize("conditioning", [False, True])
@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_1_one_step_is_the_teacher_at_x_t(make_model, grid, conditioning):
    model = sdtt(
        make_model,
        "algo.num_distill_steps=1",
        f"algo.teacher_time_grid={grid}",
        f"algo.time_conditioning={conditioning}",
    )
    x0 = random_batch(model)["input_ids"]
    xt, masked, target, steps = masked_rows(model, x0)
    head = model.teacher.head(xt, model.condition(steps[0].sigma))
    torch.testing.assert_close(target[masked], subs(model, head, xt)[masked])


@pytest.mark.parametrize("mode", DIVERGENCES)
def test_1_a_student_that_is_its_teacher_has_nothing_to_learn(make_model, mode):
    """With one step; with two of them what is revealed first teaches the others."""
    for steps, is_zero in ((1, True), (2, False)):
        model = sdtt(
            make_model,
            f"algo.num_distill_steps={steps}",
            f"algo.distill_mode={mode}",
            B=16,
        )
        model.teacher.take(model.backbone.state_dict(), 0)
        loss = model.distillation_loss(random_batch(model, 16), 0)
        loss.loss.backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters())
        assert (float(loss.nlls.abs().max()) < 1e-10) == is_zero
        assert (largest < 1e-10) == is_zero


@pytest.mark.parametrize("sampling_mode", REVEAL_RATES)
@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_2_targets_are_distributions_of_tokens(make_model, grid, sampling_mode):
    """Normalised, without the mask; tokens that are not masked have no loss."""
    model = sdtt(
        make_model,
        "algo.num_distill_steps=4",
        f"algo.teacher_time_grid={grid}",
        f"algo.sampling_mode={sampling_mode}",
    )
    batch = random_batch(model)
    _, masked, target, _ = masked_rows(model, batch["input_ids"])
    assert 0 < int(masked.sum()) < masked.numel()
    assert float(target.logsumexp(-1)[masked].abs().max()) < 1e-5
    assert float(target[masked][:, MASK].max()) < -1e5
    losses = model.distillation_loss(batch, 0)
    assert losses.num_tokens.tolist() == masked.sum(-1).tolist()


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_3_a_teacher_without_context(make_model, monkeypatch, grid, M):
    """Believes the same at every step."""
    overrides = (f"algo.num_distill_steps={M}", f"algo.teacher_time_grid={grid}")
    model = sdtt(make_model, *overrides)
    rows = torch.randn(model.num_tokens, K, dtype=torch.float64)
    believing(model, monkeypatch, lambda x: rows.expand(*x.shape, K))
    x0 = random_batch(model)["input_ids"]
    xt, masked, target, _ = masked_rows(model, x0)
    expected = rows[:, :MASK].log_softmax(-1).expand(*xt.shape, K - 1)
    torch.testing.assert_close(target[masked][:, :MASK], expected[masked])


# ---------------------------------------------------------------- 4


def pair_posterior(joint: Tensor):
    """log p(x_1 | x_2) and log p(x_2 | x_1) as far as they are known, (B, 2, K)."""

    def belief(x: Tensor) -> Tensor:
        rows = torch.zeros(len(x), 2, K, dtype=torch.float64)
        for i, table in enumerate((joint, joint.T)):  # rows: the token that is asked
            other = x[:, 1 - i]
            known = table[:, other.clamp(max=MASK - 1)].T  # (B, K - 1)
            p = torch.where((other == MASK)[:, None], table.sum(1), known)
            rows[:, i, :MASK] = p.log()
        return rows

    return belief


def test_4_of_an_exact_teacher(make_model, monkeypatch, generator):
    """Two dependent tokens, both masked, two steps: the mean of the targets is the
    marginal, within 4 standard errors of 40 000 sequences, so that the forward
    divergence has its minimum at the teacher's own belief. That of the backward one is
    the normalised geometric mean, which is sharper."""
    B = 40_000
    model = sdtt(make_model, "model.length=3", B=B)
    joint = torch.rand(MASK, MASK, dtype=torch.float64, generator=generator) ** 3
    joint += 3 * torch.eye(MASK)
    joint /= joint.sum()
    pair = pair_posterior(joint)

    def belief(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(pair(x[:, :2]), (0, 0, 0, 1))

    believing(model, monkeypatch, belief)
    x0 = torch.zeros(B, 3, dtype=torch.long)
    t = torch.full((B,), 0.4, dtype=torch.float64)
    z, _ = model.plan(x0, t)
    both = torch.ones(B, 3, dtype=torch.bool)
    masked = z._replace(xt=torch.full((B, 3), MASK), is_noised=both)
    monkeypatch.setattr(model, "corrupt", lambda *args: masked)
    z, steps = model.plan(x0, t)
    target = subs(model, model.targets(z.xt, steps), z.xt)[:, :2, :MASK]
    for i, marginal in enumerate((joint.sum(1), joint.sum(0))):
        p = target[:, i].exp()
        error = p.std(0) / B**0.5
        assert bool(((p.mean(0) - marginal).abs() < 4 * error + 1e-12).all())
        assert float(error.max()) > 1e-5  # trajectories differ
        geometric = target[:, i].mean(0).log_softmax(-1)
        entropies = [-(x.exp() * x).sum() for x in (geometric, marginal.log())]
        assert float(entropies[0]) < float(entropies[1]) - 0.01
        minima = {"kl-fwd": p.mean(0).log(), "kl-bwd": geometric}
        for mode, log_q in minima.items():
            logits = log_q.clone().requires_grad_()
            loss = DIVERGENCES[mode](logits.expand(B, MASK), target[:, i]).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
            assert float(gradient.abs().max()) < 1e-9


# ---------------------------------------------------------------- 5, 6


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("sampling_mode", REVEAL_RATES)
def test_5_the_revealed_fraction(make_model, M, sampling_mode):
    """M D / t of the masked tokens on the exact grid, and all where t < M D: the
    products of what survives telescope. Within 4 standard errors of 32 000 tokens."""
    B, D = 4000, (1 - 1e-5) / 16
    model = sdtt(
        make_model,
        f"algo.num_distill_steps={M}",
        f"algo.sampling_mode={sampling_mode}",
        "algo.orig_num_sampling_steps=16",
        B=B,
    )
    assert model.step_size == D
    x0 = torch.zeros(B, model.num_tokens, dtype=torch.long)
    for t in (0.9, 0.5, M * D + 0.01, M * D - 0.01):
        z, steps = model.plan(x0, torch.full((B,), t, dtype=torch.float64))
        total = int((z.xt == MASK).sum())
        revealed = sum(len(step.positions) for step in steps)
        p = min(M * D / t, 1)
        error = (p * (1 - p) / total) ** 0.5
        assert abs(revealed / total - p) <= 4 * error
        positions = torch.cat([step.positions for step in steps])
        assert len(positions.unique()) == len(positions)  # none twice
        assert bool((z.xt.flatten()[positions] == MASK).all())


def test_5_the_modes_of_steps_are_one():
    alpha = torch.linspace(1e-3, 0.999, 50, dtype=torch.float64)
    pairs = [(a, s) for a, s in itertools.product(alpha, alpha) if a <= s]
    alpha_t, alpha_s = (torch.stack(x) for x in zip(*pairs, strict=True))
    one, two = (rate(alpha_t, alpha_s) for rate in REVEAL_RATES.values())
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert float(one.max()) < 1 + 1e-12
    assert float(one.min()) == 0


def test_5_grids_begin_at_t_and_take_steps_of_d():
    t, D = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64), 0.05
    for M in (1, 2, 3, 5):
        exact, endpoint, legacy = (grid(t, D, M) for grid in TIME_GRIDS.values())
        assert exact.shape == endpoint.shape == legacy.shape == (M, 3)
        steps = torch.arange(M)[:, None]
        torch.testing.assert_close(exact, t - steps * D)
        stretch = M / max(M - 1, 1)
        torch.testing.assert_close(endpoint, t - stretch * steps * D)
        space = 1 - steps / max(M - 1, 1)
        published = t * space + (1 - t) * (t - M * D)
        torch.testing.assert_close(legacy, published.double())


def test_6_targets_stay(make_model, monkeypatch):
    """A token that a step has revealed keeps what was believed of it there; one that
    none reveals has the last belief."""
    M, beliefs = 4, []
    model = sdtt(make_model, f"algo.num_distill_steps={M}", B=64)

    def belief(x):
        beliefs.append(torch.randn(*x.shape, K, dtype=torch.float64))
        return beliefs[-1]

    believing(model, monkeypatch, belief)
    x0 = torch.zeros(64, model.num_tokens, dtype=torch.long)
    xt, masked, target, steps = masked_rows(model, x0)
    assert len(beliefs) == M
    index = torch.full((xt.numel(),), M - 1)
    for k, step in enumerate(steps):
        index[step.positions] = k
    assert set(index[masked.flatten()].tolist()) == set(range(M))
    stacked = torch.stack(beliefs).flatten(1, 2)  # (M, B L, K)
    own = stacked[index, torch.arange(xt.numel())].view(*xt.shape, K)
    expected = subs(model, Head(own, torch.eye(K).double(), None), xt)
    torch.testing.assert_close(target[masked], expected[masked])


def test_6_what_is_revealed_is_drawn_from_the_belief(make_model, monkeypatch):
    """Within 4 standard errors, and never the mask."""
    B = 4000
    model = sdtt(make_model, "algo.orig_num_sampling_steps=1", B=B)
    rows = torch.tensor([1.0, 0, -1, 2, 0.5, -2, 9], dtype=torch.float64)
    believing(model, monkeypatch, lambda x: rows.expand(*x.shape, K))
    seen = []
    reveal = model.reveal
    monkeypatch.setattr(
        model, "reveal", lambda *args: seen.append(reveal(*args)) or seen[-1]
    )
    x0 = torch.full((B, model.num_tokens), 5)
    xt, masked, _, _ = masked_rows(model, x0)
    (x,) = seen
    assert torch.equal(x[~masked], xt[~masked])
    counts = torch.bincount(x[masked], minlength=K).double()
    assert counts[MASK] == 0  # the first step goes to time 0
    p = rows[:MASK].softmax(-1)
    error = (p * (1 - p) / counts.sum()).sqrt()
    assert bool(((counts[:MASK] / counts.sum() - p).abs() < 4 * error).all())


# ---------------------------------------------------------------- 7


@pytest.mark.parametrize("mode", ["kl-bwd", "kl-fwd"])
def test_7_divergences_are_not_negative(make_model, generator, mode):
    """0 for equal rows alone; float32 differs from float64 by less than 1e-3."""
    scale = torch.tensor([0.1, 1.0, 5.0]).repeat_interleave(100)[:, None]
    student, teacher = scale * torch.randn(2, 300, K, generator=generator)
    model = sdtt(make_model, f"algo.distill_mode={mode}")
    wide = model.divergence_of_logits(student.double(), teacher.double())
    narrow = model.divergence_of_logits(student, teacher)
    assert float((wide - narrow).abs().max()) < 1e-3
    assert float(wide.min()) > 0
    assert float(model.divergence_of_logits(teacher, teacher).abs().max()) < 1e-6
    other = teacher.clone()
    other[:, MASK] += 3  # which is no part of it
    assert torch.equal(model.divergence_of_logits(student, other), narrow)


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_a_batch_in_parts_is_the_batch(make_model, place, monkeypatch, rows):
    """The gradient is that of the mean over all masked tokens, however the batch is
    cut; each part has another number of them."""
    whole = sdtt(make_model)
    batch = random_batch(whole)
    z, _ = whole.plan(batch["input_ids"], torch.tensor([0.1, 0.4, 0.7, 0.95]))
    expected = torch.autograd.grad(
        fixed(whole, z, batch, monkeypatch, slice(None)).loss, list(whole.parameters())
    )
    model = sdtt(make_model, f"loader.batch_size={rows}")
    monkeypatch.setattr(
        type(model), "trainer", property(lambda _: FakeTrainer()), raising=False
    )
    for start in range(0, 4, rows):
        part = slice(start, start + rows)
        loss = fixed(model, z, batch, monkeypatch, part)
        (model.weighed(loss) / (4 // rows)).backward()
    model.weigh_gradients()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10)


class FakeTrainer:
    world_size = 1


def fixed(model, z, batch, monkeypatch, part: slice):
    """The loss of some rows of a batch at x_t that is given."""
    masked = z.is_noised[part]
    rows = z._replace(
        xt=z.xt[part],
        alpha_t=z.alpha_t[part],
        dalpha_t=z.dalpha_t[part],
        scored=masked.flatten().nonzero().squeeze(-1),
        is_noised=masked,
    )
    t = torch.full((len(masked),), 0.5, dtype=torch.float64)
    monkeypatch.setattr(model, "sample_t", lambda *args: t)
    monkeypatch.setattr(model, "corrupt", lambda *args: rows)
    monkeypatch.setattr(
        model, "teacher_draws", lambda shape, i: torch.full(shape, 0.99).double()
    )
    return model.distillation_loss({k: x[part] for k, x in batch.items()}, 0)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_every_schedule_reveals_what_its_posterior_does(make_model, noise):
    """The share of masks that one step reveals, within 4 standard errors."""
    B = 2000
    overrides = (f"noise={noise}", "algo.orig_num_sampling_steps=8")
    model = sdtt(make_model, *overrides, B=B)
    x0 = torch.zeros(B, model.num_tokens, dtype=torch.long)
    t = torch.full((B,), 0.6, dtype=torch.float64)
    z, (step, _) = model.plan(x0, t)
    alpha_t, alpha_s = (model.noise(x).alpha_t for x in (t[0], t[0] - model.step_size))
    one = torch.full((1,), 1 / (K - 1), dtype=torch.float64).expand(1, 1, K)
    levels = {"alpha_t": alpha_t[None, None], "alpha_s": alpha_s[None, None]}
    q = model.posterior(one, xt=torch.full((1, 1), MASK), **levels)
    p, total = 1 - float(q[0, 0, MASK]), int((z.xt == MASK).sum())
    error = (p * (1 - p) / total) ** 0.5
    assert abs(len(step.positions) / total - p) < 4 * error


def test_a_bos_that_stays_is_never_masked(make_model):
    model = sdtt(make_model, "algo.ignore_bos=True", B=64)
    batch = random_batch(model, 64)
    z, steps = model.plan(batch["input_ids"], model.sample_t(64))
    assert not z.is_noised[:, 0].any()
    for step in steps:
        assert bool((step.positions % model.num_tokens != 0).all())
    losses = model.distillation_loss(batch, 0)
    assert bool((losses.num_tokens <= model.num_tokens - 1).all())


def test_padding_has_no_loss(make_model):
    model = sdtt(make_model)
    batch = random_batch(model)
    batch["attention_mask"][:, 4:] = 0
    losses = model.distillation_loss(batch, 0)
    z, _ = model.plan(batch["input_ids"], model.sample_t(4))
    assert losses.num_tokens.tolist() == z.is_noised[:, :4].sum(-1).tolist()
    assert bool((losses.num_tokens > 0).any())


def test_times_of_a_batch_share_one_draw(make_model, place):
    """In training; those of a validation are MDLM's, so that it measures the same."""
    model = sdtt(make_model, B=16)
    t = model.sample_t(16)
    gaps = (t.sort().values.diff() / (1 - model.sampling_eps) * 16).tolist()
    assert gaps == pytest.approx([1] * 15)
    place(model, step=3)
    assert not torch.equal(model.sample_t(16), t)
    other = make_model("algo=mdlm", "training.sampling_eps=1e-5").eval()
    assert torch.equal(model.eval().sample_t(16), other.sample_t(16))
    one = sdtt(make_model, "training.antithetic_sampling=False", B=16).sample_t(16)
    gaps = (one.sort().values.diff() * 16).tolist()
    assert max(gaps) > 1.5 * min(gaps)
