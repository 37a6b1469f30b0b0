"""The learning rate that the command line would take by itself, for an adapter that was made in Python."""

from __future__ import annotations

import math

from omegaconf import OmegaConf
from torch import nn

from partial_lora.adapter.config import PartialLoraConfig
from partial_lora.adapter.model import adapter_layers, config_of, drawn
from partial_lora.errors import PartialLoraError
from partial_lora.masks import GRANULARITIES, MASKED
from partial_lora.settings import rates
from partial_lora.settings.schema import conf_dir


def learning_rate(model: nn.Module, adapter_name: str = "default") -> float:
    """Return the rate that `trainer.learning_rate=auto` takes for an adapter like this one, before training.

    It is dense LoRA's for the width of the model, times what suits the form of the adapter and the share that trains
    (docs/concepts/learning-rates.md). A head beside the adapter takes dense LoRA's, the rate of a sparsity of 0.

    Raises PartialLoraError where the model has no masked adapter of that name.
    """
    config = config_of(model, adapter_name)
    if not isinstance(config, PartialLoraConfig):
        raise PartialLoraError(f"adapter {adapter_name!r} is not masked: expected one of PartialLoraConfig.")
    _, geometries = drawn(model, adapter_name)
    whole = sum(math.prod(shapes.a) + math.prod(shapes.b) for shapes in geometries.values())
    trained = sum(
        parameter.numel()
        for layer in adapter_layers(model, adapter_name).values()
        for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        for parameter in factor.parameters()
    )
    method = _method(config)
    known = OmegaConf.load(conf_dir() / "method" / f"{method}.yaml")
    settings = {
        "method": {"name": method, "rate_factor": OmegaConf.select(known, "method.rate_factor", default=1.0)},
        "mask": {key: getattr(config, key) for key in rates.OF_MASKS},
        "trainer": {},
    }
    width = rates.width(shapes.shape for shapes in geometries.values())
    return rates.auto(settings, width=width, density=trained / whole)


def _method(config: PartialLoraConfig) -> str:
    """Return the command line's name of an adapter of this form."""
    if config.rows != MASKED:
        return "rows"
    if config.columns == "one_hot":
        return "paca"
    if config.columns == "frozen":
        return "lori" if GRANULARITIES[config.granularity].single else "lorafa"
    return "partial"
