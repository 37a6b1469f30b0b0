"""Causal language models (Llama, Qwen and their like): nothing is new for a task, and every weight is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from partial_lora.models import heads, quantization, tokenizers
from partial_lora.models.checkpoint import pretrained, quiet
from partial_lora.models.geometry import Geometry
from partial_lora.models.hub import OFFLINE_CAUSAL_MODEL
from partial_lora.models.source import RANDOM, folder_of, name_after


def load(
    *,
    name: str,
    weights: str,
    architecture: str,
    model_args: dict,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantized: str | None = None,
) -> PreTrainedModel:
    """The pre-trained model in evaluation mode, on the CPU; a quantised one where transformers puts it (a GPU, if any).

    `weights` is bundled:NAME, a repository of the model hub, a folder in the same format (safetensors alone), or
    random. `quantized` is nf4 or int8: the linear layers but the last are; all else is of `dtype`, as are products.
    torch's global generator is left where it was. Raises PartialLoraError where the weights cannot be had, are of
    another geometry than `model_args` says, leave a part unfilled, or cannot be quantised here.
    """
    geometry = _geometry(architecture, model_args)
    options: dict[str, object] = {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
        geometry.check_attention(attn_implementation)
    if quantized is not None:
        options["quantization_config"] = quantization.settings_of(quantized, dtype)
    geometry.empty()  # refuses what cannot be before anything is downloaded
    with heads.own_generator():
        if weights == RANDOM:
            model = _random(geometry, dtype, options)
        else:
            folder = folder_of(weights, name, text=True, pickles=False, instead=OFFLINE_CAUSAL_MODEL)
            model = _loaded(folder, geometry, name, weights, dtype, options)
            name_after(model, weights)
    if quantized is not None:
        quantization.keep_gradients(model)
    return model.eval()


def empty(*, architecture: str, model_args: dict, num_labels: int | None = None) -> PreTrainedModel:
    """The model's shapes on the meta device: no weights, no memory, no download. `num_labels` changes nothing.

    Raises PartialLoraError for an architecture, or a part of its geometry, that transformers does not know.
    """
    return _geometry(architecture, model_args).empty()


def _geometry(architecture: str, model_args: dict) -> Geometry:
    return Geometry(AutoModelForCausalLM, "causal language model", architecture, model_args, {})


def _loaded(
    folder: Path, geometry: Geometry, name: str, weights: str, dtype: torch.dtype, options: dict
) -> PreTrainedModel:
    return pretrained(
        AutoModelForCausalLM.from_pretrained,
        folder,
        geometry.config_in(folder, weights),
        name=name,
        weights=weights,
        dtype=dtype,
        may_be_new=lambda model, key: False,
        **options,
    )


def _random(geometry: Geometry, dtype: torch.dtype, options: dict) -> PreTrainedModel:
    config = geometry.config()
    tokenizers.check_room(config.vocab_size)
    attention = {key: value for key, value in options.items() if key == "attn_implementation"}
    model = AutoModelForCausalLM.from_config(config, **attention)
    if "quantization_config" not in options:
        return model.to(dtype)
    with quiet():  # transformers quantises what it loads, so the drawn weights are given to it as if they were stored
        return type(model).from_pretrained(
            None, config=geometry.config(), state_dict=model.state_dict(), dtype=dtype, **options
        )
