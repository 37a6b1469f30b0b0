"""The families of models, and what each is loaded with: timm's image models, CLIP, text encoders, causal models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from partial_lora.errors import PartialLoraError
from partial_lora.models import images, texts

SETTINGS = (  # the keys of `model` that decide what is loaded
    "name",
    "family",
    "weights",
    "architecture",
    "model_args",
    "image_size",
    "dtype",
    "quantization",
    "attn_implementation",
    "text_weights",
    "text_args",
    "prompts",
)
FAMILIES = {  # and the shapes of each
    "timm": images.empty_timm,
    "clip": images.empty_clip,
    "encoder": texts.empty_encoder,
    "causal": texts.empty_causal,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    *,
    labels: Sequence[str],
    name: str,
    weights: str,
    architecture: str,
    model_args: Mapping | None = None,
    family: str = "timm",
    image_size: int = 224,
    dtype: str = "float32",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    text_weights: str | None = None,
    text_args: Mapping | None = None,
    prompts: Sequence[str] = images.PROMPTS,
) -> PreTrainedModel:
    """A pre-trained model with a head for `labels` (none: one real number), on the CPU, in evaluation mode.

    The settings are those of the config's `model`; `load_timm`, `load_clip`, `load_encoder` and `load_causal` say
    what they mean for each family; a causal model has no head, and no use for labels. All weights, the head's too,
    are of `dtype`, but those that `quantization` is for. Raises PartialLoraError, in one line, where the model
    cannot be had as asked.
    """
    _check(family)
    if dtype not in _DTYPES:
        raise PartialLoraError(f"model.dtype={dtype}: expected one of {', '.join(_DTYPES)}")
    asked = {
        "name": name,
        "weights": weights,
        "architecture": architecture,
        "model_args": dict(model_args or {}),
        "dtype": _DTYPES[dtype],
        "attn_implementation": attn_implementation,
    }
    of_text = {"text_weights": text_weights, "text_args": dict(text_args or {})}
    if quantization is not None and family != "causal":
        raise PartialLoraError(f"model.quantization={quantization}: model.family={family} is not quantised")
    if family == "clip":
        return images.load_clip(**asked, **of_text, labels=list(labels), image_size=image_size, prompts=list(prompts))
    for key, value in of_text.items():
        if value:
            raise PartialLoraError(f"model.{key}={value}: model.family={family} has no text tower; leave it out")
    if family == "causal":
        return texts.load_causal(**asked, quantized=quantization)
    asked["labels"] = list(labels)
    return texts.load_encoder(**asked) if family == "encoder" else images.load_timm(**asked, image_size=image_size)


def empty(
    *, architecture: str, model_args: Mapping | None = None, num_labels: int | None = None, family: str = "timm"
) -> PreTrainedModel:
    """The model's shapes on the meta device: no weights, no memory, no download. `num_labels` is for all but causal.

    Raises PartialLoraError for an architecture or an argument that the family's library does not know.
    """
    return _check(family)(architecture=architecture, model_args=dict(model_args or {}), num_labels=num_labels)


def has_own_head(family: str | Mapping) -> bool:
    """Whether a model of the family (or of these settings) has a head for any task before anything is fitted."""
    family = family if isinstance(family, str) else family.get("family", "timm")
    _check(family)
    return family in ("clip", "causal")


def _check(family: str) -> Callable[..., PreTrainedModel]:
    if family not in FAMILIES:
        raise PartialLoraError(f"model.family={family}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family]


def head_name(model: PreTrainedModel, family: str) -> str:
    """The full name of the linear layer that gives a loaded model's logits."""
    return (texts if family == "encoder" else images).head_name(model)


# --- What a model has learnt, in one number.


def weights_digest(model: nn.Module, exclude: str) -> str:
    """The SHA-256 of what a model has learnt: names, shapes, types and bytes of all parameters and buffers.

    Of quantised weights the scales, too. The module named `exclude` (the head) is left out. Two models of one
    architecture and the same digest compute the same features, so what was found out about one holds for the other.
    """
    digest = hashlib.sha256()
    learnt = dict([*model.named_parameters(), *model.named_buffers()])
    if getattr(model, "quantization_method", None) is not None:
        learnt |= model.state_dict()  # where bitsandbytes puts what its numbers mean
    for name, tensor in sorted(learnt.items()):
        if name.startswith(f"{exclude}."):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- Gradient checkpointing: activations inside a block are computed again in the backward pass instead of kept.


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
