"""Factors that FSDP2 has spread over processes: whole where someone looks, in parts where they are kept."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one all of it, which its processes have to ask for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
