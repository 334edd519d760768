"""Block diffusion: its two limits, what a block sees, how blocks are drawn.

What holds for each algorithm that has blocks is tested for each; the network's own laws
are in `tests/unit/models/test_blocks.py`.
"""

import functools
import itertools
import math
import shutil

import pytest
import torch
from chunking import random_batch
from refusals import refused
from tiny import ALGORITHMS

from diffusion.blocks import Blocks
from evaluation.chain_rule import check_chain_rule
from models.head import chunked_loss
from training import losses
from training.scorable import Stratum
from utils import ConfigError

WITH_BLOCKS = sorted(name for name, cls in ALGORITHMS.items() if cls.has_blocks)
QUIET = "eval.generate_samples=False"


@pytest.fixture(params=WITH_BLOCKS)
def block_name(request) -> str:
    return request.param


@pytest.fixture
def make(make_model):
    def build(name, size, *overrides):
        return make_model(f"algo={name}", f"algo.block_size={size}", QUIET, *overrides)

    return build


def test_the_algorithms_with_blocks():
    assert WITH_BLOCKS == ["d3pm", "duo_base", "mdlm", "sedd"]


def test_other_networks_are_refused(make):
    with pytest.raises(ConfigError, match=r"algo.block_size=4: .*takes_blocks"):
        make("mdlm", 4, "algo.backbone=dimamba", "model=tiny-dimamba")


def test_the_chain_rule_is_refused(compose):
    config = compose(
        *("algo=mdlm", "algo.block_size=4", QUIET),
        *("mode=ppl_eval", "eval.likelihood=chain_rule"),
    )
    refused(lambda: check_chain_rule(config, ALGORITHMS["mdlm"]), "algo.block_size=4")


# ---------------------------------------------------------------- one block


def update_of(model):
    """Loss and gradients of a training batch."""
    model.train()
    torch.manual_seed(0)  # of dropout
    loss = model.loss(random_batch(model)).loss
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("size", ["8", "[8]"])
def test_one_block_is_the_plain_algorithm(make, block_name, size):
    """To the bit: nothing is seen twice, and the same is drawn."""
    loss, gradients = update_of(make(block_name, size))
    expected, others = update_of(make(block_name, "null"))
    assert loss == expected
    assert all(map(torch.equal, gradients, others))


def test_one_block_in_the_one_pass_form_is_the_plain_algorithm(make, block_name):
    """Rows of one block beside others: nothing of the clean half is seen."""
    model = make(block_name, "[8,2]", "model.dropout=0")
    x0 = random_batch(model)["input_ids"]
    z = model.corrupt(x0, torch.full((4,), 0.7, dtype=torch.float64))
    sizes = torch.tensor([8, 8, 2, 8])
    found = model.nll_at(x0, z._replace(block_size=sizes)).nll
    plain = model.nll_at(x0, z).nll
    alike = sizes == 8
    torch.testing.assert_close(found[alike], plain[alike], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[2], plain[2])


# ---------------------------------------------------------------- blocks of one token


