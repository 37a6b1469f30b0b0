"""What a forward pass keeps for its backward pass, counted in memory: every piece once and whole."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

Storages = dict[int, torch.UntypedStorage]
"""{address: memory}: distinct pieces of memory; as long as they are held here no other can get their address."""


@dataclass
class Kept:
    """Bytes that a forward pass has kept; None until it is over."""

    bytes: int | None = None


@contextmanager
def kept_by_forward(kind: str = "cpu") -> Iterator[Kept]:
    """Count what the forward passes inside the block keep, on devices of the kind.

    Counted is what autograd is given to save, and tensors that exist at the end in any other way (an attribute of an
    autograd function, say). Not counted is what existed before: parameters, buffers, indices, optimizer state, the
    batch. So it is best used after a first step, when everything that lasts exists. Draws no random number.
    """
    before, saved, found = alive(kind), {}, Kept()

    def save(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield found
    found.bytes = total({**saved, **alive(kind)}, without=before)


def storages(tensors: Iterable[Tensor]) -> Storages:
    """The memory that tensors lie in: one piece each, or two for a sparse one."""
    found = {}
    for tensor in tensors:
        for part in (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else (tensor,):
            with suppress(RuntimeError):  # of memory that is given back while its tensor lives, as FSDP does
                if part.untyped_storage().nbytes():
                    found[part.untyped_storage().data_ptr()] = part.untyped_storage()
    return found


def alive(kind: str = "cpu") -> Storages:
    """The memory of every tensor on devices of the kind that Python can see, whoever holds it."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))  # asking it would wake lazy ones
    return storages(tensor for tensor in tensors if tensor.device.type == kind)


def total(pieces: Storages, *, without: Storages) -> int:
    """The bytes of the pieces that are not among those of `without`."""
    return sum(piece.nbytes() for address, piece in pieces.items() if address not in without)


def tensors_in(state: Iterable[Mapping]) -> Iterator[Tensor]:
    """The tensors of an optimizer's state."""
    return (value for entry in state for value in entry.values() if isinstance(value, Tensor))
