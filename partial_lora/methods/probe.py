"""The floor: nothing but a head."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from partial_lora.errors import PartialLoraError
from partial_lora.methods.setting import Setting


def probe(model: nn.Module, setting: Setting) -> PeftModel:
    """The head alone: an adapter that adapts no module, so that it is saved and loaded like the others.

    Raises PartialLoraError for a model without a new head, of which nothing would train.
    """
    if setting.head is None:
        raise PartialLoraError("method=probe: the model has no new head, so that nothing would train; choose another")
    return get_peft_model(model, LoraConfig(**setting.lora() | {"target_modules": DUMMY_TARGET_MODULES}))
