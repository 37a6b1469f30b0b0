"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from partial_lora.methods.setting import Setting, Training


def lorafa(model: nn.Module, setting: Setting) -> PeftModel:
    """LoRA with A frozen as it was drawn; B alone trains, so that of a module's inputs only A x is kept."""
    adapted = get_peft_model(model, LoraConfig(**setting.lora()))
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return adapted


def training(adapted: PeftModel) -> Training:
    """PEFT's optimizer: AdamW, on the gradient of B that brings B A closest to where the gradient of W would."""
    config = adapted.peft_config["default"]

    def optimizer(learning_rate: float, weight_decay: float):
        return create_lorafa_optimizer(
            adapted, r=config.r, lora_alpha=config.lora_alpha, lr=learning_rate, weight_decay=weight_decay
        )

    return Training(optimizer=optimizer)
