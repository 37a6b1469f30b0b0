"""Partial-LoRA, and the paper's other method, Targeted-LoRA."""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.search import AXES
from partial_lora.masks import Mask
from partial_lora.methods.setting import Setting, calibrated


@calibrated
def partial(model: nn.Module, setting: Setting) -> PeftModel:
    """Partial-LoRA: the calibrated number of rows and columns of each module, drawn at random."""
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=dict(setting.sparsity)))


@calibrated
def targeted(model: nn.Module, setting: Setting) -> PeftModel:
    """Targeted-LoRA: the calibrated number of rows and columns of each module, the most important ones."""
    indices = {
        module: {
            axis: Mask.top(scores.cpu().numpy(), sparsity[axis]).kept.tolist()
            for axis, scores in zip(AXES, setting.scores[module], strict=True)
        }
        for module, sparsity in setting.sparsity.items()
    }
    config = PartialLoraConfig(**setting.masked(), sparsity=dict(setting.sparsity), selection="top", indices=indices)
    return get_peft_model(model, config)
