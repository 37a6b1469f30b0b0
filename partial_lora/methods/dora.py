"""DoRA (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from partial_lora.methods.setting import Setting


def dora(model: nn.Module, setting: Setting) -> PeftModel:
    """DoRA, PEFT's own: dense LoRA of the direction of every row of W, and a trained length for each."""
    return get_peft_model(model, LoraConfig(**setting.lora(), use_dora=True))
