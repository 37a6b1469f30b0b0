"""Text encoders (BERT, DeBERTa and their like) as transformers' classifiers of sequences.

The head is new for every task. A class may have more that no pre-training has filled, DeBERTa's pooler for one: it
starts from the same numbers in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from partial_lora.errors import PartialLoraError
from partial_lora.models import heads, tokenizers
from partial_lora.models.checkpoint import pretrained
from partial_lora.models.geometry import Geometry
from partial_lora.models.hub import OFFLINE_TEXT_MODEL
from partial_lora.models.source import RANDOM, folder_of, name_after


def load(
    *,
    name: str,
    weights: str,
    architecture: str,
    model_args: dict,
    labels: Sequence[str],
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The pre-trained encoder with a new head for `labels` (none: one real number), on the CPU, in evaluation mode.

    `weights` is bundled:NAME, a repository of the model hub, a folder in the same format, or random. The head alone is
    drawn from torch's global generator; building the rest moves that generator nowhere. Raises PartialLoraError where
    the weights cannot be had, are of another geometry than `model_args` says, or leave the encoder unfilled.
    """
    geometry = _geometry(architecture, model_args, heads.outputs(labels, name))
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    geometry.empty()  # refuses what cannot be before anything is downloaded
    if attn_implementation is not None:
        geometry.check_attention(attn_implementation)
    with heads.own_generator():
        if weights == RANDOM:
            config = geometry.config()
            tokenizers.check_room(config.vocab_size)
            model = AutoModelForSequenceClassification.from_config(config, **options).to(dtype)
        else:
            folder = folder_of(weights, name, text=True, instead=OFFLINE_TEXT_MODEL)
            model = pretrained(
                AutoModelForSequenceClassification.from_pretrained,
                folder,
                geometry.config_in(folder, weights),
                name=name,
                weights=weights,
                dtype=dtype,
                may_be_new=lambda model, key: not key.startswith(f"{model.base_model_prefix}."),
                pickled=True,
                **options,
            )
            name_after(model, weights)
    heads.draw(model.get_submodule(head_name(model)), std=model.config.initializer_range)
    # Else the loss, and with it the gradient, is multiplied by the steps of accumulation and by the processes.
    model.accepts_loss_kwargs = False
    return model.eval()


def empty(*, architecture: str, model_args: dict, num_labels: int) -> PreTrainedModel:
    """The model's shapes on the meta device: no weights, no memory, no download.

    Raises PartialLoraError for an architecture, or a part of its geometry, that transformers does not know.
    """
    return _geometry(architecture, model_args, {"num_labels": num_labels}).empty()


def head_name(model: PreTrainedModel) -> str:
    """The full name of the linear layer that gives the logits: the last one after the encoder."""
    after = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{model.base_model_prefix}.")
    ]
    if not after:
        raise PartialLoraError(f"model.architecture={model.config.model_type}: expected a linear layer as its head")
    return after[-1]


def _geometry(architecture: str, model_args: dict, outputs: dict) -> Geometry:
    return Geometry(AutoModelForSequenceClassification, "classifier of sequences", architecture, model_args, outputs)
