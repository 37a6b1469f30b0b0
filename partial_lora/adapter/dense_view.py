"""The dense form of a masked factor, as other code sees it: to be read, never written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from partial_lora.errors import PartialLoraError


class DenseView(Tensor):
    """A tensor computed from the kept entries of a factor; writing into it, or into a view of it, raises.

    Much code changes a factor by writing into ``layer.lora_A[name].weight``. Such values would be lost without a word,
    since the next reader computes the tensor again. Copies, and all that is computed from it, are ordinary tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if _writes(func.__name__, args, kwargs or {}):
            raise PartialLoraError(
                f"{func.__name__.strip('_')}: the weight of a masked factor is computed from its kept entries, so that"
                " a change would be lost: load a state dict, or change `kept`, the parameter."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        seen = [arg for arg in args if isinstance(arg, cls)]

        def viewed(part: object) -> object:  # .data, .detach(), a slice: writing there must raise too
            in_memory = (part.untyped_storage()._cdata == arg.untyped_storage()._cdata for arg in seen)
            is_view = isinstance(part, Tensor) and any(in_memory)
            return part.as_subclass(cls) if is_view else part

        return type(result)(map(viewed, result)) if type(result) in (list, tuple) else viewed(result)

    def __deepcopy__(self, memo: dict) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return memo.setdefault(id(self), self.as_subclass(Tensor).detach().clone())

    def __reduce_ex__(self, protocol: int) -> object:
        """Pickle as an ordinary tensor, for torch.save too: the reader may not know this class."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


def read_only(dense: Tensor) -> Tensor:
    """Return a tensor as a DenseView; as it is where nobody writes, under a compiler and where it has no values."""
    return dense if torch.compiler.is_compiling() or type(dense) is FakeTensor else dense.as_subclass(DenseView)


# The other operators that write, += and its kind, are functions with an underscore at the end.
_IN_PLACE = {"__set__", "__setitem__", *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift"))}


def _writes(name: str, args: tuple, kwargs: dict) -> bool:
    """Return True where a function of torch called ``name`` changes the view among its arguments."""
    if isinstance(kwargs.get("out"), DenseView):
        return True
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    named = (kwargs[key] for key in ("tensor", "input", "self") if key in kwargs)  # as torch.nn.init has it
    targets = args[0] if args and isinstance(args[0], (list, tuple)) else (*args[:1], *named)  # torch._foreach_add_
    return in_place and any(isinstance(target, DenseView) for target in targets)
