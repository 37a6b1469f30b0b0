"""Pre-trained models, each loaded whole and checked, with a new head for the task."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported on first use, so that `partial-lora info` can count without torch.
_MODULES = {
    "family": ("empty", "enable_gradient_checkpointing", "head_name", "load", "weights_digest"),
    "fetch": ("commits",),
    "quantization": ("dequantised", "size_of"),
    "language": ("longest_text", "tokenizer"),
    "weights": ("in_full_precision",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
