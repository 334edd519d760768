"""Training, evaluation and samples of every algorithm under bfloat16 autocast, as a GPU
has it by default: finite, close to float32, and in float32 or wider where it matters.

Matrix products are in bfloat16, of 8 bits: 2^-8 = 0.4 % of a value.
"""

import pytest
import torch
from chunking import random_batch
from steps import Update
from tiny import SAMPLING
from torch.utils._python_dispatch import TorchDispatchMode

WIDE = (torch.float32, torch.float64)
SETTINGS = [
    ("algo=mdlm", "algo.backbone=dimamba", "model=tiny-dimamba"),
    ("algo=duo", "algo.curriculum.mode=poly9"),
    ("algo=duo", "algo.curriculum.gumbel_tau_log10_start=-3"),
    ("algo=mdlm", "training.importance_sampling=True"),
    ("algo=duo_base", "training.activation_checkpointing=True"),
    ("algo=sdtt", "algo.distill_mode=mse"),
    ("algo=dimo", "algo.aux_soft_weight=0.5"),
    ("algo=mdlm", "algo.block_size=2"),
    ("algo=sedd", "algo.block_size=[4,2]"),
    ("algo=d3pm", "algo.block_size=4"),
    ("algo=duo_base", "algo.block_size=[4,2]", "algo.time_conditioning=True"),
]


class Products(TorchDispatchMode):
    """Types of the results of matrix products."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in ("mm", "addmm", "bmm"):
            self.types.append(result.dtype)
        return result


def updated(make_model, precision, *overrides):
    """After two updates: them, the loss of the second, types of its products."""
    model = make_model(f"trainer.precision={precision}", *overrides)
    update = Update(model, random_batch(model))
    update()
    with Products() as products:
        loss = update()
    return update, loss, set(products.types)


def check_training(make_model, *overrides):
    update, loss, products = updated(make_model, "bf16", *overrides)
    _, expected, plain = updated(make_model, "32", *overrides)
    assert torch.bfloat16 in products
    assert torch.bfloat16 not in plain
    assert loss.dtype in WIDE
    torch.testing.assert_close(loss.double(), expected.double(), rtol=0.03, atol=0)
    for x in update.kept():
        assert x.dtype == torch.float32
        assert bool(x.isfinite().all())


def test_training_is_finite_and_close(make_model, algo_name):
    check_training(make_model, f"algo={algo_name}")


@pytest.mark.parametrize("overrides", SETTINGS, ids="-".join)
def test_other_settings_are_finite_and_close(make_model, overrides):
    check_training(make_model, *overrides)


def test_what_is_computed_in_float32_at_least(make_model, algo_name, monkeypatch):
    """Logits and signal levels of the loss of a token, whatever its name."""
    model = make_model(f"algo={algo_name}", "trainer.precision=bf16")
    seen = []
    for name in ("divergence", "token_surrogate", "token_auxiliary", "nll_of_logits"):
        token_loss = getattr(model, name, None)
        if token_loss is None:
            continue

        def watched(*logits, token_loss=token_loss, **inputs):
            seen.extend([*logits, *inputs.values()])
            nll = token_loss(*logits, **inputs)
            seen.append(nll)
            return nll

        monkeypatch.setattr(model, name, watched)
    Update(model, random_batch(model))()
    floats = [x.dtype for x in seen if x.is_floating_point()]
    assert floats
    assert set(floats) <= set(WIDE)


def test_evaluations_are_close(make_model, algo_name):
    """Sums over rows and tokens in float64."""
    found = {}
    for precision in ("bf16", "32"):
        model = make_model(f"algo={algo_name}", f"trainer.precision={precision}")
        with torch.inference_mode(), model.autocast():
            model.validation_step(random_batch(model), 0)
        sums = model.valid_likelihood.sums()
        assert sums.dtype == torch.float64
        found[precision] = model.valid_likelihood.compute()["nll"]
    torch.testing.assert_close(found["bf16"], found["32"], rtol=0.03, atol=0)


@pytest.mark.parametrize(("predictor", "name"), SAMPLING)
def test_samples_are_drawn_from_float64(make_model, predictor, name):
    """And are tokens of the vocabulary; most are those of float32."""
    tokens = []
    for precision in ("bf16", "32"):
        model = make_model(
            f"algo={name}",
            f"sampling.predictor={predictor}",
            f"trainer.precision={precision}",
        )
        draw, types = model.sampler.draw, set()

        def watched(probs, generator, draw=draw, types=types):
            types.add(probs.dtype)
            return draw(probs, generator)

        model.sampler.draw = watched
        samples = model.generate_samples(16, torch.Generator().manual_seed(1))
        assert types == {torch.float64}
        assert samples.tokens.dtype == torch.long
        assert int(samples.tokens.min()) >= 0
        assert int(samples.tokens.max()) < model.vocab_size
        tokens.append(samples.tokens)
    assert float((tokens[0] == tokens[1]).float().mean()) > 0.5
