"""What is drawn for a row depends on its index alone: for every algorithm an update and
a validation are the same however their rows are dealt out to ranks and batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chunking import NOTHING_FROZEN, random_batch
from torch import Tensor

from data.rows import REPEATED
from trainer_base import TrainerBase

N, STEP = 8, 3
# By `algo.compat`: ranks, micro-batches.
CUTS = {"paper": [(2, 4), (4, 1)], "reference": [(2, 2)]}


def part(rows: dict[str, Tensor], where: range) -> dict[str, Tensor]:
    return {name: x[list(where)] for name, x in rows.items()}


def placed(model: TrainerBase, rank: int, ranks: int, micros: int) -> None:
    model._trainer = SimpleNamespace(
        world_size=ranks,
        accumulate_grad_batches=micros,
        global_rank=rank,
        global_step=STEP,
    )


def update_of(make_model, monkeypatch, algo_name, ranks, micros, *overrides):
    """Gradient of an update, averaged over ranks as DDP does, flat; losses by row."""
    size = N // (ranks * micros)
    model = make_model(
        f"algo={algo_name}",
        *NOTHING_FROZEN.get(algo_name, ()),
        f"loader.global_batch_size={N}",
        f"loader.batch_size={size}",
        f"trainer.devices={ranks}",
        "training.loss_precision=float64",
        *overrides,
    )
    model = model.double().train()
    assert model.config.trainer.accumulate_grad_batches == micros
    rows = random_batch(model, N)
    losses, grads, noted, seen = torch.zeros(N), [], [], []
    for rank in range(ranks):
        placed(model, rank, ranks, micros)
        model.zero_grad()
        for micro in range(micros):
            batch_idx = STEP * micros + micro
            where = model.row_indices(size, batch_idx)
            seen += where
            loss = model.loss(part(rows, where), batch_idx)
            (model.weighed(loss) / micros).backward()
            losses[list(where)] = loss.nlls.detach().float()
        noted.append(model._tokens)
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model._num_batches, model._tokens = 0, None
    if noted[0] is not None:  # what all ranks do together
        total = sum(x.double() for x in noted)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.copy_(total))
        trained = [p for p in model.parameters() if p.requires_grad]
        for own in grads:
            for p, grad in zip(trained, own, strict=True):
                p.grad = grad
            model._num_batches, model._tokens = micros, total
            model.weigh_gradients()
    assert sorted(seen) == list(range(N))
    flat = [torch.cat([x.flatten() for x in own]) for own in grads]
    return torch.stack(flat).mean(dim=0), losses


@pytest.mark.parametrize("compat", CUTS)
def test_an_update_does_not_depend_on_its_cut(
    make_model, algo_name, monkeypatch, compat
):
    """Loss of each row and gradient of the whole, to rounding.

    Published micro-batches weigh the same however many masked tokens they have, which
    the gradient of `algo=sdtt` then depends on.
    """
    overrides = (f"algo.compat={compat}",)
    given = (make_model, monkeypatch, algo_name)
    gradient, losses = update_of(*given, 1, 1, *overrides)
    assert float(gradient.abs().max()) > 0
    for cut in CUTS[compat]:
        other, own = update_of(*given, *cut, *overrides)
        torch.testing.assert_close(own, losses, rtol=1e-5, atol=1e-7)
        if compat == "paper" or algo_name != "sdtt":
            limit = 1e-7 * float(gradient.abs().max())
            torch.testing.assert_close(other, gradient, rtol=1e-5, atol=limit)


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo=mdlm", "algo.block_size=[2,4]"),
        ("algo=sedd", "algo.block_size=4"),
        ("algo=d3pm", "algo.block_size=[1,8]", "training.time_range=[0.3,0.8]"),
        ("algo=duo_base", "algo.block_size=[2,4]", "algo.time_conditioning=True"),
        ("algo=mdlm", "training.antithetic_sampling=False"),
        ("algo=d3pm", "algo.T=10"),
        ("algo=duo", "algo.curriculum.mode=simple"),
        ("algo=duo", "algo.curriculum.start=0", "algo.curriculum.end=0"),
        ("algo=dimo", "algo.init_tokens=unigram"),
        ("algo=dimo", "algo.noise_emb_perturb=fix_0.5"),
    ],
    ids="-".join,
)
def test_so_it_is_with_other_settings(make_model, monkeypatch, overrides):
    name, *more = overrides
    given = (make_model, monkeypatch, name.removeprefix("algo="))
    gradient, losses = update_of(*given, 1, 1, *more)
    other, own = update_of(*given, 2, 2, *more)
    torch.testing.assert_close(own, losses, rtol=1e-5, atol=1e-7)
    limit = 1e-7 * float(gradient.abs().max())
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=limit)


def validation_of(make_model, algo_name, ranks, size, *overrides) -> Tensor:
    """Sums of a validation of ten rows over all ranks, those not counted included."""
    model = make_model(
        f"algo={algo_name}",
        f"trainer.devices={ranks}",
        f"loader.global_batch_size={N}",
        f"loader.eval_global_batch_size={ranks * size}",
        "training.loss_precision=float64",
        *overrides,
    ).double()
    rows = random_batch(model, 10)
    model.log = lambda *args, **options: None
    for batch_idx in range(-(-10 // (ranks * size))):
        for rank in range(ranks):
            placed(model, rank, ranks, 1)
            where = [i for i in model.row_indices(size, batch_idx) if i < 10]
            batch = part(rows, where or [0]) | ({} if where else {REPEATED: True})
            model.on_validation_batch_start(batch, batch_idx)
            with torch.no_grad():
                model.validation_step(batch, batch_idx)
            model.on_validation_batch_end(None, batch, batch_idx)
    found = [model.valid_likelihood.sums()]
    for name in ("valid_distillation", "valid_auxiliary"):
        if hasattr(model, name):
            found.append(getattr(model, name).sums())
    return torch.cat(found)


def check_validations(*given: Any) -> None:
    expected = validation_of(*given[:2], 1, 10, *given[2:])
    assert int(expected[5]) == 10
    for ranks, size in ((1, 3), (2, 2), (4, 1)):
        found = validation_of(*given[:2], ranks, size, *given[2:])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_a_validation_does_not_depend_on_its_cut(make_model, algo_name):
    """Every row counts once, also where a rank has none left."""
    check_validations(make_model, algo_name)


@pytest.mark.parametrize("name", ["d3pm", "duo_base", "mdlm", "sedd"])
def test_so_it_is_with_blocks(make_model, name):
    check_validations(make_model, name, "algo.block_size=[2,4]")
