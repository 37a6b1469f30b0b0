"""Pre-trained models, each loaded whole and checked, with a new head for the task."""

from partial_lora.models.timm import empty, load, weights_digest

__all__ = ["empty", "load", "weights_digest"]
