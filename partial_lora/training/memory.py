"""How much memory a training step of a causal language model needs at its peak, estimated from shapes alone.

Weights, adapter, gradients and optimizer are counted. Activations are what autograd keeps for the backward pass, added
up operation by operation from transformers' LlamaDecoderLayer (Qwen2's is the same with biases), with attention by a
kernel that does not keep its L x L weights (sdpa, flash). Not counted: a CUDA context (about 0.5 GB), the allocator's
fragments, and buffers of kernels.

With T = batch x length tokens, h the hidden and f the feed-forward's size, n heads of size d, V words, and a bytes a
number of the activations, the frozen weights need no input of theirs, and a block keeps
    8 T h          the inputs of its two norms, in fp32
    4 a T n d      queries, keys and values (these two repeated for every head) and what attention gives
    4 T n          the logarithm of each softmax's sum
    3 a T f        the two factors of the gated product, and what the activation function was applied to
    a T (2 h + f)  int8 alone: the inputs of its products, which bitsandbytes keeps (attention's output is kept anyway)
and for each adapted module, of i inputs, what the gradient of A needs, c bytes a number: T i c where A is dense, or
T |J| c where the kept features J are gathered. Where PEFT's own layer runs, of dense or quantised modules, numbers are
converted to fp32 first (c = 4) and the gradient of B keeps 4 T rank, too; where nothing has to be converted, modules
that read the same input keep it once. Past the blocks: 4 T h of the last norm, a T V logits, and 8 T V, their
log-probabilities in fp32 and the gradient of these. With checkpoints every block keeps a T h, its input, and one block
at a time the rest; checkpoints do not reach what bitsandbytes keeps for int8, a T (2 h + n d + f) in every block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from partial_lora.adapter.factor import GATHER_DENSITY
from partial_lora.errors import PartialLoraError

_FP32 = 4
_NF4_BLOCK = 64  # weights that share a scale (bitsandbytes, functional.quantize_4bit)
_NF4_CODES = 16  # numbers that 4 bits stand for, kept in fp32 beside every weight
# Modules of one name in this table read the same tensor.
_READS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "normed"),
    "o_proj": "attended",
    **dict.fromkeys(("gate_proj", "up_proj"), "normed again"),
    "down_proj": "gated",
}
_KEPT_ANYWAY = {"o_proj"}  # its input, by attention itself


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one step: of a block, of what comes after the blocks, and what goes with them."""

    blocks: int
    block: int
    entering: int  # what a checkpoint keeps of one block: its input
    after: int  # the last norm and the log-probabilities
    logits: int
    gradient: int  # of the log-probabilities, when the backward pass begins

    @property
    def peak(self) -> int:
        """When the backward pass begins."""
        return self.blocks * self.block + self.after + self.logits + self.gradient

    @property
    def peak_checkpointed(self) -> int:
        """When the backward pass begins, or when the last block has been computed again."""
        begins, inside = self.after + self.logits + self.gradient, self.block + self.logits
        return self.blocks * self.entering + max(begins, inside)


def peak_memory(
    model: PreTrainedModel,
    *,
    shapes: Mapping[str, tuple[int, int]],
    counts: Mapping[str, int | float | None],
    rank: int,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    batch_size: int,
    length: int,
) -> dict[str, int]:
    """Bytes that training takes on one device, by what they are for.

    Args:
        model: a causal model, on the meta device or any other.
        shapes: (out, in) of each adapted module, as `parameters.target_shapes` gives them.
        counts: of `parameters.describe`.
        dtype: of frozen weights and activations; adapter, gradients and AdamW's two moments are fp32.
        quantization: nf4 (without double quantisation) or int8, of all linear layers but the output layer.
        batch_size: sequences in one step on this device; length: tokens in each, padding included.

    Gives `weights`, `adapter`, `gradients`, `optimizer`, `activations` and their sum, `peak`; and, with gradient
    checkpoints, `activations_checkpointed` and `peak_checkpointed`. Raises PartialLoraError for a model without the
    geometry of a causal one.
    """
    trainable = int(counts["adapter_trainable"]) + int(counts["head"])
    dense = counts["adapter_dense"]
    density = counts["adapter_trainable"] / dense if dense else 1.0
    size = getattr(torch, dtype).itemsize
    kept = activations(
        model.config,
        shapes,
        rank=rank,
        density=density,
        size=size,
        quantization=quantization,
        batch_size=batch_size,
        length=length,
    )
    held = {
        "weights": weight_bytes(model, dtype, quantization),
        "adapter": _FP32 * trainable,
        "gradients": int(counts["gradient_bytes"]),
        "optimizer": int(counts["optimizer_bytes"]),
    }
    always = sum(held.values()) + _workspace(model, size, quantization)
    return {
        **held,
        "activations": kept.peak,
        "activations_checkpointed": kept.peak_checkpointed,
        "peak": always + kept.peak,
        "peak_checkpointed": always + kept.peak_checkpointed,
    }


