"""However the rows of an update are dealt out, to devices and to micro-batches, its
gradient is the same to rounding, for every algorithm of the registry.

`make devices-table` shows it of whole runs with processes.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from chunking import random_batch

ROWS = 4


def gradient(make_model, name: str, devices: int, micro: int) -> list[torch.Tensor]:
    """Of the mean loss of an update, as so many devices make it together.

    Args:
        make_model: The fixture.
        name: Of the algorithm.
        devices: W; only their numbers are told, nothing is exchanged.
        micro: Rows of a micro-batch of a device.
    """
    sizes = (f"trainer.devices={devices}", f"loader.batch_size={micro}")
    precision = "training.loss_precision=float32"
    model = make_model(
        f"algo={name}", f"loader.global_batch_size={ROWS}", *sizes, precision
    )
    model.train()
    rows = random_batch(model, ROWS)
    num_tokens = 0.0
    for index, rank in product(range(ROWS // (devices * micro)), range(devices)):
        model.trainer = SimpleNamespace(
            model=model, world_size=1, global_rank=rank, global_step=3
        )
        start = (index * devices + rank) * micro
        part = {key: x[start : start + micro] for key, x in rows.items()}
        losses = model.loss(part, index)
        weight = losses.num_tokens.sum()  # as `training.accumulation` has it
        (losses.loss * weight).backward()
        num_tokens += float(weight)
    for x in model.parameters():
        if x.grad is not None:
            x.grad /= num_tokens
    return [x.grad for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize(("devices", "micro"), [(2, 2), (1, 2), (2, 1), (1, 1)])
def test_the_gradient_is_that_of_one_device(make_model, algo_name, devices, micro):
    whole = gradient(make_model, algo_name, 1, ROWS)
    dealt = gradient(make_model, algo_name, devices, micro)
    assert any(x.any() for x in whole)
    for one, other in zip(whole, dealt, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
