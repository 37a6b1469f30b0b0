"""A control: is a low-rank adapter any better than random entries of the weights themselves?"""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from partial_lora.methods.entries import train_entries
from partial_lora.methods.setting import Setting, calibrated


@calibrated
def random_weights(model: nn.Module, setting: Setting) -> PeftModel:
    """Control: random entries of W itself train, in every module as many as `partial` has parameters there.

    There is no alpha and no dropout. Raises PartialLoraError, "not applicable", where a module has too few weights.
    """
    return train_entries(model, setting.counts(), seed=setting.mask_seed, modules_to_save=setting.whole() or None)
