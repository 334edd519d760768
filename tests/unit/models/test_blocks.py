"""The attention of block diffusion: the mask's rules, and one pass against many."""

import pytest
import torch

from models.attention import attend
from models.blocks import dense_mask, flex_mask
from models.dit import DIT

K, L, D = 11, 12, 32
PLAIN = {"causal": False, "kernel": "auto"}


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = DIT(
        vocab_size=K, hidden_size=D, cond_dim=16, n_blocks=2, n_heads=2, dropout=0.0
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


@pytest.fixture
def ids(generator):
    """Noisy and clean ones, (B, L) each."""
    return torch.randint(K, (2, 3, L), generator=generator)


def levels(N):
    return torch.linspace(0.1, 3, 3 * N).view(3, N), torch.tensor([0.0, 0.01, 0.02])


@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_the_rules_of_the_mask(size):
    """As they are written: among noisy tokens of a block, to clean blocks before, and
    among clean ones up to the own block. 5 does not divide 12."""
    mask = dense_mask(L, torch.tensor([size]))[0, 0]
    for i in range(2 * L):
        for j in range(2 * L):
            block, other = i % L // size, j % L // size
            if i < L:
                expected = block == other if j < L else other < block
            else:
                expected = j >= L and other <= block
            assert mask[i, j] == expected, (i, j)


def test_a_quarter_of_the_pairs_is_seen_with_small_blocks():
    mask = dense_mask(256, torch.tensor([4]))
    assert 0.25 < mask.float().mean() < 0.26


def test_flex_and_dense_attention_agree(generator):
    """The same rule in both; the backward pass of FlexAttention is of CUDA alone."""
    q, k, v = torch.randn(3, 4, 2 * L, 2, 16, generator=generator)
    sizes = torch.tensor([1, 3, 4, 12])
    for some in (sizes, sizes[1:2]):
        dense = attend(q, k, v, mask=dense_mask(L, some), **PLAIN)
        flex = attend(q, k, v, mask=flex_mask(L, some), **PLAIN)
        torch.testing.assert_close(flex, dense)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_one_pass_is_a_pass_for_each_block(network, ids, size):
    """Of the clean tokens before it and the block alone, which then has no other block
    of noise beside it."""
    x, x0 = ids
    number = -(-L // size)
    sigma, sigma_0 = levels(number)
    whole = network.blockwise(x, x0, sigma, size, sigma_0=sigma_0)
    assert whole.shape == (3, L, D)
    for b in range(number):
        start, end = b * size, min(L, (b + 1) * size)
        before = slow_prefix(network, x0[:, :start], sigma_0, size)
        block = slow_block(network, x[:, start:end], sigma[:, b], before, start)
        torch.testing.assert_close(whole[:, start:end], block, rtol=1e-4, atol=1e-5)


def slow_prefix(network, x0, sigma_0, size):
    """Hidden states before each layer of clean blocks, one block after the other."""
    states = [torch.zeros(len(x0), 0, D) for _ in network.blocks]
    for start in range(0, x0.shape[1], size):
        new = slow_layers(network, x0[:, start : start + size], sigma_0, states, start)
        states = [torch.cat(pair, dim=1) for pair in zip(states, new[:-1], strict=True)]
    return states, sigma_0


def slow_block(network, x, sigma, before, start):
    states, sigma_0 = before
    last = slow_layers(network, x, sigma, states, start, sigma_0)[-1]
    c = torch.nn.functional.silu(network.condition(sigma, None))
    return network.output_layer.modulated_norm(last, c)


def slow_layers(network, x, sigma, states, start, sigma_0=None):
    """A block's hidden states before each layer and behind the last: every layer sees
    the states of earlier blocks, with their conditioning, and its own."""
    c = torch.nn.functional.silu(network.condition(sigma, None))
    c_0 = (
        c
        if sigma_0 is None
        else torch.nn.functional.silu(network.condition(sigma_0, None))
    )
    h, found = network.vocab_embed(x), []
    end = start + x.shape[1]
    rotary = network.rotary_emb(end)
    for layer, block in enumerate(network.blocks):
        found.append(h)
        both = torch.cat([states[layer], h], dim=1)
        conditions = torch.cat(
            [
                c_0[:, None].expand(-1, start, -1),
                c[:, None].expand(-1, end - start, -1),
            ],
            dim=1,
        )
        h = block(both, conditions, rotary)[:, start:]
    found.append(h)
    return found


@pytest.mark.parametrize("at", range(L))
def test_what_a_noisy_block_sees(network, ids, at):
    """A clean token changes the blocks behind its own, a noisy one its own block."""
    x, x0 = ids
    size = 3
    sigma, sigma_0 = levels(4)
    whole = network.blockwise(x, x0, sigma, size, sigma_0=sigma_0)
    blocks = torch.arange(L) // size
    for tokens, expected in (
        (x0, blocks > at // size),
        (x, blocks == at // size),
    ):
        others = [y.clone() if y is tokens else y for y in (x, x0)]
        (others[0] if tokens is x else others[1])[:, at] = (tokens[:, at] + 1) % K
        changed = network.blockwise(*others, sigma, size, sigma_0=sigma_0)
        differs = (changed != whole).any(dim=-1)
        assert torch.equal(differs, expected.expand(3, L))


def test_levels_by_block_and_by_token_are_the_same(network, ids):
    x, x0 = ids
    sigma, sigma_0 = levels(4)
    of_blocks = network.blockwise(x, x0, sigma, 3, sigma_0=sigma_0)
    each = sigma.repeat_interleave(3, dim=1)
    of_tokens = network.blockwise(x, x0, each, 3, sigma_0=sigma_0)
    torch.testing.assert_close(of_tokens, of_blocks)
    sizes = torch.tensor([3, 3, 3])
    of_rows = network.blockwise(x, x0, each, sizes, sigma_0=sigma_0)
    torch.testing.assert_close(of_rows, of_blocks)


def test_one_level_for_all_needs_to_be_told_once(network, ids):
    x, x0 = ids
    sigma = torch.full((3, 1), 0.5)
    once = network.blockwise(x, x0, sigma, 3)
    each = network.blockwise(x, x0, sigma, 3, sigma_0=sigma[:, 0])
    torch.testing.assert_close(once, each)


def test_one_block_is_the_trunk(network, ids):
    x, x0 = ids
    sigma, sigma_0 = levels(1)
    plain = network.trunk(x, sigma[:, 0])
    assert torch.equal(network.blockwise(x, x0, sigma, L, sigma_0=sigma_0), plain)
    sizes = torch.full((3,), L)
    found = network.blockwise(x, x0, sigma, sizes, sigma_0=sigma_0)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_soft_inputs_may_be_noisy_tokens(network, ids):
    x, x0 = ids
    sigma, sigma_0 = levels(4)
    hard = network.blockwise(x, x0, sigma, 3, sigma_0=sigma_0)
    soft = 1e4 * torch.nn.functional.one_hot(x, K).float()
    found = network.blockwise(soft, x0, sigma, 3, sigma_0=sigma_0)
    torch.testing.assert_close(found, hard)
