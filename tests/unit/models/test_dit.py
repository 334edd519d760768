"""The transformer backbone: shapes, precision, masks, soft inputs, refusals."""

import pytest
import torch

import models.dit
from diffusion.gaussian import TopLatents
from models.attention import KVCache
from models.dit import DIT, Rotary, rotate
from utils import ConfigError

K, L, D = 11, 6, 32


def build(causal=False, head=True, **kwargs):
    settings = {
        "vocab_size": K,
        "hidden_size": D,
        "cond_dim": 16,
        "n_blocks": 2,
        "n_heads": 2,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    model = DIT(**(settings | {"causal": causal} | kwargs))
    if head:  # off their zeros, so that outputs depend on inputs
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def x(generator):
    return torch.randint(K, (3, L), generator=generator)


def sigma_for(model, x):
    return None if model.causal else torch.linspace(0.1, 3, len(x))


@pytest.mark.parametrize("causal", [False, True])
def test_shape_and_type_of_logits(x, causal):
    model = build(causal)
    logits = model(x, sigma_for(model, x))
    assert logits.shape == (3, L, K)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
def test_forward_is_trunk_then_head(x, causal):
    """Losses and samplers may ask for hidden states and for a few logits only."""
    model = build(causal)
    hidden = model.trunk(x, sigma_for(model, x))
    assert hidden.shape == (3, L, D)
    whole = model(x, sigma_for(model, x))
    assert torch.equal(model.head(hidden), whole)
    torch.testing.assert_close(model.head(hidden[:, 2]), whole[:, 2])


@pytest.mark.parametrize("changed", range(L))
def test_causal_logits_depend_on_the_past_only(x, changed):
    model = build(causal=True)
    other = x.clone()
    other[:, changed] = (x[:, changed] + 1) % K
    differs = (model(x) - model(other)).abs().amax(dim=(0, 2)) > 1e-6
    assert not differs[:changed].any()
    assert differs[changed:].all()


@pytest.mark.parametrize("changed", range(L))
def test_bidirectional_logits_depend_on_everything(x, changed):
    model = build()
    other = x.clone()
    other[:, changed] = (x[:, changed] + 1) % K
    sigma = sigma_for(model, x)
    differs = (model(x, sigma) - model(other, sigma)).abs().amax(dim=(0, 2)) > 1e-6
    assert differs.all()


def test_order_matters_and_sequences_do_not_mix(x):
    model = build()
    sigma = sigma_for(model, x)
    logits = model(x, sigma)
    assert not torch.allclose(model(x.flip(1), sigma).flip(1), logits, atol=1e-3)
    alone = model(x[1:2], sigma[1:2])
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-5, atol=1e-5)


def test_the_noise_level_matters_unless_causal(x):
    model = build()
    low, high = model(x, torch.full((3,), 0.1)), model(x, torch.full((3,), 3.0))
    assert not torch.allclose(low, high, atol=1e-3)
    assert not hasattr(build(causal=True), "sigma_map")


@pytest.mark.parametrize("causal", [False, True])
def test_an_untrained_model_is_uniform(x, causal):
    """The head starts at zero: every token has the same logit, 0."""
    model = build(causal, head=False)
    assert not model(x, sigma_for(model, x)).any()


def test_untrained_blocks_are_the_identity(x):
    """adaLN-Zero: gates start at zero, so trunk = norm of the embedding."""
    model = build(head=False)
    embedded = model.vocab_embed(x)
    expected = torch.nn.functional.layer_norm(embedded, (D,), eps=1e-5)
    torch.testing.assert_close(model.trunk(x, torch.ones(3)), expected)


def test_soft_inputs_mix_embedding_rows(x, generator):
    """(B, L, K) reals: softmax times the table; one-hot limits give plain ids."""
    model, sigma = build(), torch.ones(3)
    soft = torch.randn(3, L, K, generator=generator)
    expected = soft.softmax(dim=-1) @ model.vocab_embed.embedding
    torch.testing.assert_close(model.vocab_embed(soft), expected)
    sure = 1e4 * torch.nn.functional.one_hot(x, K).float()
    torch.testing.assert_close(model(sure, sigma), model(x, sigma))