def autoregressive(model, x0):
    """-log p(x_i | x_<i) of a masked model, (B, L): one evaluation of the network for
    each prefix, the tokens before in blocks of their own and the next one a mask."""
    columns = []
    for i in range(x0.shape[1]):
        xt = x0[:, : i + 1].clone()
        xt[:, i] = model.mask_index
        sigma = torch.full((len(x0), i + 1), 7.0)  # not told
        size = None if i == 0 else 1
        hidden = model.hidden_of(xt, x0[:, : i + 1], sigma, size)
        logits = model.logits_for_loss(hidden[:, i])
        log_p = model.process_logits(logits, xt=xt[:, i], sigma=sigma[:, i])
        columns.append(-log_p.gather(-1, x0[:, i, None]).squeeze(-1))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def test_all_noise_in_blocks_of_one_is_the_autoregressive_likelihood(make):
    """At t = 1, where the weight is 1; and it sums to one over all rows."""
    model = make("mdlm", 1, "model.length=4")
    clean = [v for v in range(model.vocab_size) if v != model.mask_index]
    x0 = torch.tensor(list(itertools.product(clean, repeat=4)))
    t = torch.ones(x0.shape, dtype=torch.float64)
    z = model.corrupt(x0, t)._replace(block_size=1)
    nll = model.nll_at(x0, z).nll
    some = torch.arange(0, len(x0), 97)
    is_mask = z.xt == model.mask_index
    assert is_mask[some].float().mean() > 0.99  # alpha_1 = eps
    expected = autoregressive(model, x0[some])
    at = is_mask[some]
    torch.testing.assert_close(
        nll[some][at].float(), expected[at], rtol=1e-4, atol=1e-5
    )
    z = z._replace(xt=torch.full_like(x0, model.mask_index), scored=None)
    nll = model.nll_at(x0, z).nll
    assert float((-nll.sum(dim=-1)).exp().sum()) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_the_bound_in_blocks_of_one_is_that_likelihood_in_expectation(make):
    """At a mask the loss, times the probability of a mask over the rate at which masks
    come, is the autoregressive one, at every time; and the mean over times is it, too,
    but for what the schedule leaves out at its end."""
    model = make("mdlm", 1)
    x0 = random_batch(model)["input_ids"][:2]
    expected = autoregressive(model, x0).double()
    count = 4000
    strata = [Stratum(7 * j + 3, j, count) for j in range(count)]
    rows = x0[:1].expand(count, -1)
    known = torch.zeros(rows.shape, dtype=torch.bool)
    z = model.corrupt(x0, torch.full(x0.shape, 0.4, dtype=torch.float64))
    nll = model.nll_at(x0, z._replace(block_size=1)).nll
    at = z.xt == model.mask_index
    exact = nll.double() * (1 - z.alpha_t) / -z.dalpha_t
    torch.testing.assert_close(exact[at], expected[at], rtol=1e-5, atol=1e-5)
    draws = model.nll_given(rows, known, strata).double().sum(dim=-1)
    error = draws.std() / math.sqrt(count)
    kept = 1 - model.config.noise.eps
    assert abs(draws.mean() - kept * expected[0].sum()) < 4 * error


@torch.no_grad()
def test_the_first_choice_in_blocks_of_one_is_the_autoregressive_one(make):
    model = make("mdlm", 1)
    x0 = random_batch(model)["input_ids"]
    for i in range(1, x0.shape[1]):  # what the model writes itself
        trial = x0.clone()
        best = []
        for v in range(model.vocab_size):
            trial[:, i] = v
            best.append(autoregressive(model, trial[:, : i + 1])[:, i])
        x0[:, i] = torch.stack(best).argmin(dim=0)
    known = torch.arange(x0.shape[1]).expand(x0.shape) < 1
    strata = [Stratum(seed) for seed in range(len(x0))]
    assert not model.regret_given(x0, known, strata).any()
    x0[:, 5] = (x0[:, 5] + 1) % (model.vocab_size - 1)
    assert (model.regret_given(x0, known, strata)[:, 5] > 0).all()


# ---------------------------------------------------------------- what a block sees


@pytest.mark.parametrize(
    ("name", "T"), [*((name, None) for name in WITH_BLOCKS), ("mdlm", 10), ("d3pm", 10)]
)
@torch.no_grad()
def test_later_tokens_do_not_change_the_loss_of_a_block(make, name, T):
    """With the same noise; earlier ones do."""
    model = make(name, 2, *([] if T is None else [f"algo.T={T}"]))
    x0 = random_batch(model)["input_ids"]
    nll = model.nll(x0).nll
    other = x0.clone()
    other[:, 4] = (x0[:, 4] + 1) % (model.vocab_size - 1)
    changed = model.nll(other).nll
    assert torch.equal(changed[:, :4], nll[:, :4])
    assert not torch.equal(changed[:, 6:], nll[:, 6:])


