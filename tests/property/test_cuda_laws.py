"""On a CUDA device: the losses of the CPU, from the same draws, and steps that never
wait for the device. Run with `pytest -m gpu`.
"""

import pytest
import torch
from chunking import chunks_of, random_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def moved(batch):
    return {name: x.cuda() for name, x in batch.items()}


@pytest.mark.parametrize("chunk", [5, "auto", None])
def test_the_losses_of_the_cpu(make_model, algo_name, chunk):
    """A seed draws the same noise on every device."""
    model = make_model(f"algo={algo_name}", "training.loss_precision=float32").train()
    batch = random_batch(model)
    with chunks_of(model, chunk):
        expected = model.loss(batch, 2)
        got = model.cuda().loss(moved(batch), 2)
    torch.testing.assert_close(got.nlls.cpu(), expected.nlls, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_step_does_not_wait(make_model, algo_name, precision, monkeypatch):
    """Loss, backward, clipping, AdamW and EMA, in torch's own judgement."""
    overrides = ("trainer.accelerator=cuda", f"trainer.precision={precision}")
    model = make_model(f"algo={algo_name}", *overrides).cuda().train()
    monkeypatch.setattr(model, "log", lambda *args, **options: None)
    batch = moved(random_batch(model))
    optimizer, ema = model.make_optimizer(), model.make_ema()

    def step():
        with model.autocast():
            loss = model.training_step(batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.parameters())

    step()  # compilation and the first allocations may wait
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
