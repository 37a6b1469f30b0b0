"""Settings for methods on tiny models, with sparsities as a calibration could have chosen them."""

from __future__ import annotations

import dataclasses
import random

import torch
from configured import load, settings

from partial_lora import methods
from partial_lora.methods.config import MaskConfig, MethodConfig
from partial_lora.methods.setting import Setting
from partial_lora.models.targets import target_linears

TUNERS = {  # of PEFT, with names of their own
    "dora": {"peft_type": "LORA", "peft": {"use_dora": True}},
    "vera": {"peft_type": "VERA", "peft": {"r": 16}},
}


def drawn_sparsity(shapes: dict, seed: int, high: float = 0.95) -> dict:
    """Sparsities in steps of 0.05 for every module and axis."""
    drawn = random.Random(seed)
    steps = round(high * 20)
    return {module: {axis: drawn.randrange(steps + 1) / 20 for axis in ("rows", "columns")} for module in shapes}


def setting_of(name: str, model, *, seed: int = 0, high: float = 0.95, **changes) -> Setting:
    """What a run gives a method for the model of a group file."""
    chosen = settings(name)
    named = {key: chosen.get(key, ()) for key in ("target_modules", "head", "new_modules")}
    linears = target_linears(model, **named)
    shapes = {module: tuple(linear.weight.shape) for module, linear in linears.items()}
    drawn = torch.Generator().manual_seed(seed)
    scores = {module: tuple(torch.rand(size, generator=drawn) for size in shape) for module, shape in shapes.items()}
    of_method = {"name": "peft"} if "peft_type" in changes else {}
    of_method |= {"rank": 4, "alpha": 8.0} | of(MethodConfig, changes)
    given = {
        "method": MethodConfig(**of_method),
        "mask": MaskConfig(**of(MaskConfig, changes)),
        "mask_seed": seed,
        "shapes": shapes,
        "sparsity": drawn_sparsity(shapes, seed, high),
        "scores": scores,
    }
    return Setting(**named, **given | changes)


def of(kind: type, changes: dict) -> dict:
    """Take the fields of a dataclass out of changes."""
    return {field.name: changes.pop(field.name) for field in dataclasses.fields(kind) if field.name in changes}


def adapted(method: str, name: str, **changes):
    """The model of a group file as a method adapts it, and the setting."""
    model, changes = load(name), TUNERS.get(method, {}) | changes
    traits = methods.called(method)
    masks = {key: getattr(traits, key)[0] for key in ("granularity", "rows", "columns") if getattr(traits, key)}
    setting = setting_of(name, model, **masks | changes)
    torch.manual_seed(0)
    return traits(model, setting), setting
