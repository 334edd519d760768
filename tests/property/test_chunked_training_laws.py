"""Training with the loss in chunks is training the plain way: the same losses, step
after step, and the same weights at the end.
"""

import pytest
import torch
from chunking import chunks_of, random_batch

STEPS = 200  # seconds for each algorithm
NAMES = ["ar", "mdlm", "duo_base"]
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("sedd", "d3pm")]
SIZES = (
    "model.hidden_size=16",
    "model.cond_dim=8",
    "model.n_blocks=1",
    "optim.lr=3e-3",
)


def trained(model, chunk, place):
    """Losses of the steps and final weights; the sequences repeat, so that there is
    something to learn."""
    model.train()
    optimizer = model.make_optimizer()
    curve = []
    with chunks_of(model, chunk):
        for step in range(STEPS):
            place(model, step=step)  # noise differs from step to step
            batch = random_batch(model, B=4, seed=step % 5)
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(loss.detach())
    return torch.stack(curve), [p.detach() for p in model.parameters()]


def learns(curve):
    return float(curve[-20:].mean()) < 0.9 * float(curve[:20].mean())


@pytest.mark.parametrize("name", [*NAMES, *LATER])
def test_200_steps_in_float64(make_model, name, place):
    """Losses and weights to 1e-9, all along."""
    found = []
    for chunk in (None, 7):
        overrides = (*SIZES, "training.loss_precision=float64")
        model = make_model(f"algo={name}", *overrides).double()
        found.append(trained(model, chunk, place))
    (plain, weights), (curve, others) = found
    assert learns(plain)
    torch.testing.assert_close(curve, plain, rtol=1e-9, atol=0)
    torch.testing.assert_close(others, weights, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_200_steps_in_float32(make_model, name, place):
    """To rounding for the first ten steps; differences then grow, as they would for
    any other order of the same sums."""
    found = []
    for chunk in (None, 7):
        model = make_model(f"algo={name}", *SIZES)
        found.append(trained(model, chunk, place)[0].double())
    plain, curve = found
    assert learns(plain)
    torch.testing.assert_close(curve[:10], plain[:10], rtol=1e-6, atol=0)
    torch.testing.assert_close(curve, plain, rtol=1e-3, atol=0)
