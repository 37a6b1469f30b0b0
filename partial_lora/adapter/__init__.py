"""Partial-LoRA as a PEFT method: low-rank adapters that hold only the kept rows of B and columns of A.

Importing this package registers the method with PEFT, so that ``get_peft_model(model, PartialLoraConfig(...))`` works.
"""

from importlib.metadata import version

from partial_lora.errors import UnfitPackageError

PEFT = "peft>=0.21,<0.22"  # as in pyproject.toml: the adapter uses much of PEFT that is not public API

try:
    from partial_lora.adapter.compact import load_compact, write_compact
    from partial_lora.adapter.config import PEFT_TYPE, PartialLoraConfig
    from partial_lora.adapter.model import PartialLoraModel, module_masks, module_sparsity
    from partial_lora.adapter.registration import register
    from partial_lora.adapter.selection import ModuleMasks
    from partial_lora.adapter.warm_start import warm_start

    register()
except (ImportError, AttributeError) as error:
    if isinstance(error, ImportError) and not (error.name or "").startswith("peft"):
        raise
    raise UnfitPackageError(
        f"peft {version('peft')} lacks what the adapter needs ({error}): pip install '{PEFT}'"
    ) from None

__all__ = [
    "PEFT_TYPE",
    "ModuleMasks",
    "PartialLoraConfig",
    "PartialLoraModel",
    "load_compact",
    "module_masks",
    "module_sparsity",
    "warm_start",
    "write_compact",
]
