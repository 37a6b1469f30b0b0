"""Data sets: rows with labels, split so that what selects is never what reports."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partial_lora.tasks.images import ImageTransform
    from partial_lora.tasks.mixture import Joined, Mixture, MixtureTransform, member_draws, mixed
    from partial_lora.tasks.prompts import CausalTransform
    from partial_lora.tasks.questions import final_number
    from partial_lora.tasks.splits import Draws, drawn_from, few_shot_draws
    from partial_lora.tasks.task import SETTINGS, SPLITS, Task, load
    from partial_lora.tasks.texts import TextTransform

# Resolved on first use, so that a report can read the rows of a task without torch.
_PLACES = {
    "images": ("ImageTransform",),
    "mixture": ("Joined", "Mixture", "MixtureTransform", "member_draws", "mixed"),
    "prompts": ("CausalTransform",),
    "questions": ("final_number",),
    "splits": ("Draws", "drawn_from", "few_shot_draws"),
    "task": ("SETTINGS", "SPLITS", "Task", "load"),
    "texts": ("TextTransform",),
}
_PUBLIC = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "SETTINGS",
    "SPLITS",
    "CausalTransform",
    "Draws",
    "ImageTransform",
    "Joined",
    "Mixture",
    "MixtureTransform",
    "Task",
    "TextTransform",
    "drawn_from",
    "few_shot_draws",
    "final_number",
    "load",
    "member_draws",
    "mixed",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
