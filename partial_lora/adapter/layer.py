"""PEFT's LoRA layers with a masked adapter: how they compute, and how it is merged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from partial_lora.adapter.factor import FactorA, FactorB, FrozenA, OneHotA, OneHotB, TiedA, TiedB
from partial_lora.adapter.fingerprint import remember_base
from partial_lora.adapter.fused import adapted_linear
from partial_lora.adapter.selection import ModuleMasks
from partial_lora.errors import PartialLoraError
from partial_lora.masks import MASKED, TiedMask


class PartialLoraVariant(LoraVariant):
    """A masked adapter in any of PEFT's LoRA layers, quantised ones and convolutions included."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Refuse to build the adapter of a masked layer again, which would make it dense."""
        raise PartialLoraError(
            f"adapter {adapter_name!r} of {module.get_base_layer()} was built again: delete it first."
        )

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """Return the base layer's ``result`` (..., out) plus scaling * B A dropout(x), for x (..., in)."""
        a, b, dropout = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        scaling = module.scaling[active_adapter]
        if x.is_nested or _is_watched(a) or _is_watched(b):
            return result + b(a(dropout(x))) * scaling
        return b.add_to(result, a.project(x, dropout), scaling)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return a new tensor: the base weight with the adapter in it."""
        remember_base(module)  # a layer can be merged by itself
        return orig_weight + _change_of(orig_weight, module, active_adapter)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Put the adapter into the base weight in place."""
        remember_base(module)
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return a new tensor: the base weight with the adapter taken out again."""
        return orig_weight.data - _change_of(orig_weight, module, active_adapter)


class InvokedVariant(ALoraLinearVariant):
    """A masked adapter that changes only the tokens from its last invocation on (aLoRA), and so cannot be merged."""

    init = PartialLoraVariant.init

    @staticmethod
    def forward(
        module: LoraLayer,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        *,
        alora_offsets: list | None = None,
    ) -> Tensor:
        """Return what PartialLoraVariant does, for the last ``alora_offsets[i]`` tokens of text i; None is none.

        PEFT finds the offsets in the model's input.
        """
        tokens = result.shape[1] if result.dim() == 3 else 1
        counts = [offset or 0 for offset in alora_offsets or [None] * len(result)]
        before = torch.arange(tokens, device=x.device) < tokens - torch.tensor(counts, device=x.device).unsqueeze(1)
        changed = PartialLoraVariant.forward(module, active_adapter, x, result)
        return torch.where(before.view(*x.shape[:-1], 1), result, changed)


def _change_of(weight: Tensor, module: LoraLayer, adapter: str) -> Tensor:
    """Return the adapter's scaled B A in the dtype of W, or unrounded where the sum is quantised again."""
    change = module.get_delta_weight(adapter)
    return change.to(weight.dtype) if isinstance(module, (lora.Linear, lora.layer._ConvNd)) else change


class PartialLinear(lora.Linear):
    """PEFT's LoRA layer over a plain linear layer, which fuses base and adapter into one operation where it can.

    It can where exactly one masked adapter is active and nothing else watches the parts. All else runs as in PEFT,
    through PartialLoraVariant, with the same result.

    Attributes:
        fuses: False keeps the parts apart. Set it on the class for second derivatives, which the fused one lacks.
    """

    fuses = True

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return the adapted layer's output (..., out) for x (..., in)."""
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
        """Return the name of the active adapter where it can be fused with the base layer, else None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not self.fuses or len(active) != 1 or isinstance(self.lora_variant.get(active[0]), InvokedVariant):
            return None
        if self.disable_adapters or self.merged or not self.cast_input_dtype_enabled:
            return None
        a, b, dropout = (part[active[0]] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        if _is_watched(a) or _is_watched(b) or _is_watched(dropout):
            return None
        if not (isinstance(a, FactorA) and isinstance(b, FactorB)) or (a.full and b.full):
            return None  # dense: PEFT's own way, to the last bit
        if b.kept_bias is not None:
            return None  # in the base's bias, a small one would be lost where that is in half precision
        return active[0] if _is_plain(self.base_layer) and not _is_traced() else None


EMBEDDED = {"lora_A": "lora_embedding_B", "lora_B": "lora_embedding_A"}
"""PEFT's names of an embedding's factors, in files too. They are transposed: PEFT adapts the transpose of W."""


class PartialEmbedding(lora.Embedding):
    """PEFT's LoRA layer over an embedding W (tokens × dimensions), whose masked factors are modules as in other layers.

    Rows of B are tokens, columns of A are dimensions. PEFT's own methods handle the adapters that are not masked, which
    are tensors as PEFT has made them; this class adds the masked ones.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return the adapted embeddings (..., dimensions) of tokens x (...)."""
        result = super().forward(x, *args, **kwargs)
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return result
        for name in self.active_adapters:
            if name in self.lora_B:
                result = (result + self._change(x, name)).to(result.dtype)
        return result

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        names = ["__base__" if name in self.lora_B else name for name in adapter_names]
        result = super()._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
        for name in self.lora_B.keys() & set(adapter_names):
            rows = [row for row, adapter in enumerate(adapter_names) if adapter == name]
            result[rows] = (result[rows] + self._change(x[rows], name)).to(result.dtype)
        return result

    def _change(self, x: Tensor, name: str) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        change = self._embed(x, b.fill(b.kept)) @ a.fill(a.kept) * (self.scaling[name] * b.multiple)
        scale = self._get_embed_scale()
        return change if scale is None else change * scale.to(change.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what an adapter adds to W."""
        if adapter not in self.lora_B:
            return super().get_delta_weight(adapter)
        return self.lora_B[adapter].weight @ self.lora_A[adapter].weight * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to W; ``safe_merge`` raises ValueError where the result is not finite."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_B]
        remember_base(self)
        super().merge(safe_merge, adapter_names)
        for name in names:
            weight = self.get_base_layer().weight
            merged = weight.data + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters out of W again."""
        for name in [name for name in self.merged_adapters if name in self.lora_B]:
            weight = self.get_base_layer().weight
            weight.data = weight.data - self.get_delta_weight(name).to(weight.dtype)
            self.merged_adapters.remove(name)
        if self.merged:
            super().unmerge()

    def with_linears(self, name: str) -> None:
        """Replace the tensors that PEFT has just drawn for an adapter by linear layers."""
        for factor, embedded in EMBEDDED.items():
            drawn = getattr(self, embedded).pop(name)
            linear = nn.Linear(*drawn.shape, bias=False, device="meta")
            linear.weight = nn.Parameter(drawn.detach().T.contiguous(), requires_grad=drawn.requires_grad)
            getattr(self, factor)[name] = linear


def as_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict's tensors, with the factors of embeddings named and transposed like other layers' factors."""
    named = {}
    for key, tensor in tensors.items():
        path, is_embedded, rest = key.partition(".lora_embedding_")
        if is_embedded:
            factor, adapter = {"A": "lora_B", "B": "lora_A"}[rest[0]], rest[1:]  # of a file: no adapter, ""
            key, tensor = f"{path}.{factor}{adapter}.weight", tensor.T
        named[key] = tensor
    return named


