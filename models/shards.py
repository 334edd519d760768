"""Tensors that are split over processes, as `strategy=fsdp` has them: what a process
holds of one, and the whole.

They are torch's `DTensor`s, known here by what they can do: importing their class takes
longer than most of what needs none.
"""

from typing import Any, cast

from torch import Tensor


def is_split(x: object) -> bool:
    """Whether other processes hold parts of a tensor."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return cast(Tensor, cast(Any, x).to_local()) if is_split(x) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them call this."""
    return cast(Tensor, cast(Any, x).full_tensor()) if is_split(x) else x


def split_as(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in parts where `like`, of the same shape, is in parts.

    Args:
        x: The same on every process; one that is split already stays as it is.
        like: Says over which processes, and on which device.
    """
    if is_split(x) or not is_split(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    # Nothing is sent: every process takes its part of what it has.
    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None)


def collected(content: Any, keeps: bool) -> Any:
    """A state with all tensors whole, those that were split on the host, as files of a
    single process have it. All processes call this.

    Args:
        content: Tensors and plain values in dicts, lists and tuples.
        keeps: Whether this process keeps them. Others leave them as they are, since
            the whole of every process would not fit into a machine.
    """
    if isinstance(content, dict):
        return {key: collected(x, keeps) for key, x in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(collected(x, keeps) for x in content)
    if not is_split(content):
        return content
    full = whole(content)
    return full.cpu() if keeps else content
