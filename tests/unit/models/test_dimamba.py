"""The Mamba backbone: both directions, what it is told, precision, refusals, runs."""

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F

import models.dimamba
from diffusion.gaussian import TopLatents
from models.dimamba import Bidirectional, DiMamba, Mamba
from models.registry import validate_backbone
from sampling.registry import samplers_of
from utils import ConfigError

K, L, D = 11, 6, 32
SIZES = {
    "vocab_size": K,
    "hidden_size": D,
    "cond_dim": 16,
    "n_blocks": 2,
    "dropout": 0.0,
}


def build(is_random=True, **kwargs):
    torch.manual_seed(0)
    model = DiMamba(**(SIZES | kwargs))
    if is_random:  # off their zeros, so that outputs depend on inputs
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def x(generator):
    return torch.randint(K, (3, L), generator=generator)


@pytest.fixture
def sigma():
    return torch.linspace(0.1, 3, 3)


def test_shapes_and_the_head_apart(x, sigma):
    """Losses and samplers may ask for hidden states and for a few logits only."""
    model = build()
    hidden, logits = model.trunk(x, sigma), model(x, sigma)
    assert hidden.shape == (3, L, D)
    assert logits.shape == (3, L, K)
    assert hidden.dtype == logits.dtype == torch.float32
    assert torch.equal(model.head(hidden), logits)
    head = model.head_of(hidden[:, 2])
    assert head.bias is None
    torch.testing.assert_close(head.product(), logits[:, 2])


