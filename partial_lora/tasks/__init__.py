"""Data sets: rows with labels, split so that what selects is never what reports."""

from partial_lora.tasks.draws import Draws, few_shot_draws
from partial_lora.tasks.images import ImageTransform
from partial_lora.tasks.task import SETTINGS, SPLITS, Task, load
from partial_lora.tasks.texts import TextTransform

__all__ = ["SETTINGS", "SPLITS", "Draws", "ImageTransform", "Task", "TextTransform", "few_shot_draws", "load"]
