"""A control: what if the modules keep most that calibration lets keep least?"""

from __future__ import annotations

import numpy as np
from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.budget import scaled
from partial_lora.calibration.points import AXES
from partial_lora.methods.setting import Setting, Sparsity, calibrated


@calibrated
def inverted(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: the densities of `partial` in reverse order over the modules, scaled to its trainable parameters."""
    sparsity = scaled(reversed_ranks(setting.sparsity), *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))


def reversed_ranks(sparsity: Sparsity) -> dict[str, dict[str, float]]:
    """On each axis, the highest of all modules' sparsities for the module that has the lowest, and so on.

    Modules that were equal stay equal: they share the mean of what their ranks would get.
    """
    found: dict[str, dict[str, float]] = {module: {} for module in sparsity}
    for axis in AXES:
        values = np.array([axes[axis] for axes in sparsity.values()])
        order = np.argsort(values, kind="stable")
        given = np.empty_like(values)
        given[order] = values[order][::-1]
        for value in np.unique(values):
            given[values == value] = given[values == value].mean()
        for module, share in zip(sparsity, given, strict=True):
            found[module][axis] = float(share)
    return found
