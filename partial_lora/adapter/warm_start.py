"""Start a masked adapter from a LoRA that is trained already, instead of from a random A and a zero B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from partial_lora.adapter.config import PartialLoraConfig, refuse_options, saved_file, scaling_of
from partial_lora.adapter.factor import PARTS, MaskedFactor
from partial_lora.adapter.layer import as_factors
from partial_lora.adapter.model import (
    adapter_layers,
    adapter_tensors,
    base_name,
    check_unmerged,
    config_of,
    module_masks,
    saved_rank,
)
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import difference, read_json


def warm_start(
    model: nn.Module,
    lora: str | PathLike | PeftModel,
    adapter_name: str = "default",
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Give a masked adapter the values that a trained LoRA has at the entries that the masks keep.

    A' (rank × kept columns) takes these columns of the LoRA's A (rank × in), B' (kept rows × rank) these rows of its
    B (out × rank), and single entries the same entries; what is masked stays zero. A group (granularity "groups") takes
    the signed mean of its columns or rows. Where the adapter has another scaling, by lora_alpha or the exponents of
    density, B' takes the values times the ratio of the two. Tensors that train whole beside the adapter (a head in
    modules_to_save, biases) take the LoRA's values where it has any. B is then no longer zero: with sparsity 0 the
    model starts with the LoRA's outputs, and with higher sparsity further from them. Values are written in place, in
    the model's dtype, so that optimizers stay valid.

        model = get_peft_model(base, PartialLoraConfig(r=16, target_modules=..., sparsity=...))
        warm_start(model, "path/or/hub-id/of/a/lora")

    Args:
        model: a model that get_peft_model (or inject_adapter_in_model) has made with a PartialLoraConfig.
        lora: a folder, a hub repository, or a PeftModel, whose active adapter is taken. No bare state dict: it does
            not say its alpha.
        adapter_name: the adapter of ``model`` that takes the values.
        subfolder: of the hub repository or folder.
        revision: of the hub repository.
        token: for the hub repository.

    Raises PartialLoraError, and leaves the model as it was, where the two do not fit: another rank, other modules or
    shapes, a trained head or bias that the adapter does not train, options of LoRA that do not go with masks, a merged
    adapter, a missing, broken or pickled file, and one that is not as the finished run whose adapter it is recorded it.
    """
    config = config_of(model, adapter_name)
    if not isinstance(config, PartialLoraConfig):
        raise PartialLoraError(f"adapter {adapter_name!r} is not masked: load the LoRA with PEFT's load_adapter.")
    for name, usual in (("rows", "masked"), ("columns", "masked"), ("rank_pattern", {}), ("target_parameters", None)):
        if getattr(config, name) != usual:
            raise PartialLoraError(
                f"{name} is {getattr(config, name)!r}: a LoRA's values would mean something else there; leave it at"
                f" {usual!r}."
            )
    source = _from_model(lora) if isinstance(lora, PeftModel) else _from_files(lora, subfolder, revision, token)
    state, factors = adapter_tensors(model, adapter_name), _masked_factors(model, adapter_name)
    _check_fit(source, config, state, factors)
    with torch.no_grad():
        for key, value in source.tensors.items():
            if key not in factors:
                state[key].copy_(value)
                continue
            path, name = key.rsplit(".", 1)
            kept = getattr(factors[key], PARTS[name]).copy_(factors[key].nearest(value))
            module, _, factor = path.rpartition(".")
            if factor == "lora_B":
                scaling = scaling_of(config, module, config.r) * factors[key].multiple
                kept.mul_(scaling_of(source.config, module, config.r) / scaling)


@dataclass(frozen=True)
class _Source:
    """A trained LoRA: its name in errors, its config, and its tensors by their names in the base model."""

    name: str
    config: LoraConfig
    tensors: Mapping[str, Tensor]


def _masked_factors(model: nn.Module, adapter_name: str) -> dict[str, MaskedFactor]:
    """Return the adapter's factors by the names of their weights; refuse those that cannot be filled."""
    check_unmerged(model)
    module_masks(model, adapter_name)  # raises where masks were lost
    factors = {
        f"{name}.{factor}.{part}": getattr(layer, factor)[adapter_name]
        for name, layer in adapter_layers(model, adapter_name).items()
        for factor in ("lora_A", "lora_B")
        for part, kept in PARTS.items()
        if getattr(getattr(layer, factor)[adapter_name], kept) is not None
    }
    for name, factor in factors.items():
        if factor.kept.is_meta:
            raise PartialLoraError(f"{name} is on the meta device: build the adapter without low_cpu_mem_usage.")
    return factors


