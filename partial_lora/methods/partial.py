"""Partial-LoRA."""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.methods.setting import Setting, calibrated


@calibrated
def partial(model: nn.Module, setting: Setting) -> PeftModel:
    """Partial-LoRA: the calibrated number of rows and columns of each module, drawn at random."""
    config = PartialLoraConfig(**setting.masked(), sparsity=dict(setting.sparsity))
    return get_peft_model(model, config)
