"""Image models of timm as transformers' TimmWrapper, which PEFT and Trainer both take, and CLIP as one of them.

Names in such a model start with `timm_model.`. Everything but the head is pre-trained. The head is new for every task;
CLIP's head is its zero-shot classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import transformers  # not its classes: it imports each on first use, TimmWrapper with all of timm
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.models import weights
from partial_lora.models.config import ModelConfig
from partial_lora.models.fetch import RANDOM, folder_of, name_after
from partial_lora.models.language import VOCABULARY, byte_tokenizer, load_classifier, tokenizer_in

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedModel, PreTrainedTokenizerBase, TimmWrapperForImageClassification


def load_timm(model: ModelConfig, labels: Sequence[str]) -> TimmWrapperForImageClassification:
    """Load the pre-trained model with a new head for `labels`, on the CPU, in evaluation mode.

    `model.weights` is bundled:NAME, a repository of the model hub, a folder in the same format, or random. Random
    weights are the same in every run, as pre-trained ones are. The head alone is drawn from torch's global generator,
    which the rest leaves as it was. `model.attn_implementation`: sdpa for torch's fused attention, eager for the
    formula; None leaves it to timm. Raises PartialLoraError where the weights cannot be had, where they leave a
    parameter unfilled, and where images of `model.image_size` pixels do not fit.
    """
    loaded = _load(model, weights.head_config(labels, model.name))
    weights.draw_head(loaded.get_submodule(head_name(loaded)), std=loaded.config.initializer_range)
    return loaded.eval()


def _load(model: ModelConfig, head: dict[str, object]) -> TimmWrapperForImageClassification:
    """Load the model with a head that is still to be filled; the caller's generator is left as it was."""
    architecture = model.architecture
    shapes = empty_timm(architecture=architecture, model_args=model.model_args, num_labels=head["num_labels"])
    _check_image_size(shapes, model.name, model.image_size)  # before anything is downloaded
    _set_attention(shapes, model.attn_implementation)
    with weights.fixed_seed(), _Undrawn():
        if model.weights == RANDOM:
            config = transformers.TimmWrapperConfig(
                architecture=architecture, model_args=dict(model.model_args), **head
            )
            loaded = transformers.TimmWrapperForImageClassification(config).to(getattr(torch, model.dtype))
        else:
            folder = folder_of(model.weights, model.name)
            with weights.quiet():
                config = transformers.TimmWrapperConfig.from_pretrained(folder, **head)
            weights.check_architecture(architecture, config.architecture, model.weights)
            vars(config).pop("label_names", None)  # the weights' own classes, which a saved copy would name
            config.model_args = {**(config.model_args or {}), **model.model_args}
            config.model_args.pop("num_classes", None)  # the head's size is num_labels
            loaded = weights.load_weights(
                transformers.TimmWrapperForImageClassification,
                folder,
                config,
                model,
                may_be_new=lambda loaded, key: key.startswith(f"{head_name(loaded)}."),
            )
            name_after(loaded, model.weights)
    _set_attention(loaded, model.attn_implementation)
    return loaded


def load_image(model: ModelConfig, labels: Sequence[str]) -> PreTrainedModel:
    """Load an image model of transformers' own with a new head, as `load_classifier` loads one of texts.

    Raises PartialLoraError for images of a size that the model does not take.
    """
    geometry = weights.Geometry("image", model.architecture, model.model_args, weights.head_config(labels, model.name))
    shapes, size = geometry.empty(), model.image_size
    try:
        shapes(pixel_values=torch.empty(1, 3, size, size, device="meta"))
    except (ValueError, RuntimeError) as error:
        raise PartialLoraError(f"model.image_size={size}: model={model.name} {one_line(error)}") from error
    return load_classifier(model, labels)


class _Undrawn(TorchFunctionMode):
    """Draws nothing for weights on the meta device, which hold no numbers: timm's draws would take half of a load."""

    _DRAWS = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._DRAWS and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


def empty_timm(*, architecture: str, model_args: dict, num_labels: int) -> TimmWrapperForImageClassification:
    """Return the model's shapes on the meta device: no weights, no memory, no download.

    Raises PartialLoraError for an architecture or an argument that timm does not know.
    """
    try:
        config = transformers.TimmWrapperConfig(
            architecture=architecture, model_args=dict(model_args), num_labels=num_labels
        )
        with torch.device("meta"), _Undrawn():
            return transformers.TimmWrapperForImageClassification(config)
    except ImportError as error:
        raise PartialLoraError(
            f"model.architecture={architecture}: timm has no such model; `timm.list_models()` lists what it has"
        ) from error
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError) as error:
        raise PartialLoraError(f"model.model_args={model_args}: not of {architecture} ({one_line(error)})") from error


def _check_image_size(model: TimmWrapperForImageClassification, name: str, image_size: int) -> None:
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
    """Return the full name of the one linear layer that gives the logits."""
    classifier = model.timm_model.get_classifier()
    for name, module in model.named_modules():
        if module is classifier and isinstance(module, nn.Linear):
            return name
    kind = type(classifier).__name__
    raise PartialLoraError(
        f"model.architecture={model.config.architecture}: expected one linear classifier, not {kind}"
    )


