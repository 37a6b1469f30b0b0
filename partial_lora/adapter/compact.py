"""The compact form of an adapter: a file of its kept values, without anything that can be made again.

Masks are made again from their settings, and must match those that the adapter was trained with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from partial_lora.adapter.config import COMPACT_FILE as FILE_NAME
from partial_lora.adapter.config import PartialLoraConfig, saved_file, scaling_of
from partial_lora.adapter.factor import MaskedFactor
from partial_lora.adapter.fingerprint import Fingerprint, base_parameters, fingerprint, short
from partial_lora.adapter.model import (
    adapter_layers,
    adapter_tensors,
    base_modules,
    check_unmerged,
    config_of,
    drawn_of,
    layer_rank,
    module_masks,
)
from partial_lora.adapter.selection import Geometry, ModuleMasks, geometry, parameter_geometry, shares_of
from partial_lora.adapter.sharding import is_sharded
from partial_lora.errors import PartialLoraError, kind_and_line, one_line
from partial_lora.files import FORMAT, other_format, with_an_end, write_atomic
from partial_lora.masks import AXES, GRANULARITIES, MASKED

_HEADER, _BEFORE = "partial_lora/", "partial_lora."  # before the number of the format; and before 1.0
_INDICES = "#indices"  # a name that no module has
# Settings that the file holds elsewhere or does not need.
_LEFT_OUT = {"sparsity", "scores", "indices", "peft_type", "peft_version", "inference_mode", "auto_mapping"}
# What a setting is that the file leaves out, whatever its default is.
_ABSENT = {"r": 8, "lora_alpha": 8, "mask_seed": 0, "fan_in": "dense", "row_exponent": 0.0, "column_exponent": 0.0}
_ABSENT |= {"lora_bias": False, "granularity": "rows_columns", "rows": "masked", "columns": "masked"}
_ABSENT |= {"selection": "random", "count": "exact"}


def write_compact(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> Path:
    """Write the kept values of an adapter into ``folder``, made if need be, and return the file's path.

    The file takes 4 bytes for each kept value in float32 (2 in bfloat16), including a head in modules_to_save; 4 bytes
    for each index where the selection is "top"; and about 400 bytes for each module (a head counts as one where
    there are only one or two others).

    Args:
        model: any PEFT model with a Partial-LoRA adapter called ``adapter_name``, not merged.
        dtype: torch.float32 or torch.bfloat16, to which values are rounded; None writes them as trained.

    Raises PartialLoraError, and writes nothing, where there is no such adapter, or it is plain LoRA, merged or sharded.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise PartialLoraError(f"dtype is {dtype}: expected torch.float32, torch.bfloat16, or None (as trained).")
    layers = adapter_layers(model, adapter_name)
    config, base = _writable_config(model, adapter_name, layers), model.get_base_model()
    masks, geometries = drawn_of(layers, adapter_name)
    for name in masks:
        _check_scaling(config, name, layers[name], adapter_name, masks[name])
    if config.choose_masks(geometries) != masks:
        raise PartialLoraError(f"adapter {adapter_name!r}: its config does not make the masks that it has.")
    kept = {
        name: {
            part: _parameter(layers[name], adapter_name, part).detach().cpu() for part in _trained_parts(vars(config))
        }
        for name in masks
    }
    whole = adapter_tensors(model, adapter_name, masked=False)
    compact = Compact(
        config=config,
        geometries=dict(geometries),
        masks=dict(masks),
        kept=kept,
        whole=whole,
        base=fingerprint(base, exclude=_trained_whole(base, config, whole)),
    ).rounded_to(dtype)
    path = Path(folder) / FILE_NAME
    content = encode(compact)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return path


