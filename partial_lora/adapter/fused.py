"""A frozen linear layer and its masked adapter as one differentiable operation.

y = W x + b + scaling · B A dropout(x), the formula of the paper with W frozen. Written out by hand because autograd,
given the two summands apart, pays for the full width again and again: it keeps all of x for the gradient of A, adds two
tensors as wide as the output in the forward pass, and two as wide as the input in the backward pass. Here both sums
happen in place, in tensors nobody else has seen yet, and what is kept for the backward pass is the kept features of x
alone; A x is computed again from them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from partial_lora.adapter.factor import FactorA, FactorB, MaskedFactor


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: FactorA, b: FactorB, *, scaling: float, dropout: float
) -> Tensor:
    """W x + b + scaling · B A dropout(x), for a frozen W.

    Args:
        x: activations (..., in).
        weight: W (out × in), which gets no gradient.
        bias: b (out), which may get one.
        a: the masked A; b: the masked B, both of a linear layer.
        scaling: alpha / rank.
        dropout: the probability of zeroing a feature of x on its way into A; 0 in evaluation.

    Returns (..., out) in the dtype of W x. Where the factors have a wider dtype than x, the adapter is computed in it,
    as PEFT does. Second derivatives are refused by PyTorch.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kept_a, kept_b = a.kept, b.kept
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tokens, weight, bias, kept_a, kept_b = (
            tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (tokens, weight, bias, kept_a, kept_b)
        )
    # Of matrices, so that what it gives is no view: later code may write into that, as into any layer's output.
    result = _AdaptedLinear.apply(tokens, weight, bias, kept_a, kept_b, a, b, scaling, dropout)
    return result.view(*x.shape[:-1], result.shape[-1])


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
        low = dropped(inputs).to(kept_a.dtype) @ a.operand(kept_a).T
        result = F.linear(tokens, weight, bias)
        _add_product(result, low.mul_(scaling), b, kept_b)
        ctx.save_for_backward(inputs, dropped.zeroed, weight, kept_a, kept_b)
        ctx.a, ctx.b, ctx.scaling, ctx.dropout = a, b, scaling, dropout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kind = gradient.device.type
        if not torch.is_autocast_enabled(kind):
            return _AdaptedLinear._gradients(ctx, gradient)
        with torch.autocast(kind, enabled=False):  # what was cast was cast in the forward pass
            return _AdaptedLinear._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx: FunctionCtx, wide: Tensor) -> tuple[Tensor | None, ...]:
        inputs, zeroed, weight, kept_a, kept_b = ctx.saved_tensors
        a, b = ctx.a, ctx.b
        matrix_a, matrix_b = a.operand(kept_a), b.operand(kept_b)  # as the features below were taken
        dropped = _Dropout(zeroed, ctx.dropout)
        inputs = dropped(inputs).to(kept_a.dtype)
        outputs = _features_of(wide, b).to(kept_b.dtype)  # the gradient of B A x, where B is not zero
        low = (inputs @ matrix_a.T).mul_(ctx.scaling)
        gradient_low = (outputs @ matrix_b).mul_(ctx.scaling)
        gradient_a = a.kept_of_operand(gradient_low.T @ inputs)
        gradient_b = b.kept_of_operand(outputs.T @ low)
        gradient_x = gradient_bias = None
        if ctx.needs_input_grad[0]:
            gradient_x = wide @ weight
            if zeroed is None:
                _add_product(gradient_x, gradient_low, a, kept_a)
            elif a.gathers:
                _scatter(gradient_x, dropped(gradient_low @ matrix_a), a)
            else:
                gradient_x.copy_(gradient_x + dropped(gradient_low @ matrix_a))
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
    """The features (tokens × kept) that meet the factor's operand."""
    return tokens.index_select(1, factor.index_on(tokens.device)) if factor.gathers else tokens


def _add_product(result: Tensor, low: Tensor, factor: MaskedFactor, kept: Tensor) -> None:
    """result += low A (or low Bᵀ) in place, for low (tokens × rank)."""
    scatters = factor.scatters
    matrix = kept if scatters else factor.fill(kept)
    if isinstance(factor, FactorB):
        matrix = matrix.T
    if scatters:
        _scatter(result, low @ matrix, factor)
    elif result.dtype == low.dtype:
        result.addmm_(low, matrix)
    else:
        result.copy_(result + low @ matrix)


def _scatter(result: Tensor, change: Tensor, factor: MaskedFactor) -> None:
    """result += change in place, on the kept features, summed in the wider dtype of the two."""
    index = factor.index_on(result.device)
    if result.dtype == change.dtype:
        result.index_add_(1, index, change)
    else:
        result.index_copy_(1, index, (result.index_select(1, index) + change).to(result.dtype))
