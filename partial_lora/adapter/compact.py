"""Write and load the compact form of an adapter: its kept values, and nothing that can be made again.

The masks are made again from what they were made from, and must be those the adapter was trained with. See
`compact_file` for what the file holds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from partial_lora.adapter.config import PartialLoraConfig
from partial_lora.adapter.factor import is_sharded
from partial_lora.adapter.fingerprint import Fingerprint, base_parameters, fingerprint, short
from partial_lora.adapter.model import PartialLoraModel, module_masks
from partial_lora.adapter.selection import Geometry, ModuleMasks, assign_sparsity, geometry
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.masks import AXES

# --- The file of a compact adapter, from values to bytes and back, every part of it checked.

FILE_NAME = "partial_lora.safetensors"
VERSION = 1

_HEADER = "partial_lora."
_INDICES = "#indices"  # no module of a model can be called so and be reached
# Said elsewhere in the file, or of no meaning in it.
_LEFT_OUT = {"sparsity", "scores", "indices", "peft_type", "peft_version", "inference_mode", "auto_mapping"}


@dataclass(frozen=True)
class Compact:
    """An adapter without its zeros.

    Attributes:
        config: what it was trained with.
        geometries, masks: {module: ...}, of the same modules in the same order.
        kept: {module: {"A": tensor, "B": tensor}}, the kept part of the factors.
        whole: what trained beside them, under its name in the base model.
        base: the fingerprint of the base model.
        rounded: whether the values are narrower than they were trained.
    """

    config: PartialLoraConfig
    geometries: dict[str, Geometry]
    masks: dict[str, ModuleMasks]
    kept: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor]
    base: Fingerprint
    rounded: bool = False

    def rounded_to(self, dtype: torch.dtype | None) -> Compact:
        """The same with every floating-point value in ``dtype``; None leaves all as they are."""
        if dtype is None:
            return self
        kept = {
            name: {factor: _cast(value, dtype) for factor, value in both.items()} for name, both in self.kept.items()
        }
        every = [value for both in self.kept.values() for value in both.values()]
        narrowed = any(torch.promote_types(value.dtype, dtype) != dtype for value in every)
        whole = {name: _cast(value, dtype) for name, value in self.whole.items()}
        return replace(self, kept=kept, whole=whole, rounded=narrowed)


def encode(compact: Compact) -> bytes:
    """The file's content."""
    config, masks = compact.config, compact.masks
    shares = assign_sparsity(config.sparsity, list(masks)) if config.count == "bernoulli" else None
    modules = {}
    for name, shape in compact.geometries.items():
        both = [getattr(masks[name], axis) for axis in AXES]
        modules[name] = [shape.b, shape.a, *(len(mask.kept) for mask in both), _digest(masks[name])]
        modules[name] += [shares[name][axis] for axis in AXES] if shares else []
    header = {
        "config": _settings(config, list(masks)),
        "modules": modules,
        "base": str(compact.base),
    } | ({"rounded": True} if compact.rounded else {})
    tensors = {
        name: torch.cat([both["A"].flatten(), both["B"].flatten()]).contiguous() for name, both in compact.kept.items()
    } | {name: value.detach().cpu().contiguous().clone() for name, value in compact.whole.items()}
    if config.selection != "random":
        every = [getattr(mask, axis).kept for mask in masks.values() for axis in AXES]
        tensors[_INDICES] = torch.from_numpy(np.concatenate(every).astype(np.int32))
    return save(
        tensors, metadata={f"{_HEADER}{VERSION}": json.dumps(header, separators=(",", ":"), ensure_ascii=False)}
    )