def test_sparse_inputs_mix_k_rows(generator):
    """ids and weights (B, L, k) equal the dense mixture they describe."""
    model, sigma = build(), torch.ones(3)
    ids = torch.rand(3, L, K, generator=generator).argsort(dim=-1)[..., :4]
    weights = torch.rand(3, L, 4, generator=generator)
    dense = torch.zeros(3, L, K).scatter(-1, ids, weights)
    expected = dense @ model.vocab_embed.embedding
    top = TopLatents(ids[..., 0], ids, weights)
    torch.testing.assert_close(model.vocab_embed(top), expected)
    one = TopLatents(ids[..., 0], ids[..., :1], torch.ones(3, L, 1))
    torch.testing.assert_close(model(one, sigma), model(ids[..., 0], sigma))


def test_gradients_reach_every_parameter(x):
    for causal in (False, True):
        model = build(causal)
        model(x, sigma_for(model, x)).square().sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None]
        zero = [n for n, p in model.named_parameters() if not p.grad.any()]
        assert (without, zero) == ([], [])


def test_dropout_is_for_training_only(x):
    model = build(dropout=0.5)
    sigma = torch.ones(3)
    assert torch.equal(model(x, sigma), model(x, sigma))
    model.train()
    assert not torch.equal(model(x, sigma), model(x, sigma))


def test_the_residual_stream_stays_in_float32_under_autocast(x):
    """Only matrix products are in half precision; their error stays small."""
    model, sigma = build(), torch.ones(3)
    seen = []
    handle = model.output_layer.norm_final.register_forward_hook(
        lambda module, args, out: seen.extend([args[0].dtype, out.dtype])
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, sigma)
    handle.remove()
    assert seen == [torch.float32, torch.float32]
    assert half.dtype == torch.bfloat16
    full = model(x, sigma)
    error = (half.float() - full).abs().max() / full.abs().max()
    assert error.item() < 0.05


