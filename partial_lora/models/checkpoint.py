"""Weights out of a folder into a model, every one of them accounted for."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from partial_lora.errors import PartialLoraError

_SAFETENSORS = "*.safetensors"


def pretrained(
    build: Callable[..., PreTrainedModel],
    folder: Path,
    config: PretrainedConfig,
    *,
    name: str,
    weights: str,
    dtype: torch.dtype,
    may_be_new: Callable[[PreTrainedModel, str], bool],
    pickled: bool = False,
    **options: object,
) -> PreTrainedModel:
    """The model with the folder's weights.

    build: a from_pretrained of transformers. may_be_new: whether the model may have that parameter without any weights,
    or with other ones than the folder's; all others must be there, in their shape. pickled: take a pickle, read without
    running any of its code, where there is nothing better. Raises PartialLoraError that names the first problem.
    """
    try:
        with quiet():
            model, report = build(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=not pickled or any(folder.glob(_SAFETENSORS)),
                weights_only=True,
                ignore_mismatched_sizes=True,  # the head was made for other classes; the rest is checked below
                output_loading_info=True,
                **options,
            )
    except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"model={name}: cannot read the weights in {folder} ({reason[:160]})") from error
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for problem, keys in (("missing", report["missing_keys"]), ("of another shape", mismatched)):
        unfilled = sorted(key for key in keys if not may_be_new(model, key))
        if unfilled:
            raise PartialLoraError(
                f"model={name}: {unfilled[0]} is {problem} in {weights} ({len(unfilled)} such weights); "
                "model.architecture and model.model_args must be those of the weights"
            )
    return model


def check_architecture(wanted: str, found: str, weights: str) -> None:
    """Raise PartialLoraError where the weights are of another architecture than the one that is counted."""
    if found != wanted:
        raise PartialLoraError(
            f"model.architecture={wanted}: {weights} is a {found}; set that, so that "
            "parameters are counted for the model that trains"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning of the new head, and of other classes, which are meant to be new."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