def decode(content: bytes, path: Path) -> Compact:
    """What `encode` made; raises PartialLoraError, naming ``path``, for anything else."""
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        ((key, text),) = json.loads(content[8 : 8 + size])["__metadata__"].items()
        if not key.startswith(_HEADER):
            raise ValueError(f"its header is called {key!r}")
        header, version = json.loads(text), key.removeprefix(_HEADER)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartialLoraError(
            f"{path} is broken, truncated or no compact adapter ({' '.join(str(error).split())}): copy it again."
        ) from None
    if version != str(VERSION):
        raise PartialLoraError(
            f"{path} has version {version!r}: this partial-lora reads version {VERSION}, upgrade it."
        )
    try:
        return _decoded(header, tensors)
    except PartialLoraError as error:
        raise PartialLoraError(f"{path} is broken: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, MemoryError) as error:
        raise PartialLoraError(
            f"{path} is broken: its header is not that of a compact adapter ({type(error).__name__}: {error})."
        ) from None


def _decoded(header: Mapping, tensors: dict[str, Tensor]) -> Compact:
    settings, modules = dict(header["config"]), header["modules"]
    element = settings.get("granularity") == "element"
    geometries, counts, kept = {}, {}, {}
    for name, (b, a, rows, columns, *_) in modules.items():
        geometries[name] = Geometry((b[0], a[1]), a=tuple(a), b=tuple(b))
        counts[name] = dict(zip(AXES, (rows, columns), strict=True))
        if name not in tensors:
            raise PartialLoraError(f"the values of module {name} are missing.")
        for axis, size in geometries[name].sizes("element" if element else "rows_columns").items():
            if (
                not all(type(number) is int for number in (*a, *b, rows, columns))
                or not 1 <= counts[name][axis] <= size
            ):
                raise PartialLoraError(f"module {name} keeps {counts[name][axis]} of {size} {axis}.")
        kept[name] = _factors(name, tensors.pop(name), geometries[name], counts[name], element=element)
    masks_of: dict = {}
    if settings.get("selection", "random") != "random":
        masks_of["indices"] = _indices(tensors.pop(_INDICES), counts)
    elif settings.get("count") == "bernoulli":
        masks_of["sparsity"] = {name: dict(zip(AXES, entry[5:], strict=True)) for name, entry in modules.items()}
    else:
        granularity = settings.get("granularity", "rows_columns")
        masks_of["sparsity"] = {  # of the measured sparsity as many stay again
            name: {axis: 1 - counts[name][axis] / size for axis, size in geometry.sizes(granularity).items()}
            for name, geometry in geometries.items()
        }
    config = PartialLoraConfig(**{"target_modules": list(modules)} | settings, **masks_of)
    masks = config.choose_masks(geometries)
    for name, entry in modules.items():
        if _digest(masks[name]) != entry[4]:
            raise PartialLoraError(f"the masks of {name} do not match their digest: it was trained with others.")
    base = Fingerprint.parse(header["base"])
    return Compact(config, geometries, masks, kept, tensors, base, rounded=bool(header.get("rounded")))


def _factors(name: str, values: Tensor, geometry: Geometry, counts: Mapping, *, element: bool) -> dict[str, Tensor]:
    """The kept part of A and of B, out of one flat tensor."""
    shapes = {"A": [counts["columns"]], "B": [counts["rows"]]}
    if not element:
        shapes = {
            "A": [geometry.a[0], counts["columns"], *geometry.a[2:]],
            "B": [counts["rows"], *geometry.b[1:]],
        }
    sizes = [math.prod(shape) for shape in shapes.values()]
    if values.dim() != 1 or len(values) != sum(sizes) or not values.is_floating_point():
        raise PartialLoraError(
            f"module {name} has {list(values.shape)} values of {values.dtype}: expected {sum(sizes)} numbers."
        )
    return {
        factor: part.reshape(shape) for (factor, shape), part in zip(shapes.items(), values.split(sizes), strict=True)
    }


def _indices(every: Tensor, counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, np.ndarray]]:
    sizes = [axes[axis] for axes in counts.values() for axis in AXES]
    if every.dtype != torch.int32 or list(every.shape) != [sum(sizes)]:
        raise PartialLoraError(
            f"{_INDICES} are {list(every.shape)} of {every.dtype}: expected {sum(sizes)} of torch.int32."
        )
    parts = iter(every.split(sizes))
    return {name: {axis: next(parts).numpy() for axis in AXES} for name in counts}


