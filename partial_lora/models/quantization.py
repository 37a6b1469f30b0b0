"""Frozen weights in 4 or 8 bits, by bitsandbytes: what a model of billions of parameters needs to fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import is_bitsandbytes_available

from partial_lora.errors import PartialLoraError, one_line

# bitsandbytes says at every product that LLM.int8() casts its inputs to fp16.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")
)


def config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the config with which transformers quantises linear layers as it loads them, except the output layer.

    nf4: blocks of 64 weights, each with its fp32 scale, and products in `dtype`. int8: rows, as LLM.int8() does.
    Raises PartialLoraError where bitsandbytes is missing or runs on no device here.
    """
    if not is_bitsandbytes_available():
        raise PartialLoraError(
            f"model.quantization={quantization}: bitsandbytes is missing or too old (`pip install -U bitsandbytes`); "
            "null leaves the weights as they are"
        )
    try:
        validate_bnb_backend_availability(raise_exception=True)
    except (RuntimeError, ImportError) as error:
        raise PartialLoraError(
            f"model.quantization={quantization}: bitsandbytes runs on no device of this machine ({one_line(error)}); "
            "null leaves the weights as they are"
        ) from error
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_gradients(model: nn.Module) -> None:
    """Let gradients pass through a quantised model after its first inference, too.

    Where a CPU computes with bf16, bitsandbytes packs 4-bit weights at their first inference, with rounded scales. From
    then on, without any warning, no gradient passes through them, only past them through the residual stream
    (bitsandbytes' nn/modules.py, Linear4bit.forward; autograd/_functions.py, matmul_4bit). Here weights are never
    packed, and inference is slower.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def dequantised(model: PreTrainedModel, *, values: bool = True) -> Iterator[None]:
    """Replace quantised layers, inside the block, by plain ones with the values of their codes.

    Importance and calibration work on these. They have the model's dtype and take as much memory as the model would
    without quantisation. After the block the codes are back as they were. In training, int8 layers round their inputs;
    these do not. A model that is not quantised stays as it is. values: False for layers of the same names and shapes
    that hold nothing and take no memory.
    """
    kinds = {name: type(getattr(module, "weight", None)).__name__ for name, module in model.named_modules()}
    quantised = {name: model.get_submodule(name) for name in kinds if kinds[name] in ("Params4bit", "Int8Params")}
    try:
        for name, module in quantised.items():
            model.set_submodule(name, _plain(module, model.dtype, values))
        yield
    finally:
        for name, module in quantised.items():
            module.train(model.get_submodule(name).training)
            model.set_submodule(name, module)


def size_of(parameter: nn.Parameter) -> int:
    """Count the weights in a parameter: two in each byte of 4-bit codes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _plain(module: nn.Linear, dtype: torch.dtype, values: bool) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
    if values:
        # Imported here: it imports bitsandbytes, which not everyone has.
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        meant = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).to(dtype)
        plain.weight = nn.Parameter(meant, requires_grad=False)
    plain.bias = module.bias
    return plain.train(module.training)