@pytest.mark.parametrize("hidden_size", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("length", [1, 2, 3, 70])
def test_any_size_and_length(hidden_size, length, generator):
    """No size has to divide another; shorter than the convolution, longer than a
    block of the scan."""
    model = build(hidden_size=hidden_size)
    x = torch.randint(K, (2, length), generator=generator)
    logits = model(x, torch.ones(2))
    assert logits.shape == (2, length, K)
    assert logits.isfinite().all()
    rank = model._trunk.layers[0].mixer.mamba_fwd.dt_proj.in_features
    assert rank == math.ceil(hidden_size / 16)


@pytest.mark.parametrize("changed", range(L))
def test_every_token_sees_every_token(x, sigma, changed):
    """And no other sequence."""
    model = build()
    other = x.clone()
    other[0, changed] = (x[0, changed] + 1) % K
    change = (model(x, sigma) - model(other, sigma)).abs().amax(dim=2)
    assert (change[0] > 1e-7).all()
    assert not change[1:].any()
    alone = model(x[1:2], sigma[1:2])
    torch.testing.assert_close(alone, model(x, sigma)[1:2], rtol=1e-4, atol=1e-5)


def test_the_noise_level_matters(x):
    model = build()
    low, high = model(x, torch.full((3,), 0.1)), model(x, torch.full((3,), 3.0))
    assert not torch.allclose(low, high, atol=1e-3)
    with pytest.raises(ValueError, match="noise level"):
        model(x)


def test_classes_matter_and_none_is_one_of_them(x, sigma):
    model = build(num_classes=3)
    outputs = [model(x, sigma, torch.full((3,), c)) for c in range(4)]
    for one in range(4):
        for other in range(one):
            assert not torch.equal(outputs[one], outputs[other])
    assert torch.equal(model(x, sigma), outputs[3])


def test_untrained_blocks_are_the_identity(x, sigma):
    """adaLN-Zero: gates start at zero, so trunk = norm of the embedding."""
    model = build(is_random=False)
    rows = model.input_embedding[x]
    expected = rows / (rows.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.trunk(x, sigma), expected)


def test_zero_modulation_is_the_identity_of_a_block(x, sigma):
    """Whatever the mixer has learned."""
    block = build()._trunk.layers[0]
    h, c = torch.randn(3, L, D), torch.randn(3, 16)
    assert not torch.equal(block(h, c), h)
    torch.nn.init.zeros_(block.adaLN_modulation.weight)
    torch.nn.init.zeros_(block.adaLN_modulation.bias)
    assert torch.equal(block(h, c), h)


def test_the_initial_weights():
    """Rates 1 .. N, skips of 1, step sizes of 0.001 to 0.1, smaller outputs."""
    model = build(is_random=False, hidden_size=256, n_blocks=4)
    for layer in model._trunk.layers:
        for mamba in (layer.mixer.mamba_fwd, layer.mixer.mamba_rev):
            rates = mamba.A_log.detach().exp()
            torch.testing.assert_close(rates, torch.arange(1.0, 17).expand(512, 16))
            assert (mamba.D == 1).all()
            step = F.softplus(mamba.dt_proj.bias.detach())
            assert 0.99e-3 < float(step.min()) < 2e-3
            assert 0.05 < float(step.max()) < 0.101
            assert float(mamba.dt_proj.weight.detach().abs().max()) <= 0.25
        weight = layer.mixer.mamba_fwd.out_proj.weight.detach()
        bound = 512**-0.5 / 4**0.5
        assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert 0.015 < float(model.input_embedding.detach().std()) < 0.025


# ---------------------------------------------------------------- directions


def mixer() -> Bidirectional:
    torch.manual_seed(0)
    return Bidirectional(D, "auto", 2).double()


def test_both_directions_have_the_same_projections():
    """Under two names in a checkpoint, once among the parameters, also in a copy."""
    for module in (mixer(), copy.deepcopy(mixer())):
        names = module.state_dict().keys()
        for name in ("in_proj.weight", "out_proj.weight"):
            assert {f"mamba_fwd.{name}", f"mamba_rev.{name}"} <= names
            own = module.get_parameter(f"mamba_fwd.{name}")
            assert module.get_parameter(f"mamba_rev.{name}") is own
        assert len(list(module.parameters())) == len(names) - 2
        conv = module.mamba_fwd.conv1d.weight
        assert module.mamba_rev.conv1d.weight is not conv


def test_it_is_the_sum_of_the_directions():
    """As the definition says it, each with its own projections and gate."""
    module, u = mixer(), torch.randn(2, L, D, dtype=torch.float64)

    def direction(mamba: Mamba, u):
        x, z = mamba.in_proj(u).chunk(2, dim=-1)
        return mamba.out_proj(mamba.states(x) * F.silu(z))

    reverse = direction(module.mamba_rev, u.flip(1)).flip(1)
    torch.testing.assert_close(module(u), direction(module.mamba_fwd, u) + reverse)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_flip_of_the_input_flips_the_output(length):
    """Where both directions have the same weights; not otherwise."""
    module, u = mixer(), torch.randn(2, length, D, dtype=torch.float64)
    assert length == 1 or not torch.allclose(module(u.flip(1)).flip(1), module(u))
    module.mamba_rev.load_state_dict(module.mamba_fwd.state_dict())
    torch.testing.assert_close(module(u.flip(1)), module(u).flip(1))


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_gradients_reach_shared_projections_from_both_directions(name):
    """The gradient is the sum of what each direction gives, and neither is zero."""
    module, u = mixer(), torch.randn(1, L, D, dtype=torch.float64)
    weight = getattr(module.mamba_fwd, name).weight
    (whole,) = torch.autograd.grad(module(u).square().sum(), weight)
    with torch.no_grad():
        output = 2 * module(u)
    parts = []
    for mute in ("mamba_fwd", "mamba_rev"):
        other = copy.deepcopy(module)
        muted = getattr(other, mute)
        muted.states = lambda x: torch.zeros_like(x)
        (grad,) = torch.autograd.grad(
            (other(u) * output).sum(), getattr(other.mamba_fwd, name).weight
        )
        assert grad.abs().max() > 1e-6
        parts.append(grad)
    torch.testing.assert_close(sum(parts), whole)


def test_gradients_reach_every_parameter(x, sigma):
    model = build(num_classes=3)
    model(x, sigma, torch.tensor([0, 1, 2])).square().sum().backward()
    zero = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert zero == []


# ---------------------------------------------------------------- inputs


def test_soft_inputs_mix_embedding_rows(x, sigma, generator):
    model = build()
    sure = 1e4 * F.one_hot(x, K).float()
    torch.testing.assert_close(model(sure, sigma), model(x, sigma))
    ids = torch.rand(3, L, K, generator=generator).argsort(dim=-1)[..., :1]
    one = TopLatents(ids[..., 0], ids, torch.ones(3, L, 1))
    torch.testing.assert_close(model(one, sigma), model(ids[..., 0], sigma))


# ---------------------------------------------------------------- precision and cost


def test_the_residual_stream_stays_in_float32_under_autocast(x, sigma):
    model = build()
    seen = []
    model._trunk.norm_f.register_forward_hook(
        lambda module, args, out: seen.extend([args[0].dtype, out.dtype])
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, sigma)
    assert seen == [torch.float32, torch.float32]
    assert half.dtype == torch.bfloat16
    full = model(x, sigma)
    error = (half.float() - full).abs().max() / full.abs().max()
    assert 0 < error.item() < 0.05


def test_dropout_is_for_training_only(x, sigma):
    model = build(dropout=0.5)
    assert torch.equal(model(x, sigma), model(x, sigma))
    model.train()
    assert not torch.equal(model(x, sigma), model(x, sigma))


def test_activation_checkpointing_changes_nothing_but_the_cost(x, sigma, monkeypatch):
    """Same output and gradients, dropout included; each block runs once more."""
    runs = []
    block_forward = models.dimamba.Block.forward

    def counted(self, *args):
        runs.append(self)
        return block_forward(self, *args)

    monkeypatch.setattr(models.dimamba.Block, "forward", counted)
    found = {}
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing, dropout=0.3).train()
        torch.manual_seed(1)
        output = model(x, sigma)
        output.square().sum().backward()
        found[checkpointing] = [output, *(p.grad for p in model.parameters())]
        assert len(runs) == (4 if checkpointing else 2)
        runs.clear()
    assert all(map(torch.equal, *found.values()))


