"""The memory of a causal model's training step at its peak, estimated from shapes alone, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from partial_lora.budget import FP32
from partial_lora.masks import GATHER_DENSITY
from partial_lora.models.skeleton import Skeleton

_BYTES = {"float32": FP32, "bfloat16": 2, "float16": 2}
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NF4_BLOCK = 64  # weights that share a scale (bitsandbytes, functional.quantize_4bit)
_NF4_CODES = 16  # numbers that 4 bits stand for, in fp32 beside every matrix

# Modules that have the same value here read the same tensor.
_READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "normed"),
    "o_proj": "attended",
    **dict.fromkeys(("gate_proj", "up_proj"), "normed again"),
    "down_proj": "gated",
}
_KEPT_ANYWAY = {"o_proj"}  # attention itself keeps its input


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one step, by where they arise."""

    blocks: int
    block: int
    entering: int  # what a checkpoint keeps of one block: its input
    after: int  # the last norm and the log-probabilities
    logits: int
    gradient: int  # of the log-probabilities, when the backward pass begins

    @property
    def peak(self) -> int:
        """Bytes when the backward pass begins."""
        return self.blocks * self.block + self.after + self.logits + self.gradient

    @property
    def peak_checkpointed(self) -> int:
        """Bytes when the backward pass begins, or when the last block has been recomputed."""
        begins, inside = self.after + self.logits + self.gradient, self.block + self.logits
        return self.blocks * self.entering + max(begins, inside)


def peak_memory(
    model: Skeleton,
    *,
    shapes: Mapping[str, tuple[int, int]],
    counts: Mapping[str, int | float | None],
    rank: int,
    dtype: str,
    quantization: str | None,
    batch_size: int,
    length: int,
) -> dict[str, int]:
    """Return the bytes that training takes on one device, by what they are for.

    Args:
        model: of a causal model, whose config has KEYS.
        shapes: (out, in) of each adapted module.
        counts: from `size.describe`.
        dtype: of frozen weights and activations; adapter, gradients and AdamW's two moments are fp32.
        quantization: nf4 (without double quantisation) or int8, of all linear layers but the output layer.
        batch_size: sequences in one step on this device; length: tokens in each, padding included.

    The keys are `weights`, `adapter`, `gradients`, `optimizer`, `activations` and their sum, `peak`; and, with gradient
    checkpoints, `activations_checkpointed` and `peak_checkpointed`.
    """
    trainable = int(counts["adapter_trainable"]) + int(counts["head"])
    dense = counts["adapter_dense"]
    density = counts["adapter_trainable"] / dense if dense else 1.0
    size = _BYTES[dtype]
    kept = activations(
        model,
        shapes,
        rank=rank,
        density=density,
        size=size,
        quantization=quantization,
        batch_size=batch_size,
        length=length,
    )
    persistent = {
        "weights": weight_bytes(model, dtype, quantization),
        "adapter": FP32 * trainable,
        "gradients": int(counts["gradient_bytes"]),
        "optimizer": int(counts["optimizer_bytes"]),
    }
    always = sum(persistent.values())
    if quantization is not None:  # the largest matrix is dequantised whole for a product
        always += size * max((math.prod(shape) for shape in _quantised(model).values()), default=0)
    return {
        **persistent,
        "activations": kept.peak,
        "activations_checkpointed": kept.peak_checkpointed,
        "peak": always + kept.peak,
        "peak_checkpointed": always + kept.peak_checkpointed,
    }


def weight_bytes(model: Skeleton, dtype: str, quantization: str | None = None) -> int:
    """Return the bytes of the frozen weights; a matrix that is both embeddings and output layer counts once.

    nf4: half a byte a weight, an fp32 scale for every 64 of them and a table of 16 codes a matrix. int8: a byte a
    weight and an fp32 scale a row. Embeddings, norms, biases and the output layer are of `dtype`.
    """
    quantised = {f"{name}.weight" for name in _quantised(model)} if quantization else set()
    return sum(
        _quantised_bytes(shape, quantization) if name in quantised else math.prod(shape) * _BYTES[dtype]
        for name, shape in model.parameters.items()
    )


def activations(
    model: Skeleton,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    density: float,
    size: int,
    quantization: str | None,
    batch_size: int,
    length: int,
) -> Activations:
    """Return what autograd keeps of a step.

    shapes: (out, in) of each adapted module. density: share of an adapter's columns that is kept; 1 is plain LoRA.
    size: bytes of a number of the activations. quantization: of the linear layers of the blocks.
    """
    hidden, inner, blocks, heads, words = (model.config[key] for key in KEYS)
    width = heads * (model.config.get("head_dim") or hidden // heads)
    tokens = batch_size * length
    block = tokens * (2 * FP32 * hidden + 4 * size * width + FP32 * heads + 3 * size * inner)
    entering = size * tokens * hidden
    if quantization == "int8":
        block += tokens * size * (2 * hidden + inner)
        entering += tokens * size * (2 * hidden + width + inner)
    adapters = tokens * _kept_for_adapters(shapes, rank, density, size, quantization)
    return Activations(
        blocks=blocks,
        block=block + math.ceil(adapters / blocks),
        entering=entering,
        after=FP32 * tokens * (hidden + words),
        logits=size * tokens * words,
        gradient=FP32 * tokens * words,
    )


def _kept_for_adapters(
    shapes: Mapping[str, tuple[int, int]], rank: int, density: float, size: int, quantization: str | None
) -> int:
    """Return the bytes that the adapters of all blocks keep for one token."""
    gathers = density <= GATHER_DENSITY
    in_fp32 = density == 1 or quantization is not None  # PEFT's own layer, on numbers in fp32
    kept = _READS.keys() if quantization == "int8" else _KEPT_ANYWAY
    total, shared = 0, {}
    for name, (_, inputs) in shapes.items():
        block, _, module = name.rpartition(".")
        total += FP32 * rank if in_fp32 else 0
        if gathers:
            total += max(1, math.floor(density * inputs + 0.5)) * (FP32 if in_fp32 else size)
        elif in_fp32 and size < FP32:
            total += inputs * FP32
        elif module not in kept:
            shared[block, _READS.get(module, module)] = inputs * size
    return total + sum(shared.values())


def _quantised(model: Skeleton) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in model.linears.items() if name != model.output}


def _quantised_bytes(shape: tuple[int, ...], quantization: str) -> int:
    count = math.prod(shape)
    if quantization == "int8":
        return count + FP32 * shape[0]
    return math.ceil(count / 2) + FP32 * (math.ceil(count / _NF4_BLOCK) + _NF4_CODES)
