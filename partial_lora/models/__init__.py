"""Pre-trained models, each loaded whole and checked, with a new head for the task."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partial_lora.models.family import (
        SETTINGS,
        empty,
        enable_gradient_checkpointing,
        has_own_head,
        head_name,
        load,
        weights_digest,
    )
    from partial_lora.models.quantization import dequantised, size_of
    from partial_lora.models.texts import longest_text, tokenizer
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
    "longest_text",
    "size_of",
    "tokenizer",
    "weights_digest",
]

# Imported on first use, so that `partial-lora info` can count without torch. The others are of `family`.
_MODULES = {
    "dequantised": "quantization",
    "in_full_precision": "weights",
    "size_of": "quantization",
    "longest_text": "texts",
    "tokenizer": "texts",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'family')}"), name)