@torch.no_grad()
def test_known_tokens_of_a_text_are_clean_and_given(make, block_name):
    """Whole blocks of them, and those at the beginning of the block at the boundary;
    what is before changes the numbers, whatever the noise, and what is behind not."""
    model = make(block_name, 4)
    x0 = random_batch(model)["input_ids"]
    known = torch.arange(8).expand(x0.shape) < 5
    strata = [Stratum(seed, 1, 3) for seed in range(len(x0))]
    nll = model.nll_given(x0, known, strata)
    assert not nll[:, :5].any()
    for at, is_seen in ((1, True), (4, True)):
        other = x0.clone()
        other[:, at] = (x0[:, at] + 1) % (model.vocab_size - 1)
        changed = model.nll_given(other, known, strata)
        assert torch.equal(changed, nll) != is_seen
    alone = [model.nll_given(x0[i, None], known[i, None], [strata[i]]) for i in (0, 3)]
    torch.testing.assert_close(
        torch.cat(alone).float(), nll[[0, 3]].float(), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_texts_may_end_within_a_block(make, block_name):
    model = make(block_name, 4)
    x0 = random_batch(model)["input_ids"][:, :7]
    known = torch.arange(7).expand(x0.shape) < 1
    strata = [Stratum(seed) for seed in range(len(x0))]
    assert model.nll_given(x0, known, strata).shape == (4, 7)
    short = x0[:, :3]  # one block that is shorter than others
    plain = make(block_name, "null")
    expected = plain.nll_given(short, known[:, :3], strata)
    assert torch.equal(model.nll_given(short, known[:, :3], strata), expected)


# ---------------------------------------------------------------- times


def test_times_are_stratified_over_rows_and_blocks():
    """Each of n N equal parts of [0, 1) has one, and every block has any of them."""
    n, N, size = 6, 4, 3
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(n, N, N)
    for _ in range(400):
        keys = torch.rand(n, N, dtype=torch.float64, generator=generator)
        u = (
            torch.rand(n, dtype=torch.float64, generator=generator) + torch.arange(n)
        ) / n
        spread = Blocks(N * size, size, keys).stratified(u)
        assert spread.shape == (n, N * size)
        of_blocks = spread.view(n, N, size)
        assert (of_blocks == of_blocks[..., :1]).all()
        times = of_blocks[..., 0]
        assert sorted((times * n * N).floor().flatten().tolist()) == list(range(n * N))
        part = (times * N).floor().long()
        seen += torch.nn.functional.one_hot(part, N)
    share = seen / 400
    assert (share - 1 / N).abs().max() < 5 * math.sqrt(3 / 16 / 400)


def test_without_antithetic_sampling_blocks_have_times_of_their_own(make):
    model = make("mdlm", 2, "training.antithetic_sampling=False")
    blocks = model.sample_blocks(torch.zeros(4, 8, dtype=torch.long), 0)
    u = model.spread(torch.zeros(4, dtype=torch.float64), blocks)
    assert torch.equal(u[:, ::2], blocks.keys)


def test_rows_have_sizes_of_their_own(make, block_name):
    """Drawn in training alone; a batch of them has the losses of separate ones."""
    model = make(block_name, "[4,2,8,1]")
    x0 = random_batch(model)["input_ids"].repeat(4, 1)
    assert model.block_size == 4
    assert model.sample_blocks(x0, 0).size == 4
    model.train()
    blocks = model.sample_blocks(x0, 0)
    assert set(blocks.size.tolist()) == {1, 2, 4, 8}
    u = torch.linspace(0, 1, len(x0) + 1, dtype=torch.float64)[1:]
    t = model.times(model.spread(u, blocks))
    z = model.corrupt(x0, t)._replace(block_size=blocks.size)
    found = model.nll_at(x0, z).nll
    for size in (1, 2, 4):
        one = model.nll_at(
            x0, z._replace(block_size=torch.full_like(blocks.size, size))
        )
        rows = blocks.size == size
        torch.testing.assert_close(found[rows], one.nll[rows])
        assert (t[rows].unfold(1, size, size).diff(dim=-1) == 0).all()


@pytest.mark.parametrize("size", ["null", "2"])
def test_a_range_of_times_holds_in_training_alone(make, block_name, size):
    model = make(
        block_name,
        size,
        "training.time_range=[0.3,0.8]",
        "algo.T=1000" if block_name == "d3pm" else "algo.T=0",
    )
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert float(model.times(u).max()) > 0.99
    model.train()
    t = model.times(u)
    step = 1 / model.T if model.T else 0
    assert 0.3 <= t.min() < 0.302 + step
    assert 0.798 < t.max() <= 0.8 + step
    assert float(t.mean()) == pytest.approx(0.55, abs=1e-3 + step)


# ---------------------------------------------------------------- other settings


def check_updates(one, two):
    """Losses and gradients are the same to rounding."""
    (loss, gradients), (expected, others) = one, two
    torch.testing.assert_close(loss, expected)
    for x, y in zip(gradients, others, strict=True):
        limit = 1e-6 * max(float(y.abs().max()), 1)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=limit)


