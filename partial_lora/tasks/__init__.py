"""Tasks: rows with labels, in splits that keep selecting apart from reporting, and their conversion to inputs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partial_lora.tasks.images import ImageTransform
    from partial_lora.tasks.metrics import final_number
    from partial_lora.tasks.mixture import Joined, Mixture, MixtureTransform, member_draws, mix
    from partial_lora.tasks.prompts import CausalTransform, ChoiceTransform
    from partial_lora.tasks.splits import Draws, few_shot_draws, shared_inputs, strata
    from partial_lora.tasks.task import SPLITS, Task, load
    from partial_lora.tasks.texts import TextTransform

# Imported on first use, so that a report can read the rows of a task without torch.
_MODULES = {
    "images": ("ImageTransform",),
    "metrics": ("final_number",),
    "mixture": ("Joined", "Mixture", "MixtureTransform", "member_draws", "mix"),
    "prompts": ("CausalTransform", "ChoiceTransform"),
    "splits": ("Draws", "few_shot_draws", "shared_inputs", "strata"),
    "task": ("SPLITS", "Task", "load"),
    "texts": ("TextTransform",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "SPLITS",
    "CausalTransform",
    "ChoiceTransform",
    "Draws",
    "ImageTransform",
    "Joined",
    "Mixture",
    "MixtureTransform",
    "Task",
    "TextTransform",
    "few_shot_draws",
    "final_number",
    "load",
    "member_draws",
    "mix",
    "shared_inputs",
    "strata",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
