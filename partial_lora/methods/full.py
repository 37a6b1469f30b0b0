"""The ceiling, where every weight trains, and the floor, where nothing but the head does."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from partial_lora.errors import PartialLoraError
from partial_lora.methods.setting import Setting


def full(model: nn.Module, setting: Setting) -> PeftModel:
    """Train every weight of the model: an adapter that is a whole copy of it.

    So it is saved, loaded, evaluated and merged like other adapters, by plain PEFT, too; its file is as large as the
    model. Weights that the model ties stay tied. Raises PartialLoraError, "not applicable", for weights that are
    quantised or in a narrow number format, where small steps would be rounded away.
    """
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        raise PartialLoraError(
            "method=full: not applicable: expected float32 weights; set model.dtype=float32 and model.quantization=null"
        )
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    first_name: dict[int, str] = {}
    tied = {}  # {a parameter's name: the first name of the same parameter}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if first_name.setdefault(id(weight), name) != name:
            tied[name] = first_name[id(weight)]
    with warnings.catch_warnings():  # PEFT warns of tied weights, which are tied again below
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=parts))
    base = adapted.get_base_model()
    for part in parts:
        getattr(base, part).original_module = nn.Identity()  # or there would be two models in memory
    for name, first in tied.items():
        holder, _, attribute = _name_in_copy(name).rpartition(".")
        setattr(base.get_submodule(holder), attribute, base.get_parameter(_name_in_copy(first)))
    return adapted


def _name_in_copy(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.modules_to_save.default.{rest}"


def probe(model: nn.Module, setting: Setting) -> PeftModel:
    """Train the head alone: an adapter that adapts no module, so that it is saved and loaded like the others.

    Raises PartialLoraError for a model without a new head, since nothing would train.
    """
    if setting.head is None:
        raise PartialLoraError("method=probe: the model has no new head, so that nothing would train; choose another")
    return get_peft_model(model, LoraConfig(**setting.lora() | {"target_modules": DUMMY_TARGET_MODULES}))
