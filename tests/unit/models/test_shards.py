"""Tensors that are split over processes, and those that are whole."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from models.ema import ExponentialMovingAverage
from models.finite import not_finite
from models.shards import collected, is_split, local, split_as, whole


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of one process, which holds all parts."""
    file = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(x, mesh):
    return distribute_tensor(x, mesh, [Shard(0)])


def test_a_whole_tensor_is_itself():
    x = torch.arange(6.0)
    assert not is_split(x)
    assert local(x) is x
    assert whole(x) is x
    assert split_as(x, torch.zeros(6)) is x
    assert collected({"a": [x, (3, x)]}, True) == {"a": [x, (3, x)]}


def test_a_split_one_is_put_together(mesh):
    x = torch.arange(6.0)
    parts = split_as(x, split(torch.zeros(6), mesh))
    assert is_split(parts)
    assert split_as(parts, parts) is parts
    assert torch.equal(whole(parts), x)
    local(parts).add_(1)  # in the same memory
    assert torch.equal(whole(parts), x + 1)
    content = {"state": {0: {"step": 3, "exp_avg": parts}}}
    assert torch.equal(collected(content, True)["state"][0]["exp_avg"], x + 1)
    assert collected(content, False)["state"][0]["exp_avg"] is parts  # of other ranks


def test_numbers_that_are_not_finite_are_found_in_a_part(mesh):
    bad = split(torch.tensor([1.0, torch.nan]), mesh)
    assert not_finite({"fine": split(torch.ones(2), mesh), "bad": bad}) == ["bad"]


def test_an_average_of_parts_is_that_of_the_whole(mesh):
    start, end = torch.randn(4, 3), torch.randn(4, 3)
    averages = []
    for place in (torch.clone, lambda x: split(x, mesh)):
        parameter = nn.Parameter(place(start))
        ema = ExponentialMovingAverage([parameter], 0.5)
        with torch.no_grad():
            parameter.copy_(place(end))
        ema.update([parameter])
        with ema.applied([parameter]):
            averages.append(whole(parameter).detach().clone())
        assert torch.equal(whole(parameter), end)
    assert torch.equal(*averages)


def test_an_average_is_split_where_the_weights_are(mesh):
    """One that was read before, and one that is read afterwards."""
    parameter = nn.Parameter(torch.randn(4, 3))
    ema = ExponentialMovingAverage([parameter], 0.5)
    state = ema.state_dict()
    parts = nn.Parameter(split(parameter.detach(), mesh))
    ema.split([parts])
    assert is_split(ema.shadow_params[0])
    other = ExponentialMovingAverage([nn.Parameter(torch.zeros_like(parts))], 0.5)
    other.load_state_dict(state)
    assert is_split(other.shadow_params[0])
    assert torch.equal(whole(other.shadow_params[0]), parameter)
