"""Data sets: rows with labels, split so that what selects is never what reports."""

from partial_lora.tasks.draws import Draws, few_shot_draws
from partial_lora.tasks.images import SETTINGS, ImageTransform, Task, load

__all__ = ["SETTINGS", "Draws", "ImageTransform", "Task", "few_shot_draws", "load"]