def test_rotary_attention_depends_on_distances_only(generator):
    """<R_i q, R_j k> = <R_(i+5) q, R_(j+5) k>, and norms are kept."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    table = Rotary(8)(12)

    def at(vector, position):
        turned = rotate(vector.expand(1, 12, 1, 8), table)
        return turned[0, position, 0]

    near, far = at(q, 3) @ at(k, 1), at(q, 8) @ at(k, 6)
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(near, at(q, 3) @ at(k, 3))
    torch.testing.assert_close(at(q, 7).norm(), q.norm())


def test_blocks_see_relative_positions(generator):
    """Shifting every position by five changes nothing; stretching them does."""
    model = build()
    h = torch.randn(2, L, D, generator=generator)
    tables = model.rotary_emb(3 * L)

    def attended(positions):
        return model.blocks[0]._attention(h, [table[positions] for table in tables])

    here, shifted, stretched = (
        attended(p) for p in (torch.arange(L), torch.arange(L) + 5, torch.arange(L) * 2)
    )
    torch.testing.assert_close(shifted, here, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stretched, here, atol=1e-4)


def test_rotary_tables_are_not_part_of_a_checkpoint():
    assert set(Rotary(8, 12).state_dict()) == {"inv_freq"}


def test_rotary_tables_grow_with_the_sequence():
    """To the bits that a table of that length has from the start."""
    short, long = Rotary(8, 4), Rotary(8, 32)
    assert all(map(torch.equal, short(20), long(20)))


def test_rotary_tables_stay_in_float32():
    """A cast of the whole module, as sharding in bfloat16 makes it, rounds them."""
    rotary = Rotary(8, 12)
    exact = rotary(12)
    assert all(map(torch.equal, rotary.bfloat16()(12), exact))


def test_rotary_tables_of_validation_serve_training():
    """Tensors made in inference mode could not be saved for backward."""
    rotary = Rotary(8)
    with torch.inference_mode():
        rotary(12)
    q = torch.ones(1, 12, 1, 8, requires_grad=True)
    rotate(q, rotary(12)).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("causal", [False, True])
def test_activation_checkpointing_changes_nothing_but_the_cost(x, causal, monkeypatch):
    """Same output and gradients, dropout included; each block runs once more."""
    runs = []
    block_forward = models.dit.Block.forward

    def counted(self, *args):
        runs.append(self)
        return block_forward(self, *args)

    monkeypatch.setattr(models.dit.Block, "forward", counted)
    found = {}
    for checkpointing in (False, True):
        model = build(causal, checkpointing=checkpointing, dropout=0.3).train()
        torch.manual_seed(1)
        output = model(x, sigma_for(model, x))
        output.square().sum().backward()
        found[checkpointing] = [output, *(p.grad for p in model.parameters())]
        assert len(runs) == (4 if checkpointing else 2)
        runs.clear()
    assert all(map(torch.equal, *found.values()))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("hidden_size", [30, 34, 33])
def test_a_hidden_size_that_does_not_divide_is_refused(hidden_size):
    with pytest.raises(ConfigError, match=f"model.hidden_size={hidden_size} is not"):
        build(hidden_size=hidden_size)


def test_flash_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(models.dit, "flash_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="flash-attn") as error:
        build(attention="flash")
    assert "\n" not in str(error.value)
    build(attention="auto")


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match=r"model\.attention='flsh'.*'flash'"):
        build(attention="flsh")


# ---------------------------------------------------------------- a cache of blocks


def cached(model, x, sigma, sizes, rows=None, **told):
    """Hidden states of x, given so many tokens at a time, all but the last ones kept.

    Args:
        rows: Of the last pass; None: all.
    """
    cache, parts = KVCache(x.shape[1], block_size=2), x.split(sizes, dim=1)
    for part in parts[:-1]:
        model.trunk(part, torch.zeros(len(x)), cache, **told)
        cache.keep(part.shape[1])
    if rows is None:
        return model.trunk(parts[-1], sigma, cache, **told)
    return model.trunk(parts[-1][rows], sigma[rows], cache.of(rows), **told)


def block_causal(monkeypatch, size):
    """Has the network see, in one pass, what blocks of this size see."""
    attend = models.dit.attend

    def masked(q, k, v, **options):
        block = torch.arange(q.shape[1]) // size
        return attend(q, k, v, **options | {"mask": block[:, None] >= block})

    monkeypatch.setattr(models.dit, "attend", masked)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2)])
def test_blocks_with_a_cache_are_a_pass_with_a_mask(x, sizes, monkeypatch):
    """Block by block, or several at once; at the noise level of all of them."""
    model, clean = build(), torch.zeros(3)
    got = cached(model, x, clean, sizes)
    block_causal(monkeypatch, 2)
    torch.testing.assert_close(got, model.trunk(x, clean)[:, -2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 2, 1])])
def test_a_block_sees_a_cache_of_clean_tokens_at_its_own_noise_level(x, labels):
    """The first blocks at once or one by one, and all sequences or some of them, at a
    level that matters; with classes, too."""
    model = build(num_classes=2)
    told = {} if labels is None else {"labels": labels}
    sigma = sigma_for(model, x)
    got = cached(model, x, sigma, (4, 2), **told)
    one_by_one = cached(model, x, sigma, (2, 2, 2), **told)
    torch.testing.assert_close(got, one_by_one, rtol=0, atol=1e-5)
    for other in (
        cached(model, x, sigma + 1, (4, 2), **told),
        cached(model, x.roll(1, dims=1), sigma, (4, 2), **told),
    ):
        assert (got - other).abs().max() > 1e-3


def test_some_sequences_of_a_cache(x):
    """For one pass, and for good."""
    model, rows = build(), torch.tensor([0, 2])
    sigma = sigma_for(model, x)
    expected = cached(model, x, sigma, (2, 2, 2))[rows]
    got = cached(model, x, sigma, (2, 2, 2), rows)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    cache = KVCache(L, block_size=2)
    model.trunk(x[:, :4], torch.zeros(3), cache)
    cache.keep(4)
    cache.select(rows)
    got = model.trunk(x[rows, 4:], sigma[rows], cache)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_noisy_block_is_not_kept(x):
    """However often it is seen."""
    model, cache = build(), KVCache(L, block_size=2)
    model.trunk(x[:, :4], torch.zeros(3), cache)
    cache.keep(4)
    first, _, again = (
        model.trunk(block, torch.ones(3), cache)
        for block in (x[:, 4:], x[:, :2], x[:, 4:])
    )
    assert cache.length == 4
    assert torch.equal(first, again)
