"""The image tower of CLIP as a classifier whose head is CLIP's zero-shot classifier.

CLIP compares an image's features x, projected by P, with the embedding t of each class's description: the cosine of
P x and t. For one image the length of P x is the same for all classes, so the largest of T P x, with the normalised
embeddings as the rows of T, is at the class of the largest cosine. T P is a plain linear head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase, TimmWrapperForImageClassification

from partial_lora.errors import PartialLoraError
from partial_lora.models import heads, timm, tokenizers
from partial_lora.models.checkpoint import check_architecture, pretrained
from partial_lora.models.source import RANDOM, folder_of

PROMPTS = ("a photo of a {}.",)
_BATCH = 64  # descriptions that are embedded at once

empty = timm.empty


def load(
    *,
    name: str,
    weights: str,
    architecture: str,
    model_args: dict,
    labels: Sequence[str],
    image_size: int,
    text_weights: str | None,
    text_args: dict | None = None,
    prompts: Sequence[str] = PROMPTS,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> TimmWrapperForImageClassification:
    """CLIP's image tower with the zero-shot head for `labels`; no number in it is drawn from the caller's generator.

    weights: the image tower, in timm's format. text_weights: the CLIP it belongs to, in transformers' format (text
    tower, projections, tokenizer): a repository of the hub, a folder, or random with the geometry `text_args`.
    prompts: descriptions of a class, with {} for its name. Raises PartialLoraError as `timm.load` does, for labels that
    are no names, and where the two are not of one CLIP.
    """
    if not labels:
        raise PartialLoraError(f"model={name}: a zero-shot head needs classes with names, and the task has none")
    classes = heads.outputs(labels, name)
    descriptions = described(labels, prompts)
    model = timm.headless(
        name=name,
        weights=weights,
        architecture=architecture,
        model_args=model_args,
        classes=classes,
        image_size=image_size,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    head = model.get_submodule(timm.head_name(model))
    clip, tokenizer = _clip(text_weights, text_args or {}, name=name, width=head.in_features)
    projection = clip.visual_projection.weight.detach()
    if projection.shape[1] != head.in_features:
        raise PartialLoraError(
            f"model.text_weights={text_weights}: projects images of width {projection.shape[1]}, "
            f"model.architecture={architecture} has {head.in_features}; both must be of one CLIP"
        )
    texts = embedded(clip, tokenizer, descriptions)
    scale = clip.logit_scale.detach().exp() / typical_length(projection, _last_norm(model))
    with torch.no_grad():
        head.weight.copy_(scale * texts @ projection)
        head.bias.zero_()
    return model.eval()


def described(labels: Sequence[str], prompts: Sequence[str]) -> list[list[str]]:
    """The descriptions of each class: every prompt with its name, underscores read as spaces."""
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise PartialLoraError(f"model.prompts: expected {{}} once, for the name of a class, in {prompt!r}")
    if not prompts:
        raise PartialLoraError("model.prompts=[]: expected at least one, such as 'a photo of a {}.'")
    return [[prompt.replace("{}", label.replace("_", " ")) for prompt in prompts] for label in labels]


@torch.no_grad()
def embedded(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, descriptions: Sequence[Sequence[str]]) -> Tensor:
    """One unit vector (d,) for each class: its descriptions' unit vectors averaged, made a unit vector again."""
    texts = [text for of_class in descriptions for text in of_class]
    longest, rows = clip.config.text_config.max_position_embeddings, []
    for start in range(0, len(texts), _BATCH):
        words = tokenizer(
            texts[start : start + _BATCH], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        found = clip.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        rows.append(nn.functional.normalize(found.pooler_output, dim=-1))
    means = torch.cat(rows).reshape(len(descriptions), -1, rows[0].shape[1]).mean(1)
    return nn.functional.normalize(means, dim=-1)


def typical_length(projection: Tensor, norm: nn.LayerNorm) -> Tensor:
    """How long P x is for the x that leave a layer norm: the root mean square, were their coordinates uncorrelated.

    Dividing by it leaves logits about as large as CLIP's own, scale times cosine, which is what training starts from.
    """
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    return ((projection @ bias).square().sum() + (projection * weight).square().sum()).sqrt()


def _last_norm(model: TimmWrapperForImageClassification) -> nn.LayerNorm:
    """The layer norm whose output the head reads."""
    inner = model.timm_model
    for norm in (getattr(inner, "fc_norm", None), getattr(inner, "norm", None)):
        if isinstance(norm, nn.LayerNorm):
            return norm
    raise PartialLoraError(
        f"model.architecture={model.config.architecture}: expected CLIP's vision transformer, with a layer norm last"
    )


def _clip(
    text_weights: str | None, text_args: dict, *, name: str, width: int
) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A whole CLIP in fp32 with its tokenizer; `width` is of the image features that a random one projects."""
    if text_weights is None:
        raise PartialLoraError(f"model.text_weights=null: model={name} needs CLIP's text tower for its head")
    if text_weights == RANDOM:
        return _random_clip(text_args, width), tokenizers.byte_tokenizer()
    if text_args:
        raise PartialLoraError(f"model.text_args={text_args}: of text_weights=random only; {text_weights} has its own")
    folder = folder_of(text_weights, name, text=True)
    try:
        config = CLIPConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PartialLoraError(f"model.text_weights={text_weights}: expected a CLIP ({reason})") from error
    check_architecture("clip", config.model_type, text_weights)
    clip = pretrained(
        CLIPModel.from_pretrained,
        folder,
        config,
        name=name,
        weights=text_weights,
        dtype=torch.float32,
        may_be_new=lambda model, key: False,
        pickled=True,
    )
    return clip.eval(), tokenizers.tokenizer_in(folder, name=name, weights=text_weights)


def _random_clip(text_args: dict, width: int) -> CLIPModel:
    """A CLIP with the same random weights in every run; of its own image tower nothing but the projection is used."""
    tokenizer = tokenizers.byte_tokenizer()
    text = {"vocab_size": tokenizers.VOCABULARY, "eos_token_id": tokenizer.sep_token_id, **text_args}
    shortest = {"hidden_size": width, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
    try:
        config = CLIPConfig(
            text_config={**text, "bos_token_id": tokenizer.cls_token_id, "pad_token_id": tokenizer.pad_token_id},
            vision_config=shortest,
            projection_dim=text_args.get("projection_dim", width),
        )
        with heads.own_generator():
            return CLIPModel(config).eval()
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PartialLoraError(f"model.text_args={text_args}: no geometry of CLIP's text tower ({reason})") from error
