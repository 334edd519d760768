"""What the settings of the loss mean: sizes of chunks, compilation, precision; and how
far the gradients are from the truth in each precision, half precision above all.
"""

import pytest
import torch
import torch.nn.functional as F

from models import head
from models.head import (
    CHUNK_BYTES,
    Head,
    Precision,
    chunk_size,
    chunked_loss,
    is_compiled,
)

K, D = 50, 16


def cross_entropy(logits, *, target):
    return F.cross_entropy(logits, target, reduction="none")


def random_head(generator, n, dtype=torch.float32):
    shapes = ((n, D), (K, D), (K,))
    return Head(*(torch.randn(s, generator=generator).to(dtype) for s in shapes))


def gradients(head, weights, target, precision, chunk, loss=cross_entropy, scale=1.0):
    """Of hidden states, weight and bias, in float64, without GradScaler's `scale`.

    Autocast, if there is any, ends before backward, as in training.
    """
    leaves = Head(*(x.clone().requires_grad_() for x in head.tensors))
    options = {"precision": precision, "chunk": chunk}
    total, _ = chunked_loss([leaves], loss, {"target": target}, weights, **options)
    with torch.autocast("cpu", enabled=False):
        (scale * total).backward()
    return [x.grad.double() / scale for x in leaves.tensors]


def errors(found, truth):
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]


# ---------------------------------------------------------------- chunks, compilation


@pytest.mark.parametrize("device", sorted(CHUNK_BYTES))
def test_auto_fills_the_devices_budget_with_logits(device):
    """As many float32 rows of K as fit; one where not even one does."""
    budget = CHUNK_BYTES[device]
    for K in (2, 27, 50258, 10**6):
        n = chunk_size("auto", K, device)
        assert 4 * K * n <= budget < 4 * K * (n + 1)
    assert chunk_size("auto", budget, device) == 1


def test_auto_on_an_unknown_device_is_a_number():
    assert chunk_size("auto", 1000, "hpu") >= 1


@pytest.mark.parametrize("setting", [1, 17, 10**9, None])
def test_numbers_and_null_are_taken_as_they_are(setting):
    assert chunk_size(setting, 50258, "cpu") == setting


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("setting", [True, False])
def test_a_loss_is_compiled_if_so_asked(device, setting):
    assert is_compiled(setting, device) is setting


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("compiler", ["CC", "gcc", "clang", None])
def test_auto_compiles_where_it_can(monkeypatch, request, triton, compiler):
    """On CUDA, with Triton and any C compiler; never elsewhere."""
    head._has_compiler.cache_clear()
    request.addfinalizer(head._has_compiler.cache_clear)
    monkeypatch.delenv("CC", raising=False)
    if compiler == "CC":
        monkeypatch.setenv("CC", "/opt/cc")
    spec = object() if triton else None
    monkeypatch.setattr(head.importlib.util, "find_spec", lambda name: spec)
    found = {compiler: f"/usr/bin/{compiler}"}
    monkeypatch.setattr(head.shutil, "which", found.get)
    assert is_compiled("auto", "cuda") is (triton and compiler is not None)
    assert is_compiled("auto", "cpu") is is_compiled("auto", "mps") is False


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("setting", "autocast", "product", "logits"),
    [
        ("bf16", None, torch.float32, torch.float32),
        ("float32", None, torch.float32, torch.float32),
        ("float64", None, torch.float32, torch.float64),
        ("bf16", torch.bfloat16, torch.bfloat16, torch.float32),
        ("bf16", torch.float16, torch.float16, torch.float32),
        ("float32", torch.bfloat16, torch.float32, torch.float32),
        ("float64", torch.bfloat16, torch.float32, torch.float64),
    ],
)
def test_what_a_setting_means(setting, autocast, product, logits):
    weight = torch.zeros(2, 2)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        got = Precision.of(setting, weight, torch.float64)
    assert got == (product, logits)
    wide = Precision.of(setting, weight.double(), torch.float64)
    assert wide == (torch.float64, torch.float64)


@pytest.mark.parametrize("chunk", [1, 100, 512])
@pytest.mark.parametrize("setting", ["bf16", "float32", "float64"])
def test_under_autocast_as_exact_as_the_plain_way(generator, setting, chunk):
    """At most 1.5 times the plain way's distance from float64; half precision's
    rounding where the product is half precision, and nowhere else."""
    n = 512
    head = random_head(generator, n)
    target = torch.randint(K, (n,), generator=generator)
    weights = torch.full((n,), 1 / n)
    wide = Precision(torch.float64, torch.float64)
    truth = gradients(head.to(torch.float64), weights, target, wide, None)
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        precision = Precision.of(setting, head.weight, torch.float64)
        for size in (None, chunk):
            ours = gradients(head, weights, target, precision, size)
            found[size] = errors(ours, truth)
    limit = 1e-2 if setting == "bf16" else 1e-6
    for ours, plain in zip(found[chunk], found[None], strict=True):
        assert ours < limit
        assert ours <= 1.5 * plain + 5e-7  # float32 sums of up to 512 chunks


@pytest.mark.parametrize("chunk", [64, 4096])
def test_float16_does_not_lose_small_weights(generator, chunk):
    """Gradients of logits are about 1 / N, below float16's range, without scaling;
    the weight's is not even rounded to float16."""
    n = 4096
    head = random_head(generator, n)
    target = torch.randint(K, (n,), generator=generator)
    weights = torch.full((n,), 1 / n)
    half, single = (
        gradients(head, weights, target, Precision(x, torch.float32), chunk)
        for x in (torch.float16, torch.float32)
    )
    assert all(bool(x.any()) for x in half)
    assert max(errors(half, single)) < 1e-2


@pytest.mark.parametrize("steepness", [1, 1000])
def test_float16_does_not_overflow_where_few_tokens_count(generator, steepness):
    """A batch of padding but for 4 tokens, whose weights are 1 / 4 and not 1 / N; a
    loss may be as steep as 1 / t = 1000 there."""
    n = 4096
    head = random_head(generator, n)
    target = torch.randint(K, (n,), generator=generator)
    weights = torch.where(torch.arange(n) < 4, 1 / 4, 0.0)

    def loss(logits, *, target):
        return steepness * cross_entropy(logits, target=target)

    half, single = (
        gradients(head, weights, target, Precision(x, torch.float32), 512, loss)
        for x in (torch.float16, torch.float32)
    )
    assert all(bool(x.isfinite().all()) for x in half)
    assert max(errors(half, single)) < 1e-2


def test_float16_hidden_states_with_a_grad_scaler(generator):
    """Their gradient is float16, of size 1 / N; the scaler's factor keeps it."""
    n = 4096
    head = random_head(generator, n, torch.float16)
    target = torch.randint(K, (n,), generator=generator)
    weights = torch.full((n,), 1 / n)
    half, single = (
        gradients(
            head, weights, target, Precision(x, torch.float32), 512, scale=2.0**12
        )
        for x in (torch.float16, torch.float32)
    )
    assert max(errors(half, single)) < 1e-2