def _from_model(lora: PeftModel) -> _Source:
    active = lora.active_adapters
    if len(active) != 1:
        raise PartialLoraError(f"lora has {len(active)} active adapters, {active}: activate one with set_adapter.")
    name, config = f"adapter {active[0]!r} of lora", lora.peft_config[active[0]]
    if isinstance(config, PartialLoraConfig):
        config = config.as_lora(saved_rank(lora, active[0]))  # which its tensors are of
    return _Source(name, _checked(config, name), adapter_tensors(lora, active[0]))


def _from_files(lora: str | PathLike, subfolder: str | None, revision: str | None, token: str | bool | None) -> _Source:
    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "token": token}
    paths = [saved_file(lora, name, **options) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
    where = str(Path(lora, subfolder or ""))
    for path in paths:
        if not path.is_file():  # PEFT would look for it on the hub
            raise PartialLoraError(f"{where} has no {path.name}: expected a LoRA's folder, or OWNER/NAME of the hub.")
    if fault := _fault_by_record(paths[0].parent, [path.name for path in paths]):
        raise PartialLoraError(f"{where}: {fault}, as its run recorded it: restore it, or train the run again.")
    try:
        config, tensors = PeftConfig.from_pretrained(str(paths[0].parent)), load_file(paths[1])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        files = " and ".join(path.name for path in paths)
        raise PartialLoraError(f"{where} has no {files} that can be read: {one_line(error)}") from None
    config = _checked(config, where)
    return _Source(where, config, as_factors({base_name(key): tensors[key] for key in tensors if _trains(config, key)}))


def _fault_by_record(folder: Path, names: Sequence[str]) -> str | None:
    """Return which file is not as a finished run, whose adapter the folder is, recorded it; None for no such run."""
    folder = folder.resolve()
    try:
        recorded = dict(read_json(folder.parent / "result.json")["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    of_files = {name: recorded.get(f"{folder.name}/{name}") for name in names}
    return difference(folder, of_files)


def _trains(config: LoraConfig, key: str) -> bool:
    """Return False for a weight of the base: PEFT writes those of embeddings into the file, some of them twice."""
    if ".modules_to_save." in key or ".original_module." in key:  # as in `adapter_tensors`
        return False
    module, _, name = key.rpartition(".")
    if name != "weight":
        return True  # a bias of a base layer may train
    is_embedding = module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    trains_whole = any(module.endswith(suffix) for suffix in config.modules_to_save or ())  # as PEFT finds them
    return not module.endswith(".base_layer") and (trains_whole or not is_embedding)


def _checked(config: PeftConfig, name: str) -> LoraConfig:
    """Return the config of a LoRA whose values mean what a masked adapter's mean; refuse any other."""
    if config.peft_type != "LORA" or not isinstance(config, LoraConfig):
        raise PartialLoraError(f"{name} is a {config.peft_type} adapter: expected LORA.")
    trained_as_drawn = config.init_lora_weights in ("eva", "orthogonal")  # other special ones change W
    try:
        refuse_options(replace(config, init_lora_weights=True, eva_config=None) if trained_as_drawn else config)
    except PartialLoraError as error:
        raise PartialLoraError(f"{name}: {error}") from None
    return config


def _check_fit(
    source: _Source, config: PartialLoraConfig, state: Mapping[str, Tensor], factors: Mapping[str, MaskedFactor]
) -> None:
    """Raise PartialLoraError, naming the module, where a trained LoRA and the adapter do not fit."""
    for key in factors:
        if key not in source.tensors:
            raise PartialLoraError(f"{source.name} has no {key}, which the adapter has: give both the same targets.")
    if source.config.rank_pattern:
        raise PartialLoraError(f"{source.name} has rank_pattern={source.config.rank_pattern}: expected one rank.")
    tokens = [_tokens(side) for side in (source.config, config)]
    if all(tokens) and tokens[0] != tokens[1]:
        raise PartialLoraError(
            f"{source.name} has trainable_token_indices={source.config.trainable_token_indices}, the adapter"
            f" {config.trainable_token_indices}: give both the same."
        )
    if source.config.r != config.r:
        raise PartialLoraError(f"{source.name} has r={source.config.r}, the adapter r={config.r}: give both the same.")
    for key, value in source.tensors.items():
        if key not in state:
            option = "target_modules" if ".lora_" in key else "modules_to_save (or bias)"
            raise PartialLoraError(f"{source.name} has {key}, which the adapter does not train: add it to {option}.")
        if value.shape != state[key].shape:
            raise PartialLoraError(
                f"{source.name} has {key} in shape {list(value.shape)}, the adapter in {list(state[key].shape)}: it was"
                " trained on another model."
            )


def _tokens(config: LoraConfig) -> dict[str, list[int]] | None:
    """Return the tokens that train, by the name of their embedding; a list is of PEFT's own."""
    tokens = config.trainable_token_indices
    return {"embed_tokens": tokens} if isinstance(tokens, list) else tokens
