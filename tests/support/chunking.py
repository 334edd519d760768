"""What the laws of the chunked loss share: models, batches, and a pass through them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from models.head import Loss
from trainer_base import TrainerBase
from utils import ConfigError

Gradients = dict[str, Tensor]


# So that all parameters are trained.
NOTHING_FROZEN = {"dimo": ("algo.freeze_embeddings=False",)}


def chosen(algo_name: str) -> tuple[str, ...]:
    """Overrides that choose the algorithm, with nothing of it frozen."""
    return (f"algo={algo_name}", *NOTHING_FROZEN.get(algo_name, ()))


def model_or_skip(make_model, algo_name: str, *overrides: str, **options):
    """The algorithm in training mode; skips what it does not have, such as T."""
    try:
        return make_model(*chosen(algo_name), *overrides, **options).train()
    except ConfigError as error:
        pytest.skip(str(error))


def random_batch(model: TrainerBase, B: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Clean ids of the model's length, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(model.vocab_size)
    ids = ids[ids != (-1 if model.mask_index is None else model.mask_index)]
    size = (B, model.num_tokens)
    ids = ids[torch.randint(len(ids), size, generator=generator)]
    return {"input_ids": ids, "attention_mask": torch.ones(size)}


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with its end cut off row by row: 3, 6, ... tokens less, at last all."""
    B, L = batch["input_ids"].shape
    length = (L - 3 * torch.arange(B)).clamp(min=0)
    length[-1] = 0
    mask = torch.arange(L) < length[:, None]
    return {"input_ids": batch["input_ids"], "attention_mask": mask.float()}


@contextmanager
def chunks_of(model: TrainerBase, chunk: int | str | None) -> Iterator[None]:
    """With `training.loss_chunk` set to `chunk`."""
    training = model.config.training
    before, training.loss_chunk = training.loss_chunk, chunk
    try:
        yield
    finally:
        training.loss_chunk = before


def loss_and_gradients(
    model: TrainerBase,
    batch: dict[str, Tensor],
    chunk: int | str | None,
    batch_idx: int = 0,
    autocast: torch.dtype | None = None,
) -> tuple[Loss, Gradients]:
    """One pass forward (under autocast, if given) and backward, as training does it."""
    model.zero_grad(set_to_none=True)
    with chunks_of(model, chunk):
        context = torch.autocast("cpu", autocast) if autocast else nullcontext()
        with context:
            loss = model.loss(batch, batch_idx)
        loss.loss.backward()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    unused = [name for name, p in trained.items() if p.grad is None]
    assert unused == []
    return loss, {name: p.grad.clone() for name, p in trained.items()}


def errors(found: Gradients, truth: Gradients) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest entry."""
    assert found.keys() == truth.keys()
    return {
        name: float((found[name].double() - x.double()).abs().max())
        / max(float(x.abs().max()), 1e-300)
        for name, x in truth.items()
    }
