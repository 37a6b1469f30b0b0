"""Parameters that FSDP2 or ZeRO has spread over processes: whole where someone looks, in parts where they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one all of it, which its processes have to ask for together."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not _emptied(tensor):
        return tensor
    with gathered(tensor):
        return tensor.detach().clone()


@contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    """Inside, a parameter that ZeRO's stage 3 has emptied is whole; what process 0 writes into it stays."""
    if not _emptied(parameter):
        yield
        return
    import deepspeed  # where there is such a parameter, there is DeepSpeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def _emptied(parameter: Tensor) -> bool:
    """Whether ZeRO's stage 3 keeps the values elsewhere for now."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE"


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds only its part of the parameter."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def numel(parameter: Tensor) -> int:
    """The number of entries of the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor spread over the processes as ``parameter`` is, if it is."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def entry_like(parameter: Tensor, dense: Tensor) -> Tensor:
    """The state-dict entry that stands for ``parameter``, made from the whole ``dense`` tensor.

    On the meta device it only plans what is to be loaded where, and accelerate reads the mesh off every entry of such a
    plan; with values, an ordinary tensor is what everyone who saves can write.
    """
    if not isinstance(parameter, DTensor) or not dense.is_meta:
        return dense
    mesh = parameter.device_mesh
    return DTensor.from_local(dense, mesh, [Replicate()] * mesh.ndim, run_check=False)