def can_fuse(layer: nn.Module) -> bool:
    """Return True for a base layer that PartialLinear knows how to compute."""
    return type(layer) in (nn.Linear, Conv1D)


def _is_plain(base: nn.Module) -> bool:
    """Return True where the base layer computes its product alone, with a frozen weight that is an ordinary tensor."""
    return (
        can_fuse(base)
        and not _is_watched(base)
        and not base.weight.requires_grad
        and type(base.weight) in (nn.Parameter, Tensor, FakeTensor)  # no DTensor, no quantised tensor
    )


def _is_watched(module: nn.Module) -> bool:
    """Return True where a call does more than the module's forward: it has hooks, or accelerate has replaced it."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_traced() -> bool:
    """Return True under a compiler (it fuses by itself), a tracer, global hooks, functorch transforms or forward AD."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or nn.modules.module._has_any_global_hook():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def mask_layer(
    layer: LoraLayer,
    adapter_name: str,
    masks: ModuleMasks,
    *,
    fan_in: str,
    rows: str = MASKED,
    columns: str = MASKED,
    frozen: np.ndarray | None = None,
    factor: float = 1.0,
    invoked: bool = False,
) -> None:
    """Reduce the adapter that PEFT has just put into ``layer`` to what ``masks`` keeps.

    Its values stay as drawn; ``fan_in`` "kept" rescales A as if the kept inputs were all. ``rows`` and ``columns`` say
    which factor does not train; ``frozen`` are its values. The other starts at zero. The change of W is ``factor``
    times PEFT's, by the multiple of B. ``invoked``: it changes the tokens from its invocation on.
    """
    # The same layer with another forward pass. The functions of PEFT that build layers name their classes, and its hook
    # for custom ones (_register_custom_module) would displace the quantised layers.
    if type(layer) is lora.Linear and can_fuse(layer.get_base_layer()):
        layer.__class__ = PartialLinear
    elif type(layer) is lora.Embedding:
        layer.__class__ = PartialEmbedding
    embeds, tied = isinstance(layer, PartialEmbedding), isinstance(masks.rows, TiedMask)
    if embeds:
        layer.with_linears(adapter_name)
    dense_a, dense_b, entries = layer.lora_A[adapter_name], layer.lora_B[adapter_name], masks.element
    if rows != MASKED:
        a = FactorA(dense_a, masks.columns, entries=entries)
        a.kept.data.zero_()
        b = OneHotB(dense_b, masks.rows, frozen, a, entries=False, multiple=factor)
    else:
        b = (TiedB if tied else FactorB)(dense_b, masks.rows, entries=entries, multiple=factor)
        if columns != MASKED:
            hot = columns == "one_hot"
            a = (OneHotA if hot else FrozenA)(dense_a, masks.columns, frozen, b, entries=entries and not hot)
        else:
            a = (TiedA if tied else FactorA)(dense_a, masks.columns, entries=entries)
            if fan_in == "kept" and not embeds:  # an embedding's output is no sum over columns of A
                a.kept.data *= masks.columns.reach**-0.5  # from PEFT's draw for all inputs to one for the kept
    layer.lora_A[adapter_name], layer.lora_B[adapter_name] = a, b
    if not isinstance(layer, lora.layer.ParamWrapper):  # which adds B A to its parameter, and reads both whole
        layer.lora_variant[adapter_name] = InvokedVariant() if invoked else PartialLoraVariant()
