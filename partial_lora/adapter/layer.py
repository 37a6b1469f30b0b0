"""The forward pass of a masked adapter, and its merge, in PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from partial_lora.adapter.factor import FactorA, FactorB, FrozenA, MaskedFactor, OneHotA, OneHotB, TiedA, TiedB
from partial_lora.adapter.fingerprint import remember_base
from partial_lora.adapter.selection import ModuleMasks
from partial_lora.errors import PartialLoraError
from partial_lora.masks import MASKED, TiedMask


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: FactorA, b: FactorB, *, scaling: float, dropout: float
) -> Tensor:
    """Compute W x + b + scaling · B A dropout(x), for a frozen W, as one differentiable operation.

    Args:
        x: activations (..., in).
        weight: W (out × in), which gets no gradient.
        bias: b (out), which may get a gradient.
        a: the masked A; b: the masked B, both of a linear layer.
        scaling: the module's factor of B A.
        dropout: the probability of zeroing a feature of x on its way into A; 0 in evaluation.

    Returns (..., out) in the dtype of W x. Where the factors have a wider dtype than x, the adapter is computed in it,
    as PEFT does. Second derivatives are refused by PyTorch.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kept_a, kept_b = a.kept, b.kept
    if (dtype := _autocast_dtype(x)) is not None:
        tokens, weight, bias, kept_a, kept_b = (
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (tokens, weight, bias, kept_a, kept_b)
        )
    # On matrices, so that the function returns no view: later code may write into it, as into any layer's output.
    result = _AdaptedLinear.apply(tokens, weight, bias, kept_a, kept_b, a, b, scaling, dropout)
    return result.view(*x.shape[:-1], result.shape[-1])


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast where it is on for a tensor's device; None on devices without it, such as meta."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept_a: Tensor,
        kept_b: Tensor,
        a: FactorA,
        b: FactorB,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        inputs = _features_of(tokens, a)  # first, while they are still in the processor's cache
        dropped = _Dropout.draw(inputs, dropout)
        low = a.times(dropped(inputs).to(kept_a.dtype), kept_a) * scaling
        result = F.linear(tokens, weight, bias)
        _add_product(result, low, b, kept_b)
        # B's gradient needs `low`. A's needs the inputs, which are wider but give `low` again.
        ctx.save_for_backward(inputs if ctx.needs_input_grad[3] else low, dropped.zeroed, weight, kept_a, kept_b)
        ctx.a, ctx.b, ctx.scaling, ctx.dropout = a, b, scaling, dropout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if _autocast_dtype(gradient) is None:
            return _AdaptedLinear._gradients(ctx, gradient)
        with torch.autocast(gradient.device.type, enabled=False):  # all casts were done in the forward pass
            return _AdaptedLinear._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: FunctionCtx, wide: Tensor) -> tuple[Tensor | None, ...]:
        saved, zeroed, weight, kept_a, kept_b = ctx.saved_tensors
        a, b = ctx.a, ctx.b
        dropped = _Dropout(zeroed, ctx.dropout)
        outputs = _features_of(wide, b).to(kept_b.dtype)  # the gradient of B A x, where B is not zero
        gradient_low = b.transposed(outputs, kept_b) * ctx.scaling
        gradient_a = gradient_b = gradient_x = gradient_bias = None
        if ctx.needs_input_grad[3]:
            inputs = dropped(saved).to(kept_a.dtype)
            gradient_a = a.kept_of_operand(gradient_low.T @ inputs)
        if ctx.needs_input_grad[4]:
            low = a.times(inputs, kept_a) * ctx.scaling if ctx.needs_input_grad[3] else saved
            gradient_b = b.kept_of_operand(outputs.T @ low)
        if ctx.needs_input_grad[0]:
            gradient_x = wide @ weight
            if zeroed is None:
                _add_product(gradient_x, gradient_low, a, kept_a)
            elif a.gathers:
                a.scatter(gradient_x, dropped(a.transposed(gradient_low, kept_a)))
            else:
                gradient_x.copy_(gradient_x + dropped(a.transposed(gradient_low, kept_a)))
        if ctx.needs_input_grad[2]:
            gradient_bias = wide.sum(0)
        return gradient_x, None, gradient_bias, gradient_a, gradient_b, None, None, None, None


class _Dropout:
    """One draw of dropout, which the backward pass repeats: zero where `zeroed`, the rest scaled up."""

    def __init__(self, zeroed: Tensor | None, probability: float) -> None:
        self.zeroed = zeroed
        self.scale = 1 / (1 - probability) if probability < 1 else 0.0

    @classmethod
    def draw(cls, like: Tensor, probability: float) -> _Dropout:
        return cls(torch.rand_like(like, dtype=torch.float32) < probability if probability else None, probability)

    def __call__(self, features: Tensor) -> Tensor:
        return features if self.zeroed is None else features.masked_fill(self.zeroed, 0).mul_(self.scale)


def _features_of(tokens: Tensor, factor: MaskedFactor) -> Tensor:
    """Return the features (tokens × features) that meet the factor's operand."""
    return factor.gather(tokens) if factor.gathers else tokens


def _add_product(result: Tensor, low: Tensor, factor: MaskedFactor, kept: Tensor) -> None:
    """Add low A (or low Bᵀ) to result in place, for low (tokens × rank)."""
    is_b = isinstance(factor, FactorB)
    if factor.scatters:
        factor.scatter(result, (factor.times if is_b else factor.transposed)(low, kept))
        return
    matrix = factor.fill(kept).T if is_b else factor.fill(kept)
    if result.dtype == low.dtype:
        result.addmm_(low, matrix)
    else:
        result.copy_(result + low @ matrix)


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
        own = ["__base__" if name in self.lora_B else name for name in adapter_names]
        result = super()._mixed_batch_forward(x, *args, adapter_names=own, **kwargs)
        for name in self.lora_B.keys() & set(adapter_names):
            rows = [row for row, each in enumerate(adapter_names) if each == name]
            result[rows] = (result[rows] + self._change(x[rows], name)).to(result.dtype)
        return result

    def _change(self, x: Tensor, name: str) -> Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        change = self._embed(x, b.fill(b.kept)) @ a.fill(a.kept) * self.scaling[name]
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
    """Return True under a compiler (it fuses by itself), hooks of all modules, functorch transforms or forward AD."""
    if torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook():
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
) -> None:
    """Reduce the adapter that PEFT has just put into ``layer`` to what ``masks`` keeps.

    Its values stay as drawn; ``fan_in`` "kept" rescales A as if the kept inputs were all. ``rows`` and ``columns`` say
    which factor does not train; ``frozen`` are its values. The other starts at zero.
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
        b = OneHotB(dense_b, masks.rows, frozen, a, entries=False)
    else:
        b = (TiedB if tied else FactorB)(dense_b, masks.rows, entries=entries)
        if columns != MASKED:
            hot = columns == "one_hot"
            a = (OneHotA if hot else FrozenA)(dense_a, masks.columns, frozen, b, entries=entries and not hot)
        else:
            a = (TiedA if tied else FactorA)(dense_a, masks.columns, entries=entries)
            if fan_in == "kept" and not embeds:  # an embedding's output is no sum over columns of A
                a.draw_for_kept()
    layer.lora_A[adapter_name], layer.lora_B[adapter_name] = a, b
    layer.lora_variant[adapter_name] = PartialLoraVariant()
