"""Partial-LoRA as a PEFT method: low-rank adapters that hold only the kept rows of B and columns of A.

Importing this package registers the method with PEFT, so that ``get_peft_model(model, PartialLoraConfig(...))`` works.
"""

from partial_lora.adapter.config import PEFT_TYPE, PartialLoraConfig
from partial_lora.adapter.model import PartialLoraModel, module_masks, module_sparsity, register, trainable_parameters
from partial_lora.adapter.selection import ModuleMasks

__all__ = [
    "PEFT_TYPE",
    "ModuleMasks",
    "PartialLoraConfig",
    "PartialLoraModel",
    "module_masks",
    "module_sparsity",
    "trainable_parameters",
]

register()
