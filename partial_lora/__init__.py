"""Partial-LoRA: low-rank adapters of which only a random subset of rows and columns exists and trains."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partial_lora.adapter import PartialLoraConfig, PartialLoraModel, load_compact, warm_start, write_compact
    from partial_lora.building.rate_in_python import learning_rate
    from partial_lora.calibration.calibrate import calibrate
    from partial_lora.calibration.result import Calibration
    from partial_lora.errors import PartialLoraError
    from partial_lora.finished.predict import Predictor

    __version__: str

# PEFT imports bitsandbytes whatever a model is made of, which on some processors advises to install kernels of the hub.
# Only packed weights need them, and weights are never packed here (models/quantization.py, `keep_gradients`).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)

# Resolved on first use, so that `partial-lora --help` does not import torch.
_PUBLIC = {
    "Calibration": "calibration.result",
    "PartialLoraConfig": "adapter",
    "PartialLoraError": "errors",
    "PartialLoraModel": "adapter",
    "Predictor": "finished.predict",
    "calibrate": "calibration.calibrate",
    "learning_rate": "building.rate_in_python",
    "load_compact": "adapter",
    "warm_start": "adapter",
    "write_compact": "adapter",
}

__all__ = [
    "Calibration",
    "PartialLoraConfig",
    "PartialLoraError",
    "PartialLoraModel",
    "Predictor",
    "calibrate",
    "learning_rate",
    "load_compact",
    "warm_start",
    "write_compact",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("partial-lora")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
