"""The dense form of a masked factor, as code outside sees it: to be read, never written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from partial_lora.errors import PartialLoraError


class DenseView(Tensor):
    """A tensor computed from the kept entries of a factor; writing into it, or into a view of it, raises.

    Much code knows a factor as ``layer.lora_A[name].weight`` and changes it by writing there. Written values would be
    lost without a word, since the next reader computes the tensor anew. Everything that is computed from it, and every
    copy, is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if _writes(func.__name__, args, kwargs or {}):
            raise PartialLoraError(
                f"{func.__name__.strip('_')}: the weight of a masked factor is computed from its kept entries, so that"
                " this would be lost: load a state dict, or do it to `kept`, which is the parameter."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and any(_same_memory(result, each) for each in args if isinstance(each, cls)):
            return result.as_subclass(cls)  # .data, .detach(), a slice: a way to write all the same
        return result

    def __reduce_ex__(self, protocol: int) -> object:
        """Pickled, and saved by torch.save, it is an ordinary tensor: what reads it may not know this class."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


_IN_PLACE = {
    "__set__",
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor")),
}


def _writes(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function of torch called ``name`` changes the view among its arguments."""
    if isinstance(kwargs.get("out"), DenseView):
        return True
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place and bool(args) and isinstance(args[0], DenseView)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
