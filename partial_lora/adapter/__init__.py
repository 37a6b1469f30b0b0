"""Partial-LoRA as a PEFT method: low-rank adapters that hold only the kept rows of B and columns of A.

Importing this package registers the method with PEFT, so that ``get_peft_model(model, PartialLoraConfig(...))`` works.
"""

from partial_lora.adapter.compact import load_compact, read_compact, write_compact
from partial_lora.adapter.config import PEFT_TYPE, PartialLoraConfig
from partial_lora.adapter.model import PartialLoraModel, module_masks, module_sparsity, register, trainable_parameters
from partial_lora.adapter.selection import ModuleMasks
from partial_lora.adapter.warm_start import warm_start

__all__ = [
    "PEFT_TYPE",
    "ModuleMasks",
    "PartialLoraConfig",
    "PartialLoraModel",
    "load_compact",
    "module_masks",
    "module_sparsity",
    "read_compact",
    "trainable_parameters",
    "warm_start",
    "write_compact",
]

register()
