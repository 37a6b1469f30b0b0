"""Data sets: rows with labels, split so that what selects is never what reports."""

from partial_lora.tasks.answers import final_number
from partial_lora.tasks.causal import CausalTransform
from partial_lora.tasks.draws import Draws, drawn_from, few_shot_draws
from partial_lora.tasks.images import ImageTransform
from partial_lora.tasks.mixture import Joined, Mixture, MixtureTransform, member_draws, mixed
from partial_lora.tasks.task import SETTINGS, SPLITS, Task, load
from partial_lora.tasks.texts import TextTransform

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