def load_compact(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    check_base: bool = True,
) -> PeftModel:
    """Return the base ``model`` with the compact adapter in ``folder``, masked, with its values bit for bit as written.

    folder: also a repository of the model hub, "owner/name".

    A PeftModel with other Partial-LoRA adapters gets it as one more, not activated, as with PEFT's load_adapter.
    Values that were rounded when written load in the dtype PEFT gives an adapter (float32 for a base in half
    precision). Everything else is as with PeftModel.from_pretrained.

    check_base: False does not compare the base's values with the fingerprint, for a base that was changed on purpose:
    `resize_token_embeddings`, for example, draws new rows of an embedding.

    Raises PartialLoraError, and leaves the model as it was, for a file that is missing, truncated or broken or whose
    masks do not match their digests, a missing module, a wrong shape, another base model (see `fingerprint`) and a name
    that is taken.
    """
    path = saved_file(folder, FILE_NAME)
    try:
        content = with_an_end(path).read_bytes()
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be read ({error.strerror}): expected a compact adapter.") from None
    compact = decode(content, path)
    config = compact.config
    _check_model(model, adapter_name)
    _check_base(model.get_base_model() if isinstance(model, PeftModel) else model, compact, path, values=check_base)
    config.inference_mode = not is_trainable
    try:
        with unchanged_on_error(model):
            if isinstance(model, PeftModel):
                adapted = model
                adapted.add_adapter(adapter_name, config)
                if is_trainable:
                    adapted.set_requires_grad(adapter_name)
            else:
                kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
                adapted = kind(model, config, adapter_name)
            _fill(adapted, compact, adapter_name)
            if not is_trainable:
                adapted.eval()
    except (PartialLoraError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        reason = one_line(error)
        raise PartialLoraError(f"{path} does not fit this model: {reason}") from error
    return adapted


def _writable_config(model: PeftModel, adapter_name: str, layers: Mapping[str, LoraLayer]) -> PartialLoraConfig:
    """Return the config of an adapter that can be written; raise PartialLoraError for any other."""
    config = config_of(model, adapter_name)
    if not isinstance(config, PartialLoraConfig):
        raise PartialLoraError(
            f"adapter {adapter_name!r} is a {type(config).__name__}, which masks nothing: use save_pretrained."
        )
    check_unmerged(model)
    parameters = [(name, parameter) for name, _, parameter in base_parameters(model.get_base_model())]
    for name, layer in layers.items():
        factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        parameters += [(name, part) for factor in factors for part in factor._parameters.values() if part is not None]
    for name, parameter in parameters:
        if is_sharded(parameter):
            raise PartialLoraError(f"{name} is spread over processes: use save_pretrained, which gathers it.")
    return config


def _check_scaling(
    config: PartialLoraConfig, name: str, layer: LoraLayer, adapter_name: str, masks: ModuleMasks
) -> None:
    """Raise PartialLoraError where a layer is not as the config, which is all that the file holds, would build it."""
    rank, b = layer_rank(layer, adapter_name), cast(MaskedFactor, layer.lora_B[adapter_name])
    here = layer.lora_alpha[adapter_name] / config.unit(layer.r[adapter_name]) * b.multiple
    there = scaling_of(config, name, rank) * config.density_factor(masks)
    if rank != config.rank_of(name) or not math.isclose(here, there):
        raise PartialLoraError(
            f"{name} has rank {rank} and scaling {here:g}, by the config of {adapter_name!r} {config.rank_of(name)} and"
            f" {there:g}: set the config's r, lora_alpha and exponents back, or use save_pretrained."
        )


def _fill(adapted: PeftModel, compact: Compact, adapter_name: str) -> None:
    """Put the file's values into the adapter just built; refuse them where masks or tensors differ from the file's."""
    if module_masks(adapted, adapter_name) != compact.masks:
        raise PartialLoraError("the masks made again for this model are not those of the file.")
    for name, module in base_modules(adapted).items():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, weight in module.modules_to_save[adapter_name].named_parameters():
                filed = compact.whole.get(f"{name}.{key}", weight).dtype
                weight.data = weight.data.to(torch.promote_types(weight.dtype, filed))  # wide enough for the file's
    here = adapter_tensors(adapted, adapter_name, masked=False)  # themselves, to be filled
    for name in sorted(here.keys() ^ compact.whole.keys()):
        where = "the file" if name in here else "this model"
        raise PartialLoraError(f"{name} trains beside the adapter, but {where} does not have it.")
    for name, value in sorted(compact.whole.items()):
        if here[name].shape != value.shape:
            raise PartialLoraError(
                f"{name} is {list(here[name].shape)} in this model, but {list(value.shape)} in the file."
            )
    layers = adapter_layers(adapted, adapter_name)
    for name, parts in compact.kept.items():
        for part, value in parts.items():
            parameter = _parameter(layers[name], adapter_name, part)
            dtype = parameter.dtype if compact.rounded else value.dtype
            parameter.data = value.to(parameter.device, dtype).reshape(parameter.shape)
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(compact.whole[name])


# The file: from values to bytes and back, every part of it checked.


@dataclass(frozen=True)
class Compact:
    """An adapter without its zeros.

    Attributes:
        config: its settings.
        geometries, masks: {module: ...}, of the same modules in the same order.
        kept: {module: {"A": tensor, "B": tensor}}, the kept part of the factors; with lora_bias "bias", that of B.
        whole: the tensors that trained beside them, by their names in the base model.
        base: the fingerprint of the base model.
        rounded: True where the values have a narrower dtype than in training.
    """

    config: PartialLoraConfig
    geometries: dict[str, Geometry]
    masks: dict[str, ModuleMasks]
    kept: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]
    base: Fingerprint
    rounded: bool = False

    def rounded_to(self, dtype: torch.dtype | None) -> Compact:
        """Return the adapter with every floating-point value in ``dtype``; None leaves values as they are."""
        if dtype is None:
            return self

        def converted(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}

        every = [value for both in self.kept.values() for value in both.values()]
        narrowed = any(torch.promote_types(value.dtype, dtype) != dtype for value in every)
        kept = {name: converted(both) for name, both in self.kept.items()}
        return replace(self, kept=kept, whole=converted(self.whole), rounded=narrowed)