def _set_attention(model: TimmWrapperForImageClassification, implementation: str | None) -> None:
    """Choose how attention is computed, in each attention module of timm: transformers' switch does not reach them."""
    if implementation is None:
        return
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if implementation not in ("eager", "sdpa") or not attentions:
        has = "takes eager or sdpa" if attentions else "has no attention to choose; set it to null"
        raise PartialLoraError(f"model.attn_implementation={implementation}: {model.config.architecture} {has}")
    for module in attentions:
        module.fused_attn = implementation == "sdpa"


# --- The image tower of CLIP as a classifier whose head is CLIP's zero-shot classifier.

_BATCH = 64  # descriptions that are embedded at once


def load_clip(model: ModelConfig, labels: Sequence[str]) -> TimmWrapperForImageClassification:
    """Load CLIP's image tower with the zero-shot head for `labels`; the caller's generator is left as it was.

    `model.weights`: the image tower, in timm's format. `model.text_weights`: the CLIP it belongs to, in transformers'
    format (text tower, projections, tokenizer): a repository of the hub, a folder, or random with the geometry
    `model.text_args`. `model.prompts`: descriptions of a class, with {} for its name. Raises PartialLoraError as
    `load_timm` does, for a task without classes, and where the two weights are not of one CLIP.
    """
    if not labels:
        raise PartialLoraError(f"model={model.name}: a zero-shot head needs classes with names, and the task has none")
    tower = _load(model, weights.head_config(labels, model.name))
    head = tower.get_submodule(head_name(tower))
    clip, tokenizer = _whole_clip(model, width=head.in_features)
    projection = clip.visual_projection.weight.detach()
    if projection.shape[1] != head.in_features:
        raise PartialLoraError(
            f"model.text_weights={model.text_weights}: projects images of width {projection.shape[1]}, "
            f"model.architecture={model.architecture} has {head.in_features}; both must be of one CLIP"
        )
    classes = embedded(clip, tokenizer, described(labels, model.prompts))
    scale = clip.logit_scale.detach().exp() / typical_length(projection, _last_norm(tower))
    with torch.no_grad():
        head.weight.copy_(scale * classes @ projection)
        head.bias.zero_()
    return tower.eval()


def described(labels: Sequence[str], prompts: Sequence[str]) -> list[list[str]]:
    """Return the descriptions of each class: every prompt with its name, underscores read as spaces."""
    return [[prompt.replace("{}", label.replace("_", " ")) for prompt in prompts] for label in labels]


@torch.no_grad()
def embedded(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, descriptions: Sequence[Sequence[str]]) -> Tensor:
    """Return one unit vector (d,) for each class: its descriptions' unit vectors averaged, and normalised again."""
    texts = [text for of_class in descriptions for text in of_class]
    longest, rows = clip.config.text_config.max_position_embeddings, []
    for start in range(0, len(texts), _BATCH):
        words = tokenizer(
            texts[start : start + _BATCH], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        features = clip.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        rows.append(nn.functional.normalize(features.pooler_output, dim=-1))
    means = torch.cat(rows).reshape(len(descriptions), -1, rows[0].shape[1]).mean(1)
    return nn.functional.normalize(means, dim=-1)


def typical_length(projection: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Return the root mean square length of P x, for x that leave a layer norm with uncorrelated coordinates.

    Dividing by it makes logits about as large as CLIP's own (scale times cosine), so that training starts there.
    """
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    return ((projection @ bias).square().sum() + (projection * weight).square().sum()).sqrt()


def _last_norm(model: TimmWrapperForImageClassification) -> nn.LayerNorm:
    """Return the layer norm whose output the head reads."""
    inner = model.timm_model
    for norm in (getattr(inner, "fc_norm", None), getattr(inner, "norm", None)):
        if isinstance(norm, nn.LayerNorm):
            return norm
    raise PartialLoraError(
        f"model.architecture={model.config.architecture}: expected CLIP's vision transformer, with a layer norm last"
    )


def _whole_clip(model: ModelConfig, width: int) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """Load a whole CLIP in fp32 with its tokenizer; a random CLIP projects image features of `width`."""
    place = model.text_weights
    if place == RANDOM:
        return _random_clip(model.text_args, width)
    folder = folder_of(place, model.name, text=True)
    try:
        config = transformers.CLIPConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise PartialLoraError(f"model.text_weights={place}: expected a CLIP ({one_line(error)})") from error
    weights.check_architecture("clip", config.model_type, place)
    whole = replace(model, weights=place, dtype="float32")
    clip = weights.load_weights(
        transformers.CLIPModel, folder, config, whole, may_be_new=lambda model, key: False, pickles=True
    )
    return clip.eval(), tokenizer_in(folder, name=model.name, weights=place)


def _random_clip(text_args: dict, width: int) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """Make a CLIP with the same weights in every run; only the projection of its image tower is used."""
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": VOCABULARY,
        "eos_token_id": tokenizer.sep_token_id,
        **text_args,
        "bos_token_id": tokenizer.cls_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shortest = {"hidden_size": width, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
    try:
        config = transformers.CLIPConfig(
            text_config=text, vision_config=shortest, projection_dim=text_args.get("projection_dim", width)
        )
        with weights.fixed_seed():
            return transformers.CLIPModel(config).eval(), tokenizer
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise PartialLoraError(
            f"model.text_args={text_args}: no geometry of CLIP's text tower ({one_line(error)})"
        ) from error
