"""On a CUDA device: the losses of the CPU, from the same draws, and steps that never
wait for the device. Run with `pytest -m gpu`.
"""

import pytest
import torch
from chunking import chunks_of, random_batch
from steps import Update, moved
from tiny import SAMPLING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
PLAIN = "training.loss_compile=False"  # compilation takes longer than all the rest


@pytest.mark.parametrize("chunk", [5, "auto", None])
def test_the_losses_of_the_cpu(make_model, algo_name, chunk):
    """A seed draws the same noise on every device."""
    model = make_model(f"algo={algo_name}", "training.loss_precision=float32", PLAIN)
    model.train()
    batch = random_batch(model)
    with chunks_of(model, chunk):
        expected = model.loss(batch, 2)
        got = model.cuda().loss(moved(batch, CUDA), 2)
    torch.testing.assert_close(got.nlls.cpu(), expected.nlls, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_step_does_not_wait(make_model, algo_name, precision):
    """In torch's own judgement."""
    check_waiting(make_model, f"algo={algo_name}", precision, PLAIN)


def test_a_compiled_step_does_not_wait(make_model):
    check_waiting(make_model, "algo=mdlm", "bf16", "training.loss_compile=True")


def check_waiting(make_model, algorithm, precision, *overrides):
    overrides += ("trainer.accelerator=cuda", f"trainer.precision={precision}")
    model = make_model(algorithm, *overrides).cuda()
    update = Update(model, moved(random_batch(model), CUDA))
    update()  # compilation and the first allocations may wait
    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("predictor", "name"), SAMPLING)
def test_samplers_sample(make_model, predictor, name):
    """Under bf16, exact draws and published ones."""
    for use_float64 in (True, False):
        model = make_model(
            f"algo={name}",
            f"sampling.predictor={predictor}",
            f"sampling.use_float64={use_float64}",
            "trainer.accelerator=cuda",
            "trainer.precision=bf16",
        ).cuda()
        samples = model.generate_samples(3, torch.Generator(CUDA).manual_seed(1))
        assert samples.tokens.device.type == "cuda"
        assert samples.tokens.min() >= 0
        assert samples.tokens.max() < model.vocab_size
