"""A control: does it matter how much each module keeps?"""

from __future__ import annotations

from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.budget import scaled
from partial_lora.calibration.points import AXES
from partial_lora.methods.setting import Setting, calibrated


@calibrated
def uniform(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: one sparsity for every module and axis, with the trainable parameters of `partial`.

    Modules of one shape gain a row or column at the same sparsity; where the budget does not reach for all of them, the
    first in the model's order have one more.
    """
    alike = {module: dict.fromkeys(AXES, 0.5) for module in setting.sparsity}  # any one sparsity: it is scaled
    sparsity = scaled(alike, *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))