def encode(compact: Compact) -> bytes:
    """Return the file's content."""
    config, masks = compact.config, compact.masks
    modules = {}
    for name, shapes in compact.geometries.items():
        counts = [len(getattr(masks[name], axis).kept) for axis in AXES]
        modules[name] = [shapes.b, shapes.a, *counts, _digest(masks[name])]
    if config.count == "bernoulli":  # the number kept is random: it does not give the requested sparsity
        shares = shares_of(compact.geometries, config.shares)
        for name in (name for name, each in compact.geometries.items() if each.experts is None):
            modules[name] += [shares[name][axis] for axis in AXES]
    header: dict[str, Any] = {"config": _changed_settings(config, masks), "modules": modules, "base": str(compact.base)}
    if compact.rounded:
        header["rounded"] = True
    if experts := {name: each.experts for name, each in compact.geometries.items() if each.experts is not None}:
        header["experts"] = experts
        shares = shares_of(compact.geometries, config.shares)
        header["shares"] = {name: shares[name] for name in shares if name not in masks or name in experts}
    tensors = {
        name: torch.cat([value.flatten() for value in both.values()]).contiguous()
        for name, both in compact.kept.items()
    } | {name: value.detach().cpu().contiguous().clone() for name, value in compact.whole.items()}
    if config.selection != "random":
        every = [getattr(mask, axis).kept for mask in masks.values() for axis in AXES]
        tensors[_INDICES] = torch.from_numpy(np.concatenate(every).astype(np.int32))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return save(tensors, metadata={f"{_HEADER}{FORMAT}": text})


def _changed_settings(config: PartialLoraConfig, modules: Mapping[str, object]) -> dict:
    """Return the settings that are not what the file means where it leaves them out, or that it holds elsewhere."""
    default = LoraConfig().to_dict() | _ABSENT
    changed = {k: value for k, value in config.to_dict().items() if k not in _LEFT_OUT and value != default.get(k)}
    targets = changed.get("target_modules")
    if not isinstance(targets, str) and targets and set(targets) == set(modules):
        del changed["target_modules"]  # the names are in the file already
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}


def _digest(masks: ModuleMasks) -> str:
    return short(hashlib.sha256("".join(getattr(masks, axis).digest for axis in AXES).encode()))


