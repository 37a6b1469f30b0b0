"""The ceiling: every weight trains."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from partial_lora.errors import PartialLoraError
from partial_lora.methods.setting import Setting


def full(model: nn.Module, setting: Setting) -> PeftModel:
    """Every weight of the model trains: an adapter that is a whole copy of it.

    As such it is saved, loaded, evaluated and merged like the others, by plain PEFT, too; its file is as large as the
    model. Weights that the model ties stay tied. Raises PartialLoraError, "not applicable", for weights that are
    quantised or in a narrow number format, where small steps would be rounded away.
    """
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        expected = "expected float32 weights; set model.dtype=float32 and model.quantization=null"
        raise PartialLoraError(f"method=full: not applicable: {expected}")
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    if any(True for _ in model.parameters(recurse=False)):
        raise PartialLoraError(f"method=full: not applicable: {type(model).__name__} has weights of no module")
    tied = _tied(model)
    with warnings.catch_warnings():  # of tied weights, which are seen to below
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=parts))
    base = adapted.get_base_model()
    for part in parts:
        getattr(base, part).original_module = nn.Identity()  # or there would be two models in memory
    for name, first in tied.items():
        _tie(base, name, first)
    return adapted


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one, too: {name: the name it has first}."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return {name: first[id(weight)] for name, weight in named if first.setdefault(id(weight), name) != name}


def _tie(base: nn.Module, name: str, first: str) -> None:
    """Make the copies of two tied weights one again."""
    holder, _, attribute = _copied(name).rpartition(".")
    setattr(base.get_submodule(holder), attribute, base.get_parameter(_copied(first)))


def _copied(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.modules_to_save.default.{rest}"


# --- The floor: nothing but a head.


def probe(model: nn.Module, setting: Setting) -> PeftModel:
    """The head alone: an adapter that adapts no module, so that it is saved and loaded like the others.

    Raises PartialLoraError for a model without a new head, of which nothing would train.
    """
    if setting.head is None:
        raise PartialLoraError("method=probe: the model has no new head, so that nothing would train; choose another")
    return get_peft_model(model, LoraConfig(**setting.lora() | {"target_modules": DUMMY_TARGET_MODULES}))
