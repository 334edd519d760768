"""Laws of the loss in chunks: value and every gradient are those of the plain way,
all logits at once and autograd through them (`training.loss_chunk=null`).

Both ways draw the same noise, which depends on seed and position alone.
"""

import pytest
import torch
from chunking import (
    chosen,
    chunks_of,
    errors,
    loss_and_gradients,
    model_or_skip,
    random_batch,
)
from chunking import padded as with_padding

WIDE = "training.loss_precision=float64"
SETTINGS = [
    (),
    ("algo.T=10",),
    ("algo.ignore_bos=True",),
    ("loader.global_batch_size=8", "loader.batch_size=4"),
]
SIZES = [1, 3, 8, 32, 100, "auto"]  # of 4 x 8 tokens


def assert_same(got, plain, rtol=1e-10):
    """Of two (loss, gradients), to float64's rounding."""
    torch.testing.assert_close(got[0], plain[0], rtol=rtol, atol=1e-12)
    assert max(errors(got[1], plain[1]).values()) < 100 * rtol
    assert all(bool(x.isfinite().all()) for x in got[1].values())


@pytest.fixture(params=SETTINGS, ids=lambda overrides: ",".join(overrides) or "default")
def wide_model(request, make_model, stub_tokenizer, algo_name):
    """In float64, so that nothing but the arithmetic's order is left."""
    options = {"tokenizer": stub_tokenizer(49, 1)}
    return model_or_skip(
        make_model, algo_name, WIDE, *request.param, **options
    ).double()


# ---------------------------------------------------------------- the plain way


@pytest.mark.parametrize(
    ("padding", "batch_idx"),
    [
        (False, 0),
        (True, 3),
        pytest.param(False, 3, marks=pytest.mark.slow),
        pytest.param(True, 0, marks=pytest.mark.slow),
    ],
)
def test_chunks_do_not_matter(wide_model, padding, batch_idx):
    """Loss, sums of sequences and all gradients, for every size of the chunks, at
    every position in a global batch."""
    batch = random_batch(wide_model)
    batch = with_padding(batch) if padding else batch
    plain = loss_and_gradients(wide_model, batch, None, batch_idx)
    assert plain[0].loss.dtype == torch.float64
    assert float(plain[0].loss.detach()) > 0
    assert all(x.any() for x in plain[1].values())
    for chunk in SIZES:
        got = loss_and_gradients(wide_model, batch, chunk, batch_idx)
        assert_same(got, plain)


def test_draws_follow_the_place_in_the_update(wide_model):
    """Micro-batches of one update differ; the same one of it is drawn alike."""
    batch = random_batch(wide_model)
    if wide_model.is_autoregressive:
        pytest.skip("draws nothing")
    losses = [float(wide_model.loss(batch, i).loss.detach()) for i in (0, 3)]
    is_alike = wide_model.config.trainer.accumulate_grad_batches == 1
    assert (losses[0] == pytest.approx(losses[1], rel=1e-3)) == is_alike


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
def test_no_valid_token(wide_model, chunk):
    """A batch of padding: loss 0, and gradients of 0 for all parameters."""
    if wide_model.is_one_step:
        pytest.skip("no text enters the loss, so there is no padding")
    batch = random_batch(wide_model)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    loss, gradients = loss_and_gradients(wide_model, batch, chunk)
    assert loss.loss.item() == 0
    assert not loss.nlls.any()
    assert not loss.num_tokens.any()
    for gradient in gradients.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
def test_no_noised_token(make_model, absorbing_name, monkeypatch, chunk):
    """Nothing to score: loss 0, but for D3PM's reconstruction; gradients all there."""
    model = make_model(f"algo={absorbing_name}", WIDE).double().train()
    t = torch.full((4,), 1e-9, dtype=torch.float64)
    monkeypatch.setattr(model, "sample_t", lambda *args: t)
    batch = random_batch(model)
    assert model.corrupt(batch["input_ids"], t).scored.numel() == 0
    plain = loss_and_gradients(model, batch, None)
    got = loss_and_gradients(model, batch, chunk)
    assert_same(got, plain)
    if hasattr(model, "reconstruction_nll"):
        expected = model.reconstruction_nll(batch["input_ids"]).nll.mean()
        assert float(expected) > 0.1
    else:
        expected = torch.zeros((), dtype=torch.float64)
        assert not any(x.any() for x in got[1].values())
    torch.testing.assert_close(got[0].loss.detach(), expected)


# ---------------------------------------------------------------- rounding


@pytest.fixture
def model(make_model, stub_tokenizer, algo_name):
    """K = 50, in float32."""
    tokenizer = stub_tokenizer(49, 1)
    return make_model(*chosen(algo_name), tokenizer=tokenizer).train()