def decode(content: bytes, path: Path) -> Compact:
    """Return the adapter that `encode` has written; raises PartialLoraError, naming ``path``, for anything else."""
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        ((key, text),) = json.loads(content[8 : 8 + size])["__metadata__"].items()
        if not key.startswith((_HEADER, _BEFORE)):
            raise ValueError(f"its header is called {key!r}")
        header, number = json.loads(text), key.removeprefix(_HEADER)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartialLoraError(
            f"{path} is broken, truncated or no compact adapter ({one_line(error)}): copy it again."
        ) from None
    if fault := other_format(None if key.startswith(_BEFORE) else int(number) if number.isdigit() else number):
        raise PartialLoraError(f"{path}: {fault}.")
    try:
        return _decoded(header, tensors)
    except PartialLoraError as error:
        raise PartialLoraError(f"{path} is broken: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, MemoryError) as error:
        raise PartialLoraError(
            f"{path} is broken: its header is not that of a compact adapter ({kind_and_line(error)})."
        ) from None


def _decoded(header: Mapping, tensors: dict[str, Tensor]) -> Compact:
    settings, modules = _ABSENT | header["config"], header["modules"]
    granularity = settings["granularity"]
    geometries, counts, kept = {}, {}, {}
    for name, (b, a, rows, columns, *_) in modules.items():
        geometries[name] = Geometry((b[0], a[1]), a=tuple(a), b=tuple(b), experts=header.get("experts", {}).get(name))
        counts[name] = dict(zip(AXES, (rows, columns), strict=True))
        if name not in tensors:
            raise PartialLoraError(f"the values of module {name} are missing.")
        trained = _trained_parts(settings)
        kept[name] = _parts(name, tensors.pop(name), geometries[name], counts[name], granularity, trained)
    masks_of: dict[str, Any] = {}
    if settings["selection"] != "random":
        sizes = [axes[axis] for axes in counts.values() for axis in AXES]
        every = tensors.pop(_INDICES)
        if every.dtype != torch.int32 or list(every.shape) != [sum(sizes)]:
            raise PartialLoraError(
                f"{_INDICES} are {list(every.shape)} of {every.dtype}: expected {sum(sizes)} of torch.int32."
            )
        parts = iter(every.split(sizes))
        masks_of["indices"] = {name: {axis: next(parts).numpy() for axis in AXES} for name in counts}
    elif settings["count"] == "bernoulli":
        masks_of["sparsity"] = {name: dict(zip(AXES, entry[5:], strict=False)) for name, entry in modules.items()}
    else:
        masks_of["sparsity"] = {  # the measured sparsity keeps as many again; that of a frozen factor says nothing
            name: {axis: max(0.0, 1 - counts[name][axis] / size) for axis, size in geometry.sizes(granularity).items()}
            for name, geometry in geometries.items()
        }
    linears = [name for name, each in geometries.items() if each.experts is None]
    if "sparsity" in masks_of:
        masks_of["sparsity"] = {name: masks_of["sparsity"][name] for name in linears} | header.get("shares", {})
    options: dict[str, Any] = {"target_modules": linears} | settings
    config = PartialLoraConfig(**options, **masks_of)
    masks = config.choose_masks(geometries)
    for name, entry in modules.items():
        if _digest(masks[name]) != entry[4]:
            raise PartialLoraError(f"the masks of {name} do not match their digest: it was trained with others.")
    base = Fingerprint.parse(header["base"])
    return Compact(config, geometries, masks, kept, tensors, base, rounded=bool(header.get("rounded")))


def _trained_parts(settings: Mapping[str, Any]) -> list[str]:
    """Return what the file holds of a module: A and B, without one that the seed draws, and the bias of B."""
    factors = "B" if settings["columns"] != MASKED else "A" if settings["rows"] != MASKED else "AB"
    return [*factors, *["bias"] * bool(settings["lora_bias"])]


def _parameter(layer: Any, adapter_name: str, part: str) -> Tensor:
    """Return the parameter of a layer that is one of `_trained_parts`."""
    factor = (layer.lora_A if part == "A" else layer.lora_B)[adapter_name]
    return factor.kept_bias if part == "bias" else factor.kept


def _parts(
    name: str, values: Tensor, geometry: Geometry, counts: Mapping, granularity: str, trained: list[str]
) -> dict[str, Tensor]:
    """Return the kept part of each ``trained`` factor, A before B, and of B's bias, out of one flat tensor."""
    shapes = {"A": [counts["columns"]], "B": [counts["rows"]], "bias": [counts["rows"]]}
    if geometry.experts is None and not GRANULARITIES[granularity].over_entries:
        shapes |= {"A": [geometry.rank, counts["columns"], *geometry.a[2:]], "B": [counts["rows"], *geometry.b[1:]]}
    shapes = {part: shapes[part] for part in trained}
    sizes = [math.prod(shape) for shape in shapes.values()]
    if values.dim() != 1 or len(values) != sum(sizes) or not values.is_floating_point():
        raise PartialLoraError(
            f"module {name} has {list(values.shape)} values of {values.dtype}: expected {sum(sizes)} numbers."
        )
    split = zip(shapes.items(), values.split(sizes), strict=True)
    return {part: value.reshape(shape) for (part, shape), value in split}


# The model: checked to be the adapter's base, and left as it was whatever goes wrong.


def _check_model(model: nn.Module, adapter_name: str) -> None:
    """Raise PartialLoraError for a model that takes no adapter of this name."""
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, LoraModel):
            raise PartialLoraError("the model has adapters of another method: load into the base model itself.")
        if adapter_name in model.peft_config:
            raise PartialLoraError(f"adapter_name is {adapter_name!r}: the model has one of that name, choose another.")
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PartialLoraError("the model has adapters but is no PeftModel: load the base model again.")
    check_unmerged(model)


