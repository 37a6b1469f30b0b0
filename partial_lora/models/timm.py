"""Any of timm's image models as transformers' TimmWrapper, which PEFT and Trainer both take.

Names in such a model start with `timm_model.`. Everything but the head is pre-trained; the head is new for every task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from partial_lora.errors import PartialLoraError
from partial_lora.models import heads
from partial_lora.models.checkpoint import check_architecture, pretrained, quiet
from partial_lora.models.heads import own_generator
from partial_lora.models.source import RANDOM, folder_of, name_after


def load(
    *,
    name: str,
    weights: str,
    architecture: str,
    model_args: dict,
    labels: Sequence[str],
    image_size: int,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> TimmWrapperForImageClassification:
    """The pre-trained model with a new head for `labels`, on the CPU, in evaluation mode.

    `weights` is bundled:NAME, a repository of the model hub, a folder in the same format, or random. Random weights are
    the same in every run, as pre-trained ones are. The head is drawn from torch's global generator as the caller left
    it, and building the rest moves that generator nowhere. attn_implementation: sdpa for torch's fused attention, eager
    for the formula; None leaves it to timm. Raises PartialLoraError where the weights cannot be had, where they leave
    a parameter unfilled, and where images of `image_size` pixels do not fit.
    """
    classes = heads.outputs(labels, name)
    model = headless(
        name=name,
        weights=weights,
        architecture=architecture,
        model_args=model_args,
        classes=classes,
        image_size=image_size,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    heads.draw(model.get_submodule(head_name(model)), std=model.config.initializer_range)
    return model.eval()


def headless(
    *,
    name: str,
    weights: str,
    architecture: str,
    model_args: dict,
    classes: dict[str, object],
    image_size: int,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> TimmWrapperForImageClassification:
    """The pre-trained model with a head whose numbers mean nothing yet; the caller's generator is left as it was.

    classes: what `heads.outputs` says of them; the others as in `load`.
    """
    shapes = empty(architecture=architecture, model_args=model_args, num_labels=classes["num_labels"])
    check_image_size(shapes, name=name, image_size=image_size)  # before anything is downloaded
    _set_attention(shapes, attn_implementation)
    with own_generator():
        if weights == RANDOM:
            config = TimmWrapperConfig(architecture=architecture, model_args=dict(model_args), **classes)
            model = TimmWrapperForImageClassification(config).to(dtype)
        else:
            folder = folder_of(weights, name)
            with quiet():
                config = TimmWrapperConfig.from_pretrained(folder, **classes)
            check_architecture(architecture, config.architecture, weights)
            vars(config).pop("label_names", None)  # the classes the weights came with; a saved copy would name them
            config.model_args = {**(config.model_args or {}), **model_args}
            model = pretrained(
                TimmWrapperForImageClassification.from_pretrained,
                folder,
                config,
                name=name,
                weights=weights,
                dtype=dtype,
                may_be_new=lambda model, key: key.startswith(f"{head_name(model)}."),
            )
            name_after(model, weights)
    _set_attention(model, attn_implementation)
    return model


def empty(*, architecture: str, model_args: dict, num_labels: int) -> TimmWrapperForImageClassification:
    """The model's shapes on the meta device: no weights, no memory, no download.

    Raises PartialLoraError for an architecture or an argument that timm does not know.
    """
    try:
        config = TimmWrapperConfig(architecture=architecture, model_args=dict(model_args), num_labels=num_labels)
        with torch.device("meta"):
            return TimmWrapperForImageClassification(config)
    except ImportError as error:
        raise PartialLoraError(
            f"model.architecture={architecture}: timm has no such model; `timm.list_models()` lists what it has"
        ) from error
    except TypeError as error:
        raise PartialLoraError(
            f"model.model_args={model_args}: {architecture} takes none of that name ({error})"
        ) from error
    except (ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PartialLoraError(f"model.model_args={model_args}: no geometry of {architecture} ({reason})") from error


def check_image_size(model: TimmWrapperForImageClassification, *, name: str, image_size: int) -> None:
    """Raise PartialLoraError where images of `image_size` pixels do not fit the model's grid of patches."""
    patches = getattr(model.timm_model, "patch_embed", None)
    patch_size, native_size = getattr(patches, "patch_size", None), getattr(patches, "img_size", None)
    if patch_size is None:  # a convolutional network has no grid to fit
        return
    if getattr(patches, "strict_img_size", True) and native_size and image_size != native_size[0]:
        raise PartialLoraError(
            f"model.image_size={image_size}: model={name} takes images of {native_size[0]} pixels only, unless "
            "model.model_args has dynamic_img_size: true"
        )
    if image_size % patch_size[0] and not getattr(patches, "dynamic_img_pad", False):
        raise PartialLoraError(
            f"model.image_size={image_size}: expected a multiple of {patch_size[0]}, the patch size of model={name}"
        )


def head_name(model: TimmWrapperForImageClassification) -> str:
    """The full name of the one linear layer that gives the logits."""
    classifier = model.timm_model.get_classifier()
    for name, module in model.named_modules():
        if module is classifier and isinstance(module, nn.Linear):
            return name
    kind = type(classifier).__name__
    raise PartialLoraError(
        f"model.architecture={model.config.architecture}: expected one linear classifier, not {kind}"
    )


def _set_attention(model: TimmWrapperForImageClassification, implementation: str | None) -> None:
    """Choose how attention is computed; timm asks each attention module, and transformers' switch does not reach it."""
    if implementation is None:
        return
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if implementation not in ("eager", "sdpa") or not attentions:
        has = "takes eager or sdpa" if attentions else "has no attention to choose; set it to null"
        raise PartialLoraError(f"model.attn_implementation={implementation}: {model.config.architecture} {has}")
    for module in attentions:
        module.fused_attn = implementation == "sdpa"
