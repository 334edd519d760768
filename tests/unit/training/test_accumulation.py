"""An update of padded rows does not depend on how its batch is cut into micro-batches
and ranks."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

LENGTHS = (8, 1, 3, 2, 8, 1, 1, 5)
GROUPS = ("data.wrap=False", "loader.global_batch_size=8", "trainer.devices=1")


def batch_of(lengths, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 6, (len(lengths), 8), generator=torch.manual_seed(seed))
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def gradients(batch, num_ranks: int, num_batches: int, *overrides: str, monkeypatch):
    """Of an update, averaged over ranks as DDP does, flat; and its losses."""
    size = len(batch["input_ids"]) // (num_ranks * num_batches)
    given = ("algo=ar", *GROUPS, f"loader.batch_size={size}", *overrides)
    settings = {x.split("=")[0]: x for x in given}.values()
    models = [tiny_model(*settings) for _ in range(num_ranks)]
    parts = [
        {name: x[i : i + size] for name, x in batch.items()}
        for i in range(0, size * num_ranks * num_batches, size)
    ]
    losses = []
    for rank, model in enumerate(models):
        model._trainer = SimpleNamespace(
            world_size=num_ranks,
            accumulate_grad_batches=num_batches,
            global_rank=rank,
            global_step=0,
        )
        for part in parts[rank::num_ranks]:
            loss = model.loss(part)
            (model.weighed(loss) / num_batches).backward()
            losses.append(loss.loss.detach())
    noted = [model._tokens for model in models if model._tokens is not None]
    total = sum(x.double() for x in noted)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.copy_(total))
    for model in models:
        model.weigh_gradients()
    flat = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in models]
    return torch.stack(flat).mean(dim=0), losses


CUTS = [(1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)]


@pytest.mark.parametrize(("num_ranks", "num_batches"), CUTS)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1], (8, 0, 0, 0, 3, 3, 0, 8)])
def test_an_update_is_that_of_the_whole_batch(
    monkeypatch, num_ranks, num_batches, lengths
):
    """Also where a micro-batch has no token at all."""
    batch = batch_of(lengths)
    whole, _ = gradients(batch, 1, 1, monkeypatch=monkeypatch)
    cut, _ = gradients(batch, num_ranks, num_batches, monkeypatch=monkeypatch)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("num_ranks", "num_batches"), CUTS)
@pytest.mark.parametrize("algo", ["ar", "mdlm"])
def test_nothing_changes_for_full_rows(monkeypatch, num_ranks, num_batches, algo):
    """To the last bit; published code gives each micro-batch the same weight."""
    batch = batch_of([8] * 8)
    found = [
        gradients(
            batch,
            num_ranks,
            num_batches,
            f"algo={algo}",
            f"data.wrap={wrap}",
            monkeypatch=monkeypatch,
        )
        for wrap in (True, False)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(torch.stack(found[0][1]), torch.stack(found[1][1]))


def test_the_published_mean_of_means(monkeypatch):
    batch = batch_of(LENGTHS)
    packed, reference = (
        gradients(batch, 1, 4, override, monkeypatch=monkeypatch)[0]
        for override in ("data.wrap=True", "algo.compat=reference")
    )
    assert torch.equal(packed, reference)
    weighed, _ = gradients(batch, 1, 4, monkeypatch=monkeypatch)
    assert not torch.allclose(packed, weighed, rtol=1e-2)
