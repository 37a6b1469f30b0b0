"""Tasks: rows with labels, in splits that keep selecting apart from reporting, and their conversion to inputs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Imported on first use, so that a report can read the rows of a task without torch.
_MODULES = {
    "image_inputs": ("ImageTransform",),
    "metrics": ("final_number",),
    "mixture": ("Joined", "Mixture", "MixtureTransform", "member_draws", "mix"),
    "prompt_inputs": ("CausalTransform", "ChoiceTransform"),
    "splits": ("Draws", "few_shot_draws", "shared_inputs", "strata"),
    "task": ("SPLITS", "Task", "load"),
    "text_inputs": ("TextTransform",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
