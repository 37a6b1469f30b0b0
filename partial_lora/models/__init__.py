"""Pre-trained models, each loaded whole and checked, with a new head for the task."""

from partial_lora.models.load import (
    SETTINGS,
    empty,
    enable_gradient_checkpointing,
    has_own_head,
    head_name,
    load,
    weights_digest,
)
from partial_lora.models.quantization import dequantised, size_of
from partial_lora.models.texts import tokenizer
from partial_lora.models.weights import in_full_precision

__all__ = [
    "SETTINGS",
    "dequantised",
    "empty",
    "enable_gradient_checkpointing",
    "has_own_head",
    "head_name",
    "in_full_precision",
    "load",
    "size_of",
    "tokenizer",
    "weights_digest",
]
