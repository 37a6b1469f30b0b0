"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454)."""

from __future__ import annotations

from peft import PeftModel, VeraConfig, get_peft_model
from torch import nn

from partial_lora.methods.setting import Setting


def vera(model: nn.Module, setting: Setting) -> PeftModel:
    """VeRA, PEFT's own: all modules share two frozen random matrices, and each trains two vectors that scale them.

    The rank is `setting.projections`; modules smaller than the largest use a part of the matrices. They are in the
    adapter's file, so that it loads everywhere as it was. There is no alpha: the vectors have its part.
    """
    config = VeraConfig(
        r=setting.projections,
        target_modules=list(setting.target_modules),
        vera_dropout=setting.dropout,
        projection_prng_key=setting.mask_seed,
        modules_to_save=setting.whole() or None,
    )
    return get_peft_model(model, config)