@pytest.mark.parametrize(
    "setting",
    [
        "training.activation_checkpointing=True",
        "training.loss_chunk=null",
        "training.loss_chunk=3",
        "model.attention=sdpa",
    ],
)
def test_settings_of_memory_change_nothing(make, block_name, setting):
    """With rows of several sizes and dropout."""
    own = block_name, "[4,2]", "model.dropout=0.3"
    check_updates(update_of(make(*own, setting)), update_of(make(*own)))


@pytest.mark.parametrize("chunk", ["null", "3"])
def test_the_head_sees_noisy_tokens_alone(make, block_name, chunk, monkeypatch):
    """Of 2 L positions those of noise; of masked models those that are masked, and for
    the reconstruction of d3pm all L."""
    model, seen = make(block_name, 2, f"training.loss_chunk={chunk}"), []

    def watched(heads, *args, **options):
        seen.extend(heads)
        return chunked_loss(heads, *args, **options)

    monkeypatch.setattr(losses, "chunked_loss", watched)
    x0 = random_batch(model)["input_ids"]
    z = model.corrupt(x0, torch.full((4,), 0.5, dtype=torch.float64))
    model.nll_at(x0, z._replace(block_size=2))
    scored = x0.numel() if z.scored is None else len(z.scored)
    rest = [x0.numel()] if block_name == "d3pm" else []
    assert [len(head.hidden) for head in seen] == [scored, *rest]
    assert (scored < x0.numel()) == (z.scored is not None)


HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++"))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("size", ["2", "[4,2]"])
def test_compiled_blocks_change_nothing(make, size, backend, monkeypatch):
    """Traced and run without code generation by default, which would take seconds."""
    own = "duo_base", size, "algo.time_conditioning=True"
    expected = update_of(make(*own))
    compiled = functools.partial(torch.compile, backend=backend)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compiled)
    model = make(
        *own, "training.compile=True", "training.activation_checkpointing=True"
    )
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        check_updates(update_of(model), expected)
        model.eval()
        model.nll(random_batch(model)["input_ids"])
    assert all(block._compiled_call_impl for block in model.backbone.blocks)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.importance_sampling=True",),
        ("training.change_of_variables=True", "algo.time_conditioning=True"),
        ("algo.ignore_bos=True",),
        ("algo.time_conditioning=True", "noise=cosine"),
        ("algo.time_conditioning=True", "noise=geometric"),
        ("data.num_classes=2", "algo.time_conditioning=True"),
    ],
    ids="-".join,
)
def test_other_settings_have_finite_losses(make, overrides):
    model = make("mdlm", 2, *overrides)
    batch = random_batch(model)
    if model.num_classes:
        batch |= {"labels": torch.tensor([0, 1, 1, 0])}
    model.train()
    loss = model.loss(batch).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in gradients if x is not None)
