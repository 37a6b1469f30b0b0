"""Any of timm's image models as transformers' TimmWrapper, which PEFT and Trainer both take.

Names in such a model start with `timm_model.`. Everything but the head is pre-trained; the head is new for every task
and, since every method has to start from the same one, depends on the caller's seed and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import logging as transformers_logging

from partial_lora.errors import PartialLoraError
from partial_lora.models import bundled, hub

RANDOM = "random"


def load(
    *, name: str, weights: str, architecture: str, model_args: dict, labels: list[str], image_size: int
) -> TimmWrapperForImageClassification:
    """The pre-trained model with a new head for `labels`, in fp32 on the CPU, in evaluation mode.

    `weights` is bundled:NAME, a repository of the model hub, a folder in the same format, or random. Random weights are
    the same in every run, as pre-trained ones are. The head is drawn from torch's global generator as the caller left
    it, and building the rest moves that generator nowhere. Raises PartialLoraError where the weights cannot be had,
    where they leave a parameter unfilled, and where images of `image_size` pixels do not fit.
    """
    if len(labels) < 2:
        raise PartialLoraError(f"model={name}: expected at least two labels to tell apart, got {labels}")
    shapes = empty(architecture=architecture, model_args=model_args, num_labels=len(labels))
    check_image_size(shapes, name=name, image_size=image_size)  # before anything is downloaded
    classes = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    with _own_generator():
        if weights == RANDOM:
            config = TimmWrapperConfig(architecture=architecture, model_args=dict(model_args), **classes)
            model = TimmWrapperForImageClassification(config)
        else:
            folder = _folder(weights, name)
            config = TimmWrapperConfig.from_pretrained(folder, **classes)
            if config.architecture != architecture:
                raise PartialLoraError(
                    f"model.architecture={architecture}: {weights} is a {config.architecture}; set that, so that "
                    "parameters are counted for the model that trains"
                )
            vars(config).pop("label_names", None)  # the classes the weights came with; a saved copy would name them
            config.model_args = {**(config.model_args or {}), **model_args}
            model = _pretrained(folder, config, name=name, weights=weights)
            if not weights.startswith(bundled.PREFIX):  # a saved adapter names its base: a repository, not our cache
                model.name_or_path = model.config.name_or_path = weights
    _draw_head(model)
    return model.eval()


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


def weights_digest(model: nn.Module, exclude: str) -> str:
    """The SHA-256 of what a model has learnt: names, shapes, types and bytes of all parameters and buffers.

    The module named `exclude` (the head) is left out. Two models of one architecture and the same digest compute the
    same features, so what was found out about one holds for the other.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if name.startswith(f"{exclude}."):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _folder(weights: str, name: str) -> Path:
    if weights.startswith(bundled.PREFIX):
        return bundled.fetch_model(weights.removeprefix(bundled.PREFIX))
    return Path(weights) if Path(weights).is_dir() else hub.fetch_model(weights, name=name)


def _pretrained(
    folder: Path, config: TimmWrapperConfig, *, name: str, weights: str
) -> TimmWrapperForImageClassification:
    """The model with the folder's weights; every parameter outside the head must be there, in its shape."""
    try:
        with _quiet():
            model, report = TimmWrapperForImageClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the head was made for other classes; the rest is checked below
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"model={name}: cannot read the weights in {folder} ({reason[:160]})") from error
    head = head_name(model)
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for problem, keys in (("missing", report["missing_keys"]), ("of another shape", mismatched)):
        unfilled = sorted(key for key in keys if not key.startswith(f"{head}."))
        if unfilled:
            raise PartialLoraError(
                f"model={name}: {unfilled[0]} is {problem} in {weights} ({len(unfilled)} such weights); "
                "model.architecture and model.model_args must be those of the weights"
            )
    return model


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


def _draw_head(model: TimmWrapperForImageClassification) -> None:
    head = model.get_submodule(head_name(model))
    nn.init.normal_(head.weight, std=model.config.initializer_range)  # as transformers draws a new classifier
    if head.bias is not None:
        nn.init.zeros_(head.bias)


@contextmanager
def _own_generator() -> Iterator[None]:
    """Draw from a fixed seed for a while, and leave torch's global CPU generator as it was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the accelerators too
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of the new head, which is meant to be new."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