def _check_base(base: nn.Module, compact: Compact, path: Path, *, values: bool) -> None:
    """Raise PartialLoraError where the base lacks a module, or differs in a shape or (``values``) the fingerprint."""
    modules = base_modules(base)
    for name, expected in compact.geometries.items():
        owner, _, parameter = name.rpartition(".")
        owner, rank = name if expected.experts is None else owner, compact.config.rank_of(name)
        if owner not in modules or (owner != name and not hasattr(modules[owner], parameter)):
            raise PartialLoraError(f"{path}: this model has no module {name}, which the adapter is for.")
        if owner == name:
            here = geometry(name, modules[name], rank)
        else:
            module = modules[owner]
            base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            here = parameter_geometry(base_layer, parameter, rank)
        if here != expected:
            raise PartialLoraError(
                f"{path}: {name} is {here.shape[0]} x {here.shape[1]} in this model (A {here.a}, B {here.b}), but"
                f" {expected.shape[0]} x {expected.shape[1]} in the adapter (A {expected.a}, B {expected.b})."
            )
    replaced = _trained_whole(base, compact.config, compact.whole)
    if values and not compact.base.agrees(fingerprint(base, exclude=replaced)):
        model = compact.config.base_model_name_or_path
        raise PartialLoraError(
            f"{path}: the weights of this model are not those of the adapter's base model"
            f"{f' ({model})' if model else ''}: load that one, anew if an adapter was merged into it; check_base=False"
            " loads the adapter anyway, for example after tokens were added."
        )


def _trained_whole(base: nn.Module, config: PartialLoraConfig, whole: Mapping[str, Tensor]) -> set[str]:
    """Return the names of base parameters that the adapter replaces, and that so say nothing about its base."""
    if not whole:
        return set()
    modules = base_modules(base)
    heads = tuple(config.modules_to_save or ())
    copied = tuple(f"{name}." for name in modules if heads and name.endswith(heads))
    trained = {name.replace(".base_layer", "") for name in whole}
    # Embeddings with trained rows count as replaced, with what is tied to them: the other rows say too little.
    tokens = config.trainable_token_indices or ()
    if isinstance(tokens, dict):
        embeddings = [module for name, module in modules.items() if name.endswith(tuple(tokens))]
    else:
        embeddings = [cast(Any, base).get_input_embeddings()] if tokens else []  # of transformers' models
    weights = []
    for module in embeddings:
        while isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        weights.append(module.weight)
    return {
        name
        for name, _, parameter in base_parameters(base)
        if name in trained or name.startswith(copied) or any(parameter is weight for weight in weights)
    }


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model's modules, parameters and settings back as they were if the block raises.

    A module's attributes are remembered by reference, and its dictionaries, lists and sets one level deep. That undoes
    code that adds, removes or freezes modules and parameters, but not values written into a tensor in place.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
    containers = [
        (value, value.copy())
        for *_, attributes in modules
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes in modules:
            module.__class__ = kind  # a model of plain LoRA becomes one of masked adapters
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in containers:  # the same objects again: others may hold them too
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        raise
