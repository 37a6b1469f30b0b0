"""Parameters that FSDP2 or ZeRO has sharded over processes: whole when read, in parts when stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or all of a sharded one; all its processes have to call this together."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not _emptied(tensor):
        return tensor
    with gathered(tensor):
        return tensor.detach().clone()


@contextmanager
def gathered(parameter: Tensor | None) -> Iterator[None]:
    """Restore, inside the block, a parameter that ZeRO's stage 3 has emptied; what process 0 writes into it stays."""
    if not _emptied(parameter):
        yield
        return
    import deepspeed  # only DeepSpeed makes such a parameter

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def _emptied(parameter: Tensor | None) -> bool:
    """Return True where ZeRO's stage 3 currently keeps the values elsewhere."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE"


def is_sharded(parameter: Tensor) -> bool:
    """Return True where a process holds only its part of the parameter."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor, sharded over the processes like ``parameter``; as it is where that is not sharded."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def entry_like(parameter: Tensor, dense: Tensor) -> Tensor:
    """Return the state-dict entry that stands for ``parameter``, made from the whole ``dense`` tensor.

    On the meta device a state dict only plans what is loaded where, and accelerate reads the mesh off its entries, so
    they are DTensors. With values, an entry is an ordinary tensor, which anyone can save.
    """
    if not isinstance(parameter, DTensor) or not dense.is_meta:
        return dense
    mesh = parameter.device_mesh
    return DTensor.from_local(dense, mesh, [Replicate()] * mesh.ndim, run_check=False)
