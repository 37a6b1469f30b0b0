"""partial_lora.json, the file beside an ordinary LoRA adapter that says which of its zeros are masked.

Masks cannot be read off the zeros, since B starts as all zeros. The file holds what they are made from, and a digest
of each that the masks made again must match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from partial_lora.adapter.selection import AXES, ModuleMasks
from partial_lora.errors import PartialLoraError
from partial_lora.results import write_json

FILE_NAME = "partial_lora.json"
VERSION = 1


def write(folder: Path, masks: Mapping[str, ModuleMasks], *, granularity: str, selection: str, mask_seed: int) -> None:
    """Write the sidecar of an adapter with the given ``masks`` {module: masks} into ``folder``."""
    modules = {module: _entry(masks[module], with_indices=selection != "random") for module in masks}
    write_json(
        folder / FILE_NAME,
        {
            "version": VERSION,
            "granularity": granularity,
            "selection": selection,
            "mask_seed": mask_seed,
            "modules": modules,
        },
    )


def _entry(masks: ModuleMasks, *, with_indices: bool) -> dict:
    entry = {axis: getattr(masks, axis).sparsity for axis in AXES}
    entry["shape"] = list(masks.shape)
    entry["sha256"] = {axis: getattr(masks, axis).digest for axis in AXES}
    if with_indices:
        entry["indices"] = {axis: getattr(masks, axis).kept.tolist() for axis in AXES}
    return entry


def read(path: Path) -> dict:
    """The sidecar at ``path``. Raises PartialLoraError, naming it, if it is missing, broken or of another version."""
    try:
        sidecar = json.loads(path.read_text())
        version = sidecar["version"]
        complete = {"granularity", "selection", "mask_seed", "modules"} <= sidecar.keys()
        wanted = {*AXES, "shape", "sha256"} | ({"indices"} if sidecar["selection"] != "random" else set())
        complete &= all(wanted <= entry.keys() for entry in sidecar["modules"].values())
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be read ({error.strerror}): the adapter has no masks.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        complete, version = False, VERSION
    if version != VERSION:
        raise PartialLoraError(
            f"{path} has version {version!r}: this partial-lora reads version {VERSION}, upgrade it."
        )
    if not complete:
        raise PartialLoraError(f"{path} is broken: expected the partial_lora.json written beside an adapter.")
    return sidecar


def verify(masks: Mapping[str, ModuleMasks], modules: Mapping[str, dict]) -> None:
    """Refuse ``masks`` that are not those the sidecar's ``modules`` describe: other modules, shapes or digests."""
    for module in [*masks, *modules]:
        if module not in modules or module not in masks:
            where = "the sidecar" if module not in modules else "this model"
            raise PartialLoraError(f"{module} is masked in the adapter or the model, but {where} does not have it.")
        if list(masks[module].shape) != list(modules[module]["shape"]):
            raise PartialLoraError(
                f"{module} has shape {list(masks[module].shape)} in this model, but {modules[module]['shape']} in the"
                " adapter's partial_lora.json: load the base model it was trained on."
            )
        for axis in AXES:
            if getattr(masks[module], axis).digest != modules[module]["sha256"][axis]:
                raise PartialLoraError(
                    f"{module}: the mask of its {axis} does not match the digest in partial_lora.json: mask_seed,"
                    " sparsity or indices are not those the adapter was trained with."
                )
