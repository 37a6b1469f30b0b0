"""The product of a frozen weight and its masked adapter as one operation, with its backward pass."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from partial_lora.adapter.factor import FactorA, FactorB, MaskedFactor


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: FactorA, b: FactorB, *, scaling: float, dropout: float
) -> Tensor:
    """Compute W x + b + scaling · B A dropout(x), for a frozen W, as one differentiable operation.

    Args:
        x: activations (..., in).
        weight: W (out × in), which gets no gradient.
        bias: b (out), which may get a gradient.
        a: the masked A; b: the masked B, both of a linear layer.
        scaling: the module's factor of B A, for B's own multiple of ``kept``.
        dropout: the probability of zeroing a feature of x on its way into A; 0 in evaluation.

    Returns (..., out) in the dtype of W x. Where the factors have a wider dtype than x, the adapter is computed in it,
    as PEFT does. A backward pass that is to be differentiated again raises RuntimeError.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kept_a, kept_b, scaling = a.kept, b.kept, scaling * b.multiple
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
    def backward(ctx: FunctionCtx, wide: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable refuses too late: torch.autograd.grad takes its result for 0
            raise RuntimeError("create_graph=True: expected False for a fused layer; set PartialLinear.fuses = False")
        saved, zeroed, weight, kept_a, kept_b = ctx.saved_tensors
        a, b = ctx.a, ctx.b
        dropped = _Dropout(zeroed, ctx.dropout)
        gradient_a = gradient_b = gradient_x = gradient_bias = None
        casts = _autocast_dtype(wide) is not None
        # All casts were done in the forward pass.
        with torch.autocast(wide.device.type, enabled=False) if casts else nullcontext():
            outputs = _features_of(wide, b).to(kept_b.dtype)  # the gradient of B A x, where B is not zero
            gradient_low = b.transposed(outputs, kept_b) * ctx.scaling
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
        self.scale = 1 / (1 - probability)

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
