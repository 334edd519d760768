"""Attention kernels against the explicit softmax."""

import pytest
import torch

from models import attention
from models.attention import KERNELS, attend


def explicit(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v, a head at a time; (B, L, H, D)."""
    _, L, H, D = q.shape
    out = torch.empty_like(q)
    for h in range(H):
        scores = q[:, :, h] @ k[:, :, h].transpose(1, 2) / D**0.5  # (B, L, L)
        if causal:
            future = torch.ones(L, L).triu(1).bool()
            scores = scores.masked_fill(future, -torch.inf)
        out[:, :, h] = scores.softmax(dim=-1) @ v[:, :, h]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "flash"])
def test_kernels_are_the_explicit_softmax(generator, kernel, causal):
    q, k, v = torch.randn(3, 2, 9, 3, 4, dtype=torch.float64, generator=generator)
    got = attend(q, k, v, causal=causal, kernel=kernel)
    torch.testing.assert_close(got, explicit(q, k, v, causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_says_what_is_seen(generator, kernel):
    """By torch's own kernel, whichever is chosen for calls without a mask."""
    q, k, v = torch.randn(3, 2, 9, 3, 4, dtype=torch.float64, generator=generator)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    got = attend(q, k, v, causal=False, kernel=kernel, mask=past)
    torch.testing.assert_close(got, explicit(q, k, v, True), rtol=0, atol=1e-12)
    block = attend(q[:, 6:], k, v, causal=False, kernel=kernel, mask=past[6:])
    torch.testing.assert_close(block, got[:, 6:], rtol=0, atol=1e-12)


def test_auto_falls_back_without_flash(monkeypatch):
    """On a CPU, or in float32, `auto` never asks for the optional package."""
    monkeypatch.setattr(attention, "flash_is_installed", lambda: True)
    q = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16)
    assert attend(q, q, q, causal=True, kernel="auto").shape == q.shape


def test_flash_presence_is_looked_up():
    import importlib.util

    installed = importlib.util.find_spec("flash_attn") is not None
    assert attention.flash_is_installed() == installed
