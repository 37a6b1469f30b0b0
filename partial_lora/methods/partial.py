"""Partial-LoRA, the paper's other method, Targeted-LoRA, and the form of mask that needs no calibration."""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.budget import even_sparsity, masked_units
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


def entries(model: nn.Module, setting: Setting) -> PeftModel:
    """Train single entries of A and B, drawn at random, the same share of every factor. Nothing is calibrated.

    In Python it is `PartialLoraConfig(granularity="element", sparsity=0.87)`; here the budget is spent to the last
    entry, so that the first factors may have one more.
    """
    single = masked_units(setting.shapes, setting.rank, "element")
    masked = setting.masked() | {"granularity": "element", "sparsity": even_sparsity(*single, setting.budget())}
    return get_peft_model(model, PartialLoraConfig(**masked))
