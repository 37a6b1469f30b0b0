"""Partial-LoRA."""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.masks import Mask
from partial_lora.methods.setting import Setting, calibrated


@calibrated
def partial(model: nn.Module, setting: Setting) -> PeftModel:
    """Partial-LoRA: the calibrated number of rows and columns of each module, drawn at random."""
    config = PartialLoraConfig(**setting.masked(), sparsity=dict(setting.sparsity))
    return get_peft_model(model, config)


# --- Targeted-LoRA, the paper's other method.


@calibrated
def targeted(model: nn.Module, setting: Setting) -> PeftModel:
    """Targeted-LoRA: the calibrated number of rows and columns of each module, the most important ones."""
    indices = {}
    for module, axes in setting.sparsity.items():
        scores = dict(zip(("rows", "columns"), setting.scores[module], strict=True))
        indices[module] = {axis: Mask.top(scores[axis].cpu().numpy(), axes[axis]).kept.tolist() for axis in scores}
    config = PartialLoraConfig(
        **setting.lora(), sparsity=dict(setting.sparsity), selection="top", indices=indices, mask_seed=setting.mask_seed
    )
    return get_peft_model(model, config)
