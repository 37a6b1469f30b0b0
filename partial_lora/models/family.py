"""The families of models, and what each is loaded with: timm's image models, CLIP, text encoders, causal models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from partial_lora.errors import PartialLoraError
from partial_lora.models import causal, clip, encoder, timm

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
FAMILIES = {"timm": timm, "clip": clip, "encoder": encoder, "causal": causal}
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
    prompts: Sequence[str] = clip.PROMPTS,
) -> PreTrainedModel:
    """A pre-trained model with a head for `labels` (none: one real number), on the CPU, in evaluation mode.

    The settings are those of the config's `model`; `timm.load`, `clip.load`, `encoder.load` and `causal.load` say what
    they mean for each family; a causal model has no head, and no use for labels. All weights, the head's too, are of
    `dtype`, but those that `quantization` is for. Raises PartialLoraError, in one line, where the model
    cannot be had as asked.
    """
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
    if quantization is not None and _named(family) is not causal:
        raise PartialLoraError(f"model.quantization={quantization}: model.family={family} is not quantised; use null")
    if _named(family) is clip:
        return clip.load(**asked, **of_text, labels=list(labels), image_size=image_size, prompts=list(prompts))
    for key, value in of_text.items():
        if value:
            raise PartialLoraError(f"model.{key}={value}: model.family={family} has no text tower; leave it out")
    if _named(family) is causal:
        return causal.load(**asked, quantized=quantization)
    asked["labels"] = list(labels)
    return encoder.load(**asked) if family == "encoder" else timm.load(**asked, image_size=image_size)


def empty(
    *, architecture: str, model_args: Mapping | None = None, num_labels: int | None = None, family: str = "timm"
) -> PreTrainedModel:
    """The model's shapes on the meta device: no weights, no memory, no download. `num_labels` is for all but causal.

    Raises PartialLoraError for an architecture or an argument that the family's library does not know.
    """
    found = _named(family)
    return found.empty(architecture=architecture, model_args=dict(model_args or {}), num_labels=num_labels)


def has_own_head(family: str | Mapping) -> bool:
    """Whether a model of the family (or of these settings) has a head for any task before anything is fitted."""
    return _named(family if isinstance(family, str) else family.get("family", "timm")) in (clip, causal)


def _named(family: str):
    if family not in FAMILIES:
        raise PartialLoraError(f"model.family={family}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family]


def head_name(model: PreTrainedModel, family: str) -> str:
    """The full name of the linear layer that gives a loaded model's logits."""
    return (encoder if family == "encoder" else timm).head_name(model)