def _settings(config: PartialLoraConfig, modules: list[str]) -> dict:
    default = PartialLoraConfig().to_dict()
    changed = {key: value for key, value in config.to_dict().items() if value != default[key] and key not in _LEFT_OUT}
    targets = changed.get("target_modules")
    if not isinstance(targets, str) and set(targets) == set(modules):
        del changed["target_modules"]  # the names are in the file already
    return {key: sorted(value) if isinstance(value, set) else value for key, value in changed.items()}


def _digest(masks: ModuleMasks) -> str:
    both = "".join(getattr(masks, axis).digest for axis in AXES)
    return short(hashlib.sha256(both.encode()))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


# --- Whether a model is one that a compact adapter can be read into, and by which of its parameters that is known.


def check_model(model: nn.Module, adapter_name: str) -> None:
    """Raise PartialLoraError for a model that takes no adapter of this name."""
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, PartialLoraModel):
            raise PartialLoraError("the model has adapters of another method: load into the base model itself.")
        if adapter_name in model.peft_config:
            raise PartialLoraError(f"adapter_name is {adapter_name!r}: the model has one of that name, choose another.")
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PartialLoraError("the model has adapters but is no PeftModel: load into the base model itself.")
    refuse_merged(model)


def refuse_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise PartialLoraError(f"{name} has an adapter merged into its base weight: call unmerge_adapter() first.")


def check_geometries(base: nn.Module, compact: Compact, path: Path) -> None:
    """Raise PartialLoraError, naming it, where ``base`` lacks a module of the adapter or has it in another shape."""
    modules = modules_of(base)
    for name, expected in compact.geometries.items():
        if name not in modules:
            raise PartialLoraError(f"{path}: this model has no module {name}, which the adapter is for.")
        here = geometry(name, modules[name], compact.config.r)
        if here != expected:
            raise PartialLoraError(
                f"{path}: {name} is {here.shape[0]} x {here.shape[1]} in this model (A {here.a}, B {here.b}), but"
                f" {expected.shape[0]} x {expected.shape[1]} in the adapter (A {expected.a}, B {expected.b})."
            )


def check_values(base: nn.Module, compact: Compact, path: Path) -> None:
    """Raise PartialLoraError where the fingerprint of ``base`` is not of the model the adapter belongs to."""
    if not compact.base.agrees(fingerprint(base, exclude=trained_whole(base, compact.config, compact.whole))):
        known = compact.config.base_model_name_or_path
        raise PartialLoraError(
            f"{path}: the weights of this model are not those of the base model that the adapter belongs to"
            f"{f' ({known})' if known else ''}: load that one, anew if an adapter was merged into it; check_base=False "
            "loads all the same, as where tokens were added since."
        )


def trained_whole(base: nn.Module, config: PartialLoraConfig, whole: Mapping[str, Tensor]) -> set[str]:
    """The parameters of ``base``, by name, that the adapter has of its own, so that they say nothing about the base."""
    heads = tuple(config.modules_to_save or ())
    copied = tuple(f"{name}." for name in modules_of(base) if heads and name.endswith(heads))
    own = {name.replace(".base_layer", "") for name in whole}
    tokens = [module.weight for module in _token_embeddings(base, config)]  # and what is tied to them
    return {
        name
        for name, _, parameter in base_parameters(base)
        if name in own or name.startswith(copied) or any(parameter is weight for weight in tokens)
    }


def _token_embeddings(base: nn.Module, config: PartialLoraConfig) -> list[nn.Module]:
    """The embeddings of which rows train (trainable_token_indices), whose other rows say too little about the base."""
    tokens = config.trainable_token_indices
    if not tokens:
        return []
    if isinstance(tokens, dict):
        found = [module for name, module in modules_of(base).items() if name.endswith(tuple(tokens))]
    else:
        found = [base.get_input_embeddings()]
    return [_without_wrapper(module) for module in found]


def _without_wrapper(module: nn.Module) -> nn.Module:
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module


