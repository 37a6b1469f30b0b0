"""How PEFT's LoRA layers run and merge a masked adapter."""

from __future__ import annotations

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from partial_lora.adapter.factor import FactorA, FactorB
from partial_lora.adapter.fingerprint import remember_base
from partial_lora.adapter.fused import adapted_linear
from partial_lora.adapter.selection import ModuleMasks
from partial_lora.errors import PartialLoraError


class PartialLoraVariant(LoraVariant):
    """How any of PEFT's LoRA layers, quantised ones and convolutions included, runs and merges a masked adapter."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Called when a layer that is masked already gets its adapter built again, which would make it dense."""
        raise PartialLoraError(
            f"adapter {adapter_name!r} of {module.get_base_layer()} was built again: delete it first."
        )

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """The base layer's ``result`` (..., out) plus scaling * B A dropout(x), for x (..., in)."""
        a, b, dropout = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        scaling = module.scaling[active_adapter]
        if x.is_nested or _is_watched(a) or _is_watched(b):
            return result + b(a(dropout(x))) * scaling
        return b.add_to(result, a.project(x, dropout), scaling)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new tensor: the base weight with the adapter in it."""
        remember_base(module)  # a layer can be merged by itself
        return orig_weight + _change_of(orig_weight, module, active_adapter)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Put the adapter into the base weight in place."""
        remember_base(module)
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new tensor: the base weight with the adapter taken out again."""
        return orig_weight.data - _change_of(orig_weight, module, active_adapter)


def _change_of(weight: Tensor, module: LoraLayer, adapter: str) -> Tensor:
    """The adapter's B A, scaled: in the dtype of W where the sum replaces W, and whole where it is quantised again."""
    change = module.get_delta_weight(adapter)
    return change.to(weight.dtype) if isinstance(module, (lora.Linear, lora.layer._ConvNd)) else change


class PartialLinear(lora.Linear):
    """PEFT's LoRA layer over a plain linear layer, which runs base and adapter as one operation where it may.

    It may where exactly one masked adapter is active and nothing else is interested in what the parts give on their
    own; everything else runs as in PEFT, through PartialLoraVariant, with the same result.

    Attributes:
        fuses: whether it ever does. Set False on the class for second derivatives, which the one operation lacks.
    """

    fuses = True

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The adapted layer's output (..., out) for x (..., in)."""
        name = None if args or kwargs or x.is_nested else self._fusable_adapter()
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, dropout = self.base_layer, self.lora_dropout[name]
        return adapted_linear(
            x,
            base.weight.T if isinstance(base, Conv1D) else base.weight,
            base.bias,
            self.lora_A[name],
            self.lora_B[name],
            scaling=self.scaling[name],
            dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def _fusable_adapter(self) -> str | None:
        """The one active adapter, where it can run as one operation with the base layer."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not self.fuses or len(active) != 1:
            return None
        if self.disable_adapters or self.merged or not self.cast_input_dtype_enabled:
            return None
        a, b, dropout = (part[active[0]] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        if _is_watched(a) or _is_watched(b) or _is_watched(dropout):
            return None
        if not (isinstance(a, FactorA) and isinstance(b, FactorB)) or (a.full and b.full):
            return None  # dense: PEFT's own way, to the last bit
        return active[0] if _is_plain(self.base_layer) and not _is_traced() else None


def can_fuse(layer: nn.Module) -> bool:
    """Whether a base layer is one that PartialLinear knows how to compute."""
    return type(layer) in (nn.Linear, Conv1D)


def _is_plain(base: nn.Module) -> bool:
    """Whether calling the base layer does nothing but its product, with a frozen weight that is an ordinary tensor."""
    return (
        can_fuse(base)
        and not _is_watched(base)
        and not base.weight.requires_grad
        and type(base.weight) in (nn.Parameter, Tensor)  # no DTensor, no quantised tensor
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks, or accelerate's, which replace the forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_traced() -> bool:
    """Whether a compiler (it fuses by itself), hooks of all modules, a functorch transform or forward AD looks on."""
    if torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def mask_layer(layer: LoraLayer, adapter_name: str, masks: ModuleMasks) -> None:
    """Keep only what ``masks`` keeps of the adapter PEFT has just put into ``layer``; its values stay as drawn."""
    element = masks.element
    layer.lora_A[adapter_name] = FactorA(layer.lora_A[adapter_name], masks.columns, element=element)
    layer.lora_B[adapter_name] = FactorB(layer.lora_B[adapter_name], masks.rows, element=element)
    layer.lora_variant[adapter_name] = PartialLoraVariant()
