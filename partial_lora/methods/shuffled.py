"""A control: does it matter which module keeps how much?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from peft import PeftModel, get_peft_model
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration.budget import Shapes, scaled
from partial_lora.masks import random_keys
from partial_lora.methods.setting import Setting, Sparsity, calibrated


@calibrated
def shuffled(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: the sparsities of `partial`, dealt out again among modules of the same shape, at its parameters."""
    given = permuted(setting.sparsity, setting.shapes, setting.mask_seed)
    sparsity = scaled(given, *setting.units(), setting.budget())
    return get_peft_model(model, PartialLoraConfig(**setting.masked(), sparsity=sparsity))


def permuted(sparsity: Sparsity, shapes: Shapes, seed: int) -> dict[str, Mapping[str, float]]:
    """The sparsities of both axes in a random order, drawn by the seed, among modules of the same shape (out, in).

    A module that is the only one of its shape keeps its own, and any other may: one of its shape, on average.
    """
    found = {}
    for shape in dict.fromkeys(shapes[module] for module in sparsity):
        alike = [module for module in sparsity if shapes[module] == shape]
        keys = random_keys(len(alike), mask_seed=seed, module=f"{shape[0]}x{shape[1]}", axis="modules")
        found |= {module: sparsity[alike[other]] for module, other in zip(alike, np.argsort(keys), strict=True)}
    return {module: found[module] for module in sparsity}
