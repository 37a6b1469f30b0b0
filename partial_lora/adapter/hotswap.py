"""Put a saved adapter in the place of a masked one: the values and the indices of its masks, in the same tensors.

A compiled model then runs as it was compiled. PEFT's own hot swap does so for adapters that are not masked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import _update_scaling
from torch import Tensor, nn

from partial_lora.adapter import sidecar
from partial_lora.adapter.config import PartialLoraConfig, scaling_of
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.adapter.layer import as_factors
from partial_lora.adapter.model import adapter_layers, base_name, config_of
from partial_lora.adapter.selection import Geometry, ModuleMasks, geometry
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES

_ALIKE = ("target_parameters", "use_rslora", "lora_dropout", "granularity", "rows", "columns", "bias")
_ALIKE += ("lora_bias", "alora_invocation_tokens")


def swap_masked(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, new: PartialLoraConfig) -> None:
    """Replace a masked adapter of the model by another one.

    Both have to keep as many rows and columns of the same modules. A lower rank is filled up with zeros.

    Args:
        tensors: those of the new adapter's file, by their names in the model.
        new: the config that was saved with them.

    Raises PartialLoraError, and leaves the model as it was, where they do not fit, naming the setting or the module.
    """
    config = config_of(model, adapter_name)
    for key in _ALIKE:
        here, there = getattr(config, key), getattr(new, key)
        if here != there:
            raise PartialLoraError(f"{key} is {there!r}: expected {here!r}, as of {adapter_name!r}, for a hot swap.")
    if config.target_parameters:
        raise PartialLoraError("target_parameters: expected modules alone for a hot swap of masked adapters.")
    layers = adapter_layers(model, adapter_name)
    for name, layer in layers.items():
        if adapter_name in layer.merged_adapters:
            raise PartialLoraError(f"{name} has {adapter_name!r} merged into it: call unmerge_adapter() first.")
    geometries = {name: geometry(name, layer, new.rank_of(name)) for name, layer in layers.items()}
    masks = new.choose_masks(geometries)
    values = as_factors({base_name(key): value for key, value in tensors.items()})
    for name, layer in layers.items():
        _check_fit(name, layer, adapter_name, masks[name], geometries[name])
    with torch.no_grad():
        for name, layer in layers.items():
            rank = layer.r[adapter_name] = new.rank_of(name)
            _update_scaling(layer, adapter_name, scaling_of(new, name, rank))
            layer.lora_alpha[adapter_name] = scaling_of(new, name, rank) * new.unit(rank)
            a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            frozen, ratio = new.frozen(name, geometries[name]), new.own_scaling(name)
            a.swap(masks[name].columns, values[f"{name}.lora_A.{adapter_name}.weight"], frozen)
            key = f"{name}.lora_B.{adapter_name}"
            dense, bias = values[f"{key}.weight"] / ratio, values.get(f"{key}.bias")
            b.multiple = new.density_factor(masks[name])
            b.swap(masks[name].rows, dense, frozen, bias if bias is None else bias / ratio)
    for key in ("lora_alpha", "indices", *sidecar.SETTINGS):
        setattr(config, key, getattr(new, key))
    config.scores, config.expected = None, new.expected


def _check_fit(where: str, layer: LoraLayer, adapter_name: str, masks: ModuleMasks, shapes: Geometry) -> None:
    factors: dict[str, MaskedFactor] = {"rows": layer.lora_B[adapter_name], "columns": layer.lora_A[adapter_name]}
    for axis in AXES:
        kept, places = len(getattr(masks, axis).kept), len(factors[axis].mask.kept)
        if kept != places:
            raise PartialLoraError(
                f"{where} keeps {kept} of its {axis}, this model {places}: expected as many for a hot swap; load the"
                " folder as an adapter of its own."
            )
        rank, highest = shapes.rank, factors[axis].rank
        if rank > highest or (rank != highest and not factors[axis].widens):
            most = "at most that" if factors[axis].widens else "the same"
            raise PartialLoraError(f"{where} has rank {rank}, this model {highest}: expected {most} for a hot swap.")
