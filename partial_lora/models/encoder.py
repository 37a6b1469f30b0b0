"""Text encoders (BERT, DeBERTa and their like) as transformers' classifiers of sequences.

The head is new for every task. A class may have more that no pre-training has filled, DeBERTa's pooler for one: it
starts from the same numbers in every run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from partial_lora.errors import PartialLoraError
from partial_lora.models import heads, tokenizers
from partial_lora.models.checkpoint import check_architecture, pretrained, quiet
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
    classes = heads.outputs(labels, name)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    counted = _built(architecture, model_args, classes).config  # before anything is downloaded
    if attn_implementation is not None:
        _check_attention(_config(architecture, model_args, classes), attn_implementation)
    with heads.own_generator():
        if weights == RANDOM:
            if counted.vocab_size < tokenizers.VOCABULARY:
                raise PartialLoraError(
                    f"model.model_args.vocab_size={counted.vocab_size}: expected at least {tokenizers.VOCABULARY}, "
                    "the tokens of weights=random"
                )
            config = _config(architecture, model_args, classes)
            model = AutoModelForSequenceClassification.from_config(config, **options).to(dtype)
        else:
            folder = folder_of(weights, name, text=True, instead=OFFLINE_TEXT_MODEL)
            model = pretrained(
                AutoModelForSequenceClassification.from_pretrained,
                folder,
                _same_geometry(_config_in(folder, architecture, classes, weights), counted, model_args, weights),
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
    return _built(architecture, model_args, {"num_labels": num_labels})


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


def _config(architecture: str, model_args: dict, classes: dict) -> PretrainedConfig:
    try:
        known = AutoConfig.for_model(architecture)
    except ValueError as error:
        raise PartialLoraError(
            f"model.architecture={architecture}: transformers has no such model_type (bert, deberta-v2, …)"
        ) from error
    if type(known) not in AutoModelForSequenceClassification._model_mapping:
        raise PartialLoraError(
            f"model.architecture={architecture}: transformers has no classifier of sequences of that type"
        )
    for key in model_args:
        if not hasattr(known, key) and not _is_read(key, known):
            raise PartialLoraError(f"model.model_args.{key}: {architecture} takes none of that name")
    try:
        return AutoConfig.for_model(architecture, **model_args, **classes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"model.model_args={model_args}: no geometry of {architecture} ({reason})") from error


def _is_read(key: str, config: PretrainedConfig) -> bool:
    """Whether the model asks its config for a key that the config class does not list, as DeBERTa does for some."""
    model_class = AutoModelForSequenceClassification._model_mapping[type(config)]
    return f'"{key}"' in inspect.getsource(sys.modules[model_class.__module__])


def _built(architecture: str, model_args: dict, classes: dict) -> PreTrainedModel:
    config = _config(architecture, model_args, classes)
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PartialLoraError(f"model.model_args={model_args}: no geometry of {architecture} ({reason})") from error


def _check_attention(config: PretrainedConfig, implementation: str) -> None:
    """Raise PartialLoraError where the class, or this machine, cannot compute attention so."""
    try:
        with torch.device("meta"):
            AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PartialLoraError(
            f"model.attn_implementation={implementation}: {config.model_type} cannot be computed so ({reason}); null "
            "leaves it to transformers"
        ) from error


def _config_in(folder, architecture: str, classes: dict, weights: str) -> PretrainedConfig:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **classes)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:160]
        raise PartialLoraError(
            f"model.weights={weights}: expected a config.json that transformers knows ({reason})"
        ) from error
    check_architecture(architecture, config.model_type, weights)
    return config


def _same_geometry(
    config: PretrainedConfig, counted: PretrainedConfig, model_args: dict, weights: str
) -> PretrainedConfig:
    """The config of the weights, which must be the one that parameters are counted by."""
    for key in model_args:
        expected, found = getattr(counted, key, None), getattr(config, key, None)
        if found != expected:
            raise PartialLoraError(
                f"model.model_args.{key}={expected}: {weights} has {found}; set that, so that parameters are counted "
                "for the model that trains"
            )
    return config