@pytest.mark.slow
def test_compiled_blocks_give_the_same(x, sigma):
    """The scans are left as they are; names of parameters stay."""
    plain, compiled = build(), build()
    compiled.compile_blocks()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for model in (plain, compiled):
        model(x, sigma).square().sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- with the algorithms

TINY = ("algo.backbone=dimamba", "model=tiny-dimamba")


def test_every_diffusion_algorithm_has_a_loss(make_model, diffusion_name, generator):
    """Finite, with a gradient of every parameter that a loss of it has."""
    model = make_model(f"algo={diffusion_name}", *TINY).train()
    ids = torch.randint(5, (4, 8), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones(4, 8)}
    loss = model.loss(batch)
    loss.loss.backward()
    assert loss.loss.isfinite()
    grads = [p.grad for p in model.backbone.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["distillation", "sdtt", "dimo"])
def test_every_distillation_has_a_loss(make_model, name, generator):
    """Student and teacher are both of it."""
    model = make_model(f"algo={name}", *TINY).train()
    ids = torch.randint(5, (4, 8), generator=generator)
    model.loss({"input_ids": ids, "attention_mask": torch.ones(4, 8)}).loss.backward()
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_every_sampler_samples(make_model, sampling_pair):
    predictor, name = sampling_pair
    if name == "ar":
        pytest.skip("not causal")
    model = make_model(f"algo={name}", f"sampling.predictor={predictor}", *TINY)
    assert any(isinstance(model.sampler, kind) for kind in samplers_of(predictor))
    tokens = model.generate_samples(2, model.generator("test")).tokens
    assert tokens.shape == (2, 8)
    assert (tokens < model.vocab_size).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algo=ar"], ["dimamba sees both directions", "algo=ar"]),
        (["algo=mdlm", "model.scan=cuda"], ["model.scan='cuda'", "torch"]),
        (["algo=mdlm", "model.scan=null"], ["model.scan=None", "torch"]),
        (
            ["algo=mdlm", "model.scan=mamba_ssm"],
            ["model.scan='mamba_ssm'", "not installed", "auto or torch"],
        ),
        (["algo=mdlm", "algo.backbone=dit"], ["model.type", "ddit"]),
        (["algo=mdlm", "model=tiny"], ["model.type", "dimamba"]),
    ],
)
def test_what_it_cannot_be_is_refused(compose, overrides, words):
    """In one line."""
    with pytest.raises(ConfigError) as error:
        validate_backbone(compose(*TINY, *overrides))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_kernels_for_cuda_are_refused_on_a_cpu(compose, monkeypatch):
    config = compose("algo=mdlm", *TINY, "model.scan=mamba_ssm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"CUDA only.*trainer\.accelerator='cpu'"):
        validate_backbone(config)
    config.trainer.accelerator = "auto"
    validate_backbone(config)
