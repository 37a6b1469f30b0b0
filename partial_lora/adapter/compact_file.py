"""The file of a compact adapter, from values to bytes and back, every part of it checked.

It is safetensors, called partial_lora.safetensors. Of each module it holds one flat tensor, named as the module: the
kept part of A, then the kept part of B, row-major. What trains whole beside them (a head in modules_to_save, biases) is
there under its own name. The indices of masks that are not random are one int32 tensor, "#indices": of each module in
turn, in the order of the header, rows then columns. The header says the rest, as JSON under the key "partial_lora.1",
of which 1 is the format's version:

config    every setting of the PartialLoraConfig that is not its default, except what masks are made from
modules   {name: [shape of B, shape of A, kept of B, kept of A, digest of both masks]}; of the count "bernoulli" two
          sparsities follow, as requested for B and A
base      the fingerprint of the model the adapter belongs to, as text
rounded   true where values were rounded to a narrower dtype when written
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from partial_lora.adapter.config import PartialLoraConfig
from partial_lora.adapter.fingerprint import Fingerprint, short
from partial_lora.adapter.selection import Geometry, ModuleMasks
from partial_lora.adapter.sparsity import AXES, assign_sparsity
from partial_lora.errors import PartialLoraError

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
    for name, geometry in compact.geometries.items():
        both = [getattr(masks[name], axis) for axis in AXES]
        modules[name] = [geometry.b, geometry.a, *(len(mask.kept) for mask in both), _digest(masks[name])]
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
