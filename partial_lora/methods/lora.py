"""The reference: LoRA as it is."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from partial_lora.methods.setting import Setting


def lora(model: nn.Module, setting: Setting) -> PeftModel:
    """Dense LoRA, PEFT's own."""
    return get_peft_model(model, LoraConfig(**setting.lora()))
