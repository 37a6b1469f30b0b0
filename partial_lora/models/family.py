"""One door to all families of models: image models of timm and transformers, CLIP, text encoders, language models.

`families` in tasks/kinds.py says which answer a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from partial_lora.errors import PartialLoraError
from partial_lora.models import language, vision
from partial_lora.models.config import ModelConfig
from partial_lora.models.weights import AUTO, Geometry

LOAD = {
    "timm": vision.load_timm,
    "image": vision.load_image,
    "clip": vision.load_clip,
    "encoder": language.load_classifier,
    "causal": language.load_causal,
}


def load(model: ModelConfig, labels: Sequence[str]) -> PreTrainedModel:
    """Load a pre-trained model with a head for the labels (none: one real number), on the CPU, in evaluation mode.

    `load_timm`, `load_image`, `load_clip`, `load_classifier` and `load_causal` explain what each family takes of the
    settings. A causal model gets no new head and ignores labels. All weights but the quantised ones have `model.dtype`,
    the head's too. Raises PartialLoraError, in one line, where the model cannot be had.
    """
    return LOAD[model.family](model, labels)


def empty(
    *, architecture: str, model_args: Mapping | None = None, num_labels: int | None = None, family: str = "timm"
) -> PreTrainedModel:
    """Return the model's shapes on the meta device: no weights, no memory, no download. Causal models have no labels.

    Raises PartialLoraError for an architecture or an argument that the family's library does not know.
    """
    args = dict(model_args or {})
    if family not in AUTO:
        return vision.empty_timm(architecture=architecture, model_args=args, num_labels=num_labels)
    return Geometry(family, architecture, args, {} if family == "causal" else {"num_labels": num_labels}).empty()


def head_name(model: PreTrainedModel, family: str) -> str:
    """Return the full name of the linear layer that gives a loaded model's logits."""
    return (language if family in AUTO else vision).head_name(model)


def weights_digest(model: nn.Module, exclude: str) -> str:
    """Return the SHA-256 of names, shapes, types and bytes of all parameters and buffers, and of quantised scales.

    The module named `exclude` (the head) is left out. Two models of one architecture and digest compute the same
    features, so that a calibration of one holds for the other.
    """
    digest = hashlib.sha256()
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if getattr(model, "quantization_method", None) is not None:
        tensors |= model.state_dict()  # where bitsandbytes puts the scales
    for name, tensor in sorted(tensors.items()):
        if name.startswith(f"{exclude}."):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Save only the inputs of each block for the backward pass, and compute the rest again; gradients stay the same.

    Takes a model of any family, with or without PEFT around it. Uses the variant that is not re-entrant: the other
    gives no gradients where a block's inputs need none, as in a frozen first block. Raises PartialLoraError for a model
    that does not support it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        name = getattr(getattr(base, "config", None), "architecture", type(base).__name__)
        raise PartialLoraError(f"model.gradient_checkpointing=true: {name} does not support it; set it to false")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
