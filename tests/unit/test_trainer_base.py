"""What a config may not ask for, the randomness of a run, weights and checkpoints."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from refusals import refused

from checkpoints.checkpoint import Checkpoint
from cli.settle import algorithm_class
from data.tokenizers import vocabulary_with_mask
from utils import ConfigError

# ---------------------------------------------------------------- refusals


def test_every_shipped_algorithm_accepts_its_defaults(make_model, algo_name):
    assert make_model(f"algo={algo_name}").config.algo.name == algo_name


@pytest.mark.parametrize(
    ("name", "override", "parts"),
    [
        ("sedd", "algo.T=10", ["algo.T=10", "algo=sedd", "0"]),
        ("ar", "algo.T=10", ["algo.T=10", "algo=ar"]),
        ("duo_base", "algo.T=1000", ["algo.T=1000", "algo=duo_base"]),
        ("mdlm", "algo.T=-1", ["algo.T=-1"]),
        ("d3pm", "algo.T=0", ["algo.T=0", "T > 0"]),
        ("d3pm", "noise=cosine", ["noise=cosine", "log-linear"]),
        ("mdlm", "algo.loss_type=low", ["algo.loss_type='low'", "elbo, low_var"]),
        ("sedd", "algo.loss_type=low_var", ["algo.loss_type='low_var'", "elbo"]),
        ("d3pm", "algo.loss_type=low_var", ["algo.loss_type='low_var'", "elbo"]),
        ("duo_base", "algo.loss_type=low_var", ["algo.loss_type='low_var'", "elbo"]),
        ("mdlm", "algo.compat=old", ["algo.compat='old'", "paper, reference"]),
        ("mdlm", "algo.subs_masking=True", ["algo.subs_masking=True", "d3pm"]),
        ("ar", "algo.subs_masking=True", ["algo.subs_masking=True", "d3pm"]),
        ("duo_base", "algo.subs_masking=True", ["algo.subs_masking=True", "d3pm"]),
        ("duo", "algo.block_size=4", ["algo.block_size=4", "algo=duo", "duo_base"]),
        ("sdtt", "algo.block_size=4", ["algo.block_size=4", "algo=sdtt", "mdlm"]),
        ("dimo", "algo.block_size=4", ["algo.block_size=4", "algo=dimo", "mdlm"]),
        ("ar", "training.time_range=[0,0.5]", ["training.time_range", "algo=ar"]),
        ("distillation", "training.time_range=[0,0.5]", ["training.time_range"]),
        ("mdlm", "algo.causal_attention=True", ["algo.causal_attention=True"]),
        ("ar", "algo.time_conditioning=True", ["algo.time_conditioning=True"]),
        ("ar", "algo.causal_attention=False", ["algo.causal_attention=False"]),
        ("mdlm", "algo.parameterization=mean", ["algo.parameterization='mean'"]),
        ("mdlm", "noise.type=log", ["noise.type='log'", "log-linear"]),
        (
            "mdlm",
            "sampling.predictor=ancestrl",
            ["sampling.predictor='ancestrl'", "Did you mean 'ancestral'?"],
        ),
        (
            "duo_base",
            "sampling.predictor=analytic",
            ["sampling.predictor='analytic'", "DUO_BASE", "ancestral"],
        ),
        ("ar", "sampling.predictor=analytic", ["sampling.predictor='analytic'", "AR"]),
        (
            "mdlm",
            "sampling.noise_removal=greed",
            ["sampling.noise_removal='greed'", "ancestral, greedy, none"],
        ),
        (
            "mdlm",
            "training.loss_precision=fp8",
            ["training.loss_precision='fp8'", "bf16, float32, float64"],
        ),
    ],
)
def test_what_an_algorithm_cannot_do_is_refused(
    compose, make_model, name, override, parts
):
    """In one line that names key, value and choices; at construction as well."""
    config = compose(f"algo={name}", override)
    refused(partial(algorithm_class(config).validate_config, config), *parts)
    with pytest.raises(ConfigError):
        make_model(f"algo={name}", override)


SEMI_AR = ("sampling.semi_ar=True", "sampling.stride_length=2")


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        ("ar", [], ["sampling.semi_ar=True", "algo=ar", "False"]),
        (
            "mdlm",
            ["sampling.stride_length=8"],
            ["sampling.stride_length=8", "above 0 and below", "model.length=8"],
        ),
        (
            "duo_base",
            ["sampling.noise_removal=none"],
            ["sampling.noise_removal='none'", "sampling.semi_ar=True", "greedy"],
        ),
        (
            "sedd",
            ["sampling.noise_removal=False"],
            ["sampling.noise_removal=False", "sampling.semi_ar=True", "ancestral"],
        ),
    ],
)
def test_windows_that_cannot_be_are_refused(
    compose, make_model, name, overrides, parts
):
    config = compose(f"algo={name}", *SEMI_AR, *overrides)
    refused(partial(algorithm_class(config).validate_config, config), *parts)
    with pytest.raises(ConfigError):
        make_model(f"algo={name}", *SEMI_AR, *overrides)


def test_windows_make_samples_longer(make_model, diffusion_name):
    """The keys of published semi-autoregressive samples are no longer refused."""
    model = make_model(f"algo={diffusion_name}", *SEMI_AR, "sampling.num_strides=3")
    samples = model.generate_samples(2, model.generator("test"))
    assert samples.tokens.shape == (2, 8 + 3 * 2)


@pytest.mark.parametrize("name", ["mdlm", "d3pm"])
def test_discrete_time_is_accepted_where_it_has_a_form(make_model, name):
    assert make_model(f"algo={name}", "algo.T=16").T == 16


# ---------------------------------------------------------------- vocabulary


def test_a_mask_is_added_at_the_end_if_there_is_none(stub_tokenizer):
    assert vocabulary_with_mask(stub_tokenizer(10, num_added=3)) == (11, 10)


def test_a_mask_of_the_tokenizers_own_is_kept(stub_tokenizer):
    """Id 0 counts as a mask as any other does."""
    assert vocabulary_with_mask(stub_tokenizer(10, mask_token_id=4)) == (10, 4)
    assert vocabulary_with_mask(stub_tokenizer(10, mask_token_id=0)) == (10, 0)


# ---------------------------------------------------------------- randomness


def draws(generator):
    return torch.rand(4, generator=generator).tolist()


def test_generators_depend_on_seed_purpose_and_position(make_model):
    model, other_seed = make_model("algo=mdlm"), make_model("algo=mdlm", "seed=2")
    first = draws(model.generator("samples", 3, 1))
    assert draws(model.generator("samples", 3, 1)) == first
    torch.manual_seed(123)
    assert draws(model.generator("samples", 3, 1)) == first
    others = [
        model.generator("samples", 3, 2),
        model.generator("samples", 1, 3),
        model.generator("sample", 3, 1),
        other_seed.generator("samples", 3, 1),
    ]
    assert len({tuple(draws(generator)) for generator in others} | {tuple(first)}) == 5


def test_a_training_loss_replays(make_model, algo_name, place):
    """A function of weights, batch, step and rank; not of what ran before."""
    batch = {"input_ids": torch.full((4, 8), 3), "attention_mask": torch.ones(4, 8)}
    model = make_model(f"algo={algo_name}").train()
    place(model, step=5)
    first = model.loss(batch, 7).nlls
    model.loss(batch, 8)
    torch.rand(3)
    assert torch.equal(model.loss(batch, 7).nlls, first)


def test_a_validation_loss_does_not_depend_on_the_step(make_model, algo_name, place):
    batch = {"input_ids": torch.full((4, 8), 3), "attention_mask": torch.ones(4, 8)}
    model = make_model(f"algo={algo_name}")
    place(model, step=5)
    first = model.loss(batch, 2).nlls
    place(model, step=50)
    assert torch.equal(model.loss(batch, 2).nlls, first)


# ---------------------------------------------------------------- weights


@pytest.fixture
def model(make_model):
    """A model whose EMA differs from its weights."""
    model = make_model("algo=mdlm")
    model.ema = model.make_ema()
    with torch.no_grad():
        for shadow in model.ema.shadow_params:
            shadow.add_(1.0)
    return model


def weight(model):
    return model.backbone.vocab_embed.embedding.detach().clone()


@pytest.mark.parametrize("was_training", [True, False])
def test_eval_weights_are_the_ema_for_a_while(model, was_training):
    raw = weight(model)
    model.train(was_training)
    with pytest.raises(RuntimeError, match="stop"), model.eval_weights():  # noqa: PT012
        assert not model.training
        torch.testing.assert_close(weight(model), raw + 1)
        raise RuntimeError("stop")
    assert model.training == was_training
    assert torch.equal(weight(model), raw)


def test_the_ema_can_be_disabled(model):
    model.config.eval.disable_ema = True
    raw = weight(model)
    with model.eval_weights():
        assert torch.equal(weight(model), raw)


def test_an_optimiser_update_moves_the_ema(model, monkeypatch):
    shadow = model.ema.shadow_params[0].clone()
    monkeypatch.setattr(
        "lightning.LightningModule.optimizer_step", lambda self, *args: None
    )
    model.optimizer_step(0, 0, None)
    assert model.ema.num_updates == 1
    assert not torch.equal(model.ema.shadow_params[0], shadow)


def saved(model):
    """What a checkpoint of the model holds."""
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_is_plain_data(model, tmp_path):
    """It loads without executing code, and holds the resolved config."""
    torch.save(saved(model), tmp_path / "plain.ckpt")
    read = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert read["hyper_parameters"]["config"]["model"]["hidden_size"] == 32
    assert read["ema"].keys() == {"decay", "num_updates", "shadow_params"}


def test_weights_and_ema_come_back(model, make_model):
    other = make_model("algo=mdlm", "training.ema=0.5")
    with torch.no_grad():
        other.backbone.vocab_embed.embedding.zero_()
    other.load_weights(Checkpoint.of_lightning(saved(model)), "eval.checkpoint_path")
    assert torch.equal(weight(other), weight(model))
    shadows = zip(other.ema.shadow_params, model.ema.shadow_params, strict=True)
    assert all(torch.equal(a, b) for a, b in shadows)
    assert other.ema.decay == 0.5


def test_without_ema_in_the_config_none_is_loaded(model, make_model):
    other = make_model("algo=mdlm", "training.ema=0")
    other.load_weights(Checkpoint.of_lightning(saved(model)), "eval.checkpoint_path")
    assert other.ema is None


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.hidden_size=64", "reshaped"),
        ("model.n_blocks=3", "missing"),
        ("model.n_blocks=1", "unexpected"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, make_model, override, part):
    """None are taken: the model keeps its own."""
    other = make_model("algo=mdlm", override, "eval.checkpoint_path=runs/last.ckpt")
    before = weight(other)
    with pytest.raises(ConfigError) as error:
        other.load_weights(
            Checkpoint.of_lightning(saved(model)), "eval.checkpoint_path"
        )
    text = str(error.value)
    assert "\n" not in text
    assert "eval.checkpoint_path='runs/last.ckpt'" in text
    assert part in text
    assert torch.equal(weight(other), before)


def test_a_file_without_weights_is_refused(model):
    with pytest.raises(ConfigError, match="no state_dict"):
        model.load_weights(Checkpoint(), "training.finetune_path")


def test_optimiser_and_schedule_are_the_configured_ones(make_model):
    model = make_model("algo=mdlm", "optim.lr=0.5", "optim.weight_decay=0.1")
    configured = model.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.1)
    assert group["betas"] == (0.9, 0.999)
    assert len(group["params"]) == len(list(model.parameters()))
    assert configured["lr_scheduler"]["interval"] == "step"
    assert configured["lr_scheduler"]["scheduler"].get_last_lr() == [0.0]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32", None), ("bf16", torch.bfloat16), ("bf16-mixed", torch.bfloat16)],
)
def test_autocast_follows_the_trainers_precision(make_model, precision, dtype):
    """Also outside of a Lightning trainer, where samples are drawn."""
    model = make_model("algo=mdlm", f"trainer.precision={precision}")
    with model.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)


@pytest.mark.parametrize(
    ("precision", "fused"), [("32", True), ("bf16", True), (16, False)]
)
def test_the_optimizer_is_fused_unless_gradients_are_scaled(
    make_model, precision, fused
):
    model = make_model("algo=mdlm", f"trainer.precision={precision}")
    assert model.make_optimizer().defaults["fused"] is fused


@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_gradients_are_clipped(make_model, algorithm):
    """By total norm unless by value; also for a fused optimiser."""
    model = make_model("algo=mdlm")
    model._trainer = SimpleNamespace(model=model, world_size=1, global_step=0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    model.configure_gradient_clipping(model.make_optimizer(), 0.25, algorithm)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    if algorithm == "value":
        assert bool((grads == 0.25).all())
    else:
        assert grads.norm().item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("off", [None, 0])
def test_gradients_are_left_alone_without_clipping(make_model, off):
    model = make_model("algo=mdlm")
    model._trainer = SimpleNamespace(model=model, world_size=1, global_step=0)
    model.backbone.output_embedding.bias.grad = torch.full((7,), 1e3)
    model.configure_gradient_clipping(model.make_optimizer(), off)
    assert bool((model.backbone.output_embedding.bias.grad == 1e3).all())