def modules_of(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base model by their names as loaded, whether or not torch.compile has wrapped it since."""
    return {name.replace("_orig_mod.", ""): module for name, module in base.named_modules()}


# --- A model that is as it was before, whatever went wrong in between.

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model's modules, parameters and settings back as they were if the block raises.

    Everything a module holds is remembered by reference, and its dictionaries, lists and sets one level deep: enough
    for code that puts modules and parameters in, takes them out or freezes them. Values written into a tensor in place
    are not undone.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, dict(vars(module)), _containers(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, containers in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                _refill(container, content)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        raise


def _containers(module: nn.Module) -> list[tuple[object, object]]:
    held = [value for value in vars(module).values() if isinstance(value, _CONTAINERS)]
    return [(container, copy.copy(container)) for container in held]


def _refill(container: object, content: object) -> None:
    """Give a container its former content, without replacing it: others may hold it too."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def write_compact(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> Path:
    """Write what an adapter keeps into ``folder``, made if need be, and give the file's path.

    The file takes 4 bytes a kept value in float32 (2 in bfloat16), those of a head in modules_to_save included, 4 bytes
    an index where the selection is "top", and less than 400 bytes a module (a head is one, where there are only one
    or two others).

    Args:
        model: any PEFT model with a Partial-LoRA adapter called ``adapter_name``, not merged.
        dtype: torch.float32 or torch.bfloat16, to which values are rounded; None writes them as trained.

    Raises PartialLoraError, and writes nothing, where there is no such adapter, or it is plain LoRA, merged or sharded.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise PartialLoraError(f"dtype is {dtype}: expected torch.float32, torch.bfloat16, or None for as trained.")
    config = _config_of(model, adapter_name)
    base = model.get_base_model()
    masks = module_masks(model, adapter_name)
    modules = modules_of(base)
    whole = {_plain(key): value for key, value in _whole(model, adapter_name, masks).items()}
    compact = Compact(
        config=config,
        geometries={name: geometry(name, modules[name], config.r) for name in masks},
        masks=masks,
        kept={name: _kept(modules[name], adapter_name) for name in masks},
        whole=whole,
        base=fingerprint(base, exclude=trained_whole(base, config, whole)),
    ).rounded_to(dtype)
    path = Path(folder) / FILE_NAME
    content = encode(compact)
    if decode(content, path).masks != masks:
        raise PartialLoraError(f"adapter {adapter_name!r}: its masks are not those that its config makes again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be written ({error.strerror}).") from None
    return path


def read_compact(folder: str | Path) -> tuple[PartialLoraConfig, dict[str, Tensor]]:
    """The config and the kept tensors of a compact adapter, checked as far as they can be without its base model.

    Tensors are called "MODULE.lora_A" (of rows and columns: rank × kept columns), "MODULE.lora_B" (kept rows × rank),
    and as in the base model what trained whole; single entries come as lists (kept,). Raises PartialLoraError, naming
    the file, where it is missing, truncated or broken, and where the masks do not match their digests.
    """
    compact = _read(folder)
    factors = {f"{name}.lora_{factor}": value for name, both in compact.kept.items() for factor, value in both.items()}
    return compact.config, factors | compact.whole


def load_compact(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    check_base: bool = True,
) -> PeftModel:
    """The base ``model`` with the compact adapter in ``folder``, masked, its values as they were written, bit for bit.

    A PeftModel with other Partial-LoRA adapters gets this one beside them, not activated, as by PEFT's load_adapter.
    Values that were rounded when written load in the dtype PEFT gives an adapter (float32 for a base in half
    precision). Everything else is as with PeftModel.from_pretrained.

    check_base: False takes it on trust that the values of the base are those the adapter was trained over, where the
    fingerprint cannot know: rows of an embedding that `resize_token_embeddings` has drawn anew, say.

    Raises PartialLoraError, and leaves the model as it was, for what `read_compact` refuses, a missing module, a wrong
    shape, another base model (see `fingerprint`) and a name that is taken.
    """
    compact = _read(folder)
    path = Path(folder) / FILE_NAME
    is_adapted = isinstance(model, PeftModel)
    check_model(model, adapter_name)
    base = model.get_base_model() if is_adapted else model
    check_geometries(base, compact, path)
    if check_base:
        check_values(base, compact, path)
    config = compact.config
    config.inference_mode = not is_trainable
    try:
        with unchanged_on_error(model):
            if is_adapted:
                adapted = model
                adapted.add_adapter(adapter_name, config)
                if is_trainable:
                    adapted.set_requires_grad(adapter_name)
            else:
                kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                adapted = kind(model, config, adapter_name)
            _check_built(adapted, compact, adapter_name)
            _fill(adapted, compact, adapter_name)
            if not is_trainable:
                adapted.eval()
    except (PartialLoraError, ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise PartialLoraError(f"{path} does not fit this model: {reason}") from error
    return adapted


def _read(folder: str | Path) -> Compact:
    path = Path(folder) / FILE_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be read ({error.strerror}): expected a compact adapter.") from None
    return decode(content, path)


def _config_of(model: nn.Module, adapter_name: str) -> PartialLoraConfig:
    """The config of an adapter that can be written; raises PartialLoraError for any other."""
    if not isinstance(model, PeftModel):
        raise PartialLoraError(f"a compact adapter is written from a PeftModel, not from a {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise PartialLoraError(f"adapter_name is {adapter_name!r}: the model has {known}.")
    config = model.peft_config[adapter_name]
    if not isinstance(config, PartialLoraConfig):
        raise PartialLoraError(
            f"adapter {adapter_name!r} is a {type(config).__name__}, which masks nothing: use save_pretrained."
        )
    refuse_merged(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise PartialLoraError(f"{name} is spread over processes: use save_pretrained, which puts it together.")
    return config


def _check_built(adapted: PeftModel, compact: Compact, adapter_name: str) -> None:
    """Raise PartialLoraError where the adapter just built has other masks or tensors than the file."""
    if module_masks(adapted, adapter_name) != compact.masks:
        raise PartialLoraError("the masks made again for this model are not those of the file.")
    here = {_plain(key): value for key, value in _whole(adapted, adapter_name, compact.masks).items()}
    for name in sorted(here.keys() ^ compact.whole.keys()):
        where = "the file" if name in here else "this model"
        raise PartialLoraError(f"{name} trains beside the adapter, but {where} does not have it.")
    for name, value in sorted(compact.whole.items()):
        if here[name].shape != value.shape:
            raise PartialLoraError(
                f"{name} is {list(here[name].shape)} in this model, but {list(value.shape)} in the file."
            )


def _fill(adapted: PeftModel, compact: Compact, adapter_name: str) -> None:
    """Put the file's values into the adapter just built."""
    modules = modules_of(adapted.get_base_model())
    for name, factors in compact.kept.items():
        for factor, value in factors.items():
            own = getattr(modules[name], f"lora_{factor}")[adapter_name].kept
            dtype = own.dtype if compact.rounded else value.dtype
            own.data = value.to(own.device, dtype).reshape(own.shape)
    for name, module in modules.items():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key, own in module.modules_to_save[adapter_name].named_parameters():
                value = compact.whole[f"{name}.{key}"]
                own.data = own.data.to(torch.promote_types(own.dtype, value.dtype))  # as wide as what it is to hold
    with torch.no_grad():
        for key, own in _whole(adapted, adapter_name, compact.masks).items():
            own.copy_(compact.whole[_plain(key)])


def _kept(layer: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    factors = {"A": layer.lora_A[adapter_name], "B": layer.lora_B[adapter_name]}
    return {name: factor.kept.detach().cpu() for name, factor in factors.items()}


def _whole(model: PeftModel, adapter_name: str, masked: Mapping[str, object]) -> dict[str, Tensor]:
    """What PEFT saves of an adapter beside the masked factors, by PEFT's keys; the tensors are the model's own."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    factors = {f"{name}.lora_{factor}.weight" for name in masked for factor in "AB"}
    again = (".modules_to_save.", ".original_module.")  # with bias="all", biases of a head are there once more
    return {
        key: value
        for key, value in state.items()
        if _plain(key) not in factors and not any(part in key for part in again)
    }


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.").replace("_orig_mod.", "")
