"""Gradient checkpointing: activations inside a block are computed again in the backward pass instead of kept."""

from __future__ import annotations

from torch import nn

from partial_lora.errors import PartialLoraError


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only what enters each block for the backward pass; gradients stay what they are.

    Takes a model of any family here, with or without PEFT around it. The variant is the one that is not re-entrant:
    the other gives no gradients where the inputs need none, as those of a frozen first block do. Raises
    PartialLoraError for a model that cannot.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        name = getattr(getattr(base, "config", None), "architecture", type(base).__name__)
        raise PartialLoraError(f"model.gradient_checkpointing=true: {name} cannot do that; set it to false")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