def truth_of(model, batch):
    """Loss and gradients of the same weights in float64, the plain way."""
    before = model.config.training.loss_precision
    model.config.training.loss_precision = "float64"
    found = loss_and_gradients(model.double(), batch, None)
    model.float().config.training.loss_precision = before
    return found


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
@pytest.mark.parametrize("padding", [False, True])
def test_float32_rounds_in_another_order_only(model, padding, chunk):
    """1e-5 of a tensor's largest gradient apart, and from float64."""
    batch = random_batch(model)
    batch = with_padding(batch) if padding else batch
    plain = loss_and_gradients(model, batch, None)
    got = loss_and_gradients(model, batch, chunk)
    truth = truth_of(model, batch)
    for other in (plain, truth):
        difference = got[0].loss.double() - other[0].loss.double()
        assert abs(float(difference.detach())) < 1e-6 * float(other[0].loss.detach())
        assert max(errors(got[1], other[1]).values()) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "float32", "float64"])
@pytest.mark.parametrize("chunk", [1, 3, "auto"])
def test_under_autocast_no_further_from_the_truth(model, precision, chunk):
    """bf16 networks: within bf16's rounding of float64, and at most 1.5 times as far
    from it as the plain way."""
    if model.is_one_step:
        pytest.skip("draws tokens from its logits, and rounding makes others of some")
    batch = random_batch(model)
    truth = truth_of(model, batch)
    model.config.training.loss_precision = precision
    plain, got = (
        loss_and_gradients(model, batch, size, autocast=torch.bfloat16)
        for size in (None, chunk)
    )
    exact = float(truth[0].loss.detach())
    assert float(got[0].loss.detach()) == pytest.approx(exact, rel=2e-2)
    theirs = errors(plain[1], truth[1])
    for name, error in errors(got[1], truth[1]).items():
        assert error < 0.1, name
        assert error <= 1.5 * theirs[name] + 1e-3, name


# ---------------------------------------------------------------- use of gradients


@pytest.mark.parametrize("chunk", [3, "auto"])
def test_gradients_accumulate(make_model, algo_name, chunk):
    """Two micro-batches of half the loss each, as the plain way adds them up."""
    overrides = ("loader.global_batch_size=8", "loader.batch_size=4", WIDE)
    model = make_model(*chosen(algo_name), *overrides).double().train()
    batches = [random_batch(model, seed=seed) for seed in (0, 1)]
    found = {}
    for size in (None, chunk):
        model.zero_grad(set_to_none=True)
        for index, batch in enumerate(batches):
            with chunks_of(model, size):
                (model.loss(batch, index).loss / 2).backward()
        found[size] = {name: p.grad for name, p in model.named_parameters()}
    single = [loss_and_gradients(model, b, None, i)[1] for i, b in enumerate(batches)]
    mean = {name: (x + single[1][name]) / 2 for name, x in single[0].items()}
    for gradients in found.values():
        assert max(errors(gradients, mean).values()) < 1e-10


@pytest.mark.parametrize("factor", [2.0**16, 0.5])
def test_a_factor_scales_gradients_exactly(model, factor):
    """As GradScaler's and accumulation's factors do, powers of 2."""
    batch = random_batch(model)
    _, once = loss_and_gradients(model, batch, 3)
    model.zero_grad(set_to_none=True)
    with chunks_of(model, 3):
        (factor * model.loss(batch).loss).backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, factor * once[name]), name


def test_backward_runs_once(model):
    with chunks_of(model, 3):
        loss = model.loss(random_batch(model)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        loss.backward()


@pytest.mark.parametrize("chunk", [1, 3, "auto", None])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_losses(model, mode, chunk):
    """Bit by bit, and nothing asks for a gradient."""
    batch = with_padding(random_batch(model))
    with chunks_of(model, chunk):
        expected = model.loss(batch)
        with mode():
            got = model.loss(batch)
    assert expected.loss.requires_grad
    assert not expected.nlls.requires_grad
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs.detach())
        assert not ours.requires_grad


def test_without_gradients_chunks_do_not_matter(wide_model):
    batch = with_padding(random_batch(wide_model))
    with torch.no_grad():
        with chunks_of(wide_model, None):
            plain = wide_model.loss(batch)
        for chunk in SIZES:
            with chunks_of(wide_model, chunk):
                got = wide_model.loss(batch)
            torch.testing.assert_close(got, plain, rtol=1e-12, atol=0)


def test_frozen_parameters_get_no_gradient(model):
    """A frozen head, as for finetuning, or a head alone over a frozen trunk."""
    batch = random_batch(model)
    _, plain = loss_and_gradients(model, batch, None)
    head = {id(p) for p in model.backbone.output_embedding.parameters()}
    for train_head in (True, False):
        model.zero_grad(set_to_none=True)
        for p in model.parameters():
            p.requires_grad_((id(p) in head) is train_head)
        with chunks_of(model, 3):
            model.loss(batch).loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert errors({name: p.grad}, {name: plain[name]})[name] < 1e-5
            else:
                assert p.grad is None