def weight_bytes(model: PreTrainedModel, dtype: str, quantization: str | None = None) -> int:
    """Bytes of the frozen weights; a matrix that is both embeddings and output layer counts once.

    nf4: half a byte a weight, an fp32 scale for every 64 of them and a table of 16 codes a matrix. int8: a byte a
    weight and an fp32 scale a row. Embeddings, norms, biases and the output layer are of `dtype`.
    """
    quantised = {linear.weight: linear for linear in _quantised(model)} if quantization else {}
    return sum(
        _quantised_bytes(parameter, quantization)
        if parameter in quantised
        else parameter.numel() * getattr(torch, dtype).itemsize
        for parameter in model.parameters()
    )


def activations(
    config: object,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    density: float,
    size: int,
    quantization: str | None,
    batch_size: int,
    length: int,
) -> Activations:
    """What autograd keeps of a step, by the formulas above.

    config: of the model. shapes: (out, in) of each adapted module. density: share of an adapter's columns that is kept;
    1 is plain LoRA. size: bytes of a number of the activations. quantization: of the linear layers of the blocks.
    """
    try:
        hidden, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        heads, words = config.num_attention_heads, config.vocab_size
    except AttributeError as error:
        raise PartialLoraError(
            f"model.architecture={config.model_type}: the memory of its activations is not known, only that of causal "
            f"models ({error})"
        ) from error
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    tokens = batch_size * length
    block = tokens * (2 * _FP32 * hidden + 4 * size * width + _FP32 * heads + 3 * size * inner)
    entering = size * tokens * hidden
    if quantization == "int8":
        block += tokens * size * (2 * hidden + inner)
        entering += tokens * size * (2 * hidden + width + inner)
    adapters = tokens * _kept_for_adapters(shapes, rank, density, size, quantization)
    return Activations(
        blocks=blocks,
        block=block + math.ceil(adapters / blocks),
        entering=entering,
        after=_FP32 * tokens * (hidden + words),
        logits=size * tokens * words,
        gradient=_FP32 * tokens * words,
    )


def _kept_for_adapters(
    shapes: Mapping[str, tuple[int, int]], rank: int, density: float, size: int, quantization: str | None
) -> int:
    """Bytes that the adapters of all blocks keep for one token."""
    gathers = density <= GATHER_DENSITY
    own = density == 1 or quantization is not None  # PEFT's own layer, on numbers in fp32
    kept = _READS.keys() if quantization == "int8" else _KEPT_ANYWAY
    total, shared = 0, {}
    for name, (_, inputs) in shapes.items():
        block, _, module = name.rpartition(".")
        total += _FP32 * rank if own else 0
        if gathers:
            total += max(1, math.floor(density * inputs + 0.5)) * (_FP32 if own else size)
        elif own and size < _FP32:
            total += inputs * _FP32
        elif module not in kept:
            shared[block, _READS.get(module, module)] = inputs * size
    return total + sum(shared.values())


def _quantised(model: PreTrainedModel) -> list[nn.Linear]:
    output = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]


def _quantised_bytes(weight: nn.Parameter, quantization: str) -> int:
    if quantization == "int8":
        return weight.numel() + _FP32 * weight.shape[0]
    return math.ceil(weight.numel() / 2) + _FP32 * (math.ceil(weight.numel() / _NF4_BLOCK) + _NF4_CODES)


def _workspace(model: PreTrainedModel, size: int, quantization: str | None) -> int:
    """The largest matrix that is made whole for a product, where they are quantised."""
    if quantization is None:
        return 0
    return size * max((linear.weight.numel() for linear in _quantised(model)), default=0)
