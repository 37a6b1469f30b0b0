"""partial_lora.json, the file beside an ordinary LoRA adapter that tells its masked zeros from the others.

Masks cannot be read off the zeros, since B starts as all zeros. The file holds the settings they are made from, and
their digests, which the masks made again must match.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partial_lora.adapter.selection import Geometry, ModuleMasks, shares_of
from partial_lora.errors import PartialLoraError, kind_and_line
from partial_lora.files import FORMAT, other_format, read_json
from partial_lora.masks import AXES, CHOICES, GRANULARITIES

FILE_NAME = "partial_lora.json"
LARGEST = 2**30  # bytes: masks over entries with 87 % sparsity at rank 64 in all modules of a model of 70B
SETTINGS = ("mask_seed", "sparsity", *CHOICES, "row_exponent", "column_exponent")
SETTINGS += ("r", "rank_pattern", "alpha_pattern")  # adapter_config.json has one rank and one alpha
"""Names of the config's settings that the file holds."""


def describe(masks: Mapping[str, ModuleMasks], geometries: Mapping[str, Geometry], settings: Mapping[str, Any]) -> dict:
    """Return the content of the sidecar of an adapter with these ``masks``.

    Its keys: format, the `SETTINGS` as in the config, and modules. A module has: rows, columns (the measured sparsity;
    the requested one for "bernoulli", whose number is random), shape [out, in], experts (of a parameter), a, b (the
    shapes of the dense factors, for masks over entries only), sha256 {rows, columns} of the kept indices as
    little-endian int64, and indices {rows, columns} where the selection is not random.
    """
    content: dict[str, Any] = {"format": FORMAT, **{key: settings[key] for key in SETTINGS}, "modules": {}}
    requested = shares_of(geometries, settings["sparsity"]) if settings["count"] == "bernoulli" else {}
    for module, of_module in masks.items():
        both = {axis: getattr(of_module, axis) for axis in AXES}
        measured = {axis: mask.sparsity for axis, mask in both.items()}
        entry: dict[str, Any] = {**requested.get(module, measured)}
        entry["shape"] = list(of_module.shape)
        if geometries[module].experts is not None:
            entry["experts"] = geometries[module].experts
        if geometries[module].experts is not None or GRANULARITIES[settings["granularity"]].over_entries:
            entry |= {factor: list(getattr(geometries[module], factor)) for factor in ("a", "b")}
        entry["sha256"] = {axis: mask.digest for axis, mask in both.items()}
        if settings["selection"] != "random":
            entry["indices"] = {axis: mask.kept.tolist() for axis, mask in both.items()}
        content["modules"][module] = entry
    return content


def check_size(masks: Mapping[str, ModuleMasks]) -> None:
    """Raise PartialLoraError for masks whose indices would make a file that is too large to be read."""
    kept = [getattr(of_module, axis) for of_module in masks.values() for axis in AXES]
    size = sum(len(mask.kept) * (len(str(mask.size)) + 1) for mask in kept)
    if size > LARGEST:
        raise PartialLoraError(
            f"selection='top': its indices would make {FILE_NAME} larger than {LARGEST / 2**30:g} GiB: expected masks"
            " that keep less, or selection='random'; raise sparsity, or lower r."
        )


def read(path: Path) -> dict:
    """Return the sidecar at ``path``, as `describe` made it, with every key that it should have and no other.

    Values are checked later: by the config made of `settings`, and by `verify`. Raises PartialLoraError, naming the
    file, if it is missing, broken or of another format.
    """
    try:
        content = read_json(path, LARGEST)
        other = other_format(content.get("format")) if "modules" in content else None
        if other is None:
            _check_keys(content, "it", {"format", *SETTINGS, "modules"})
            if content["granularity"] not in GRANULARITIES:
                raise ValueError(f"granularity is {content['granularity']!r}")
            needed = {*AXES, "shape", "sha256"}
            needed |= {"a", "b"} if GRANULARITIES[content["granularity"]].over_entries else set()
            needed |= {"indices"} if content["selection"] == "top" else set()
            for module, entry in content["modules"].items():
                of_parameter = {"experts", "a", "b"} if "experts" in entry else set()
                _check_keys(entry, f"modules[{module!r}]", needed | of_parameter)
                _check_keys(entry["sha256"], f"modules[{module!r}]['sha256']", set(AXES))
            if isinstance(content["sparsity"], str):
                raise ValueError("sparsity is no number, or one for each module")
    except OSError as error:
        raise PartialLoraError(
            f"{path} cannot be read ({error.strerror}): an adapter without it has no masks, and"
            " PeftModel.from_pretrained alone loads it."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = kind_and_line(error)
        raise PartialLoraError(f"{path} is broken ({reason}): copy the adapter's folder again.") from None
    if other:
        raise PartialLoraError(f"{path}: {other}.")
    return content


def _check_keys(content: Mapping, name: str, needed: set[str]) -> None:
    """Raise ValueError unless a mapping has all keys that it needs and none that is unknown, as of a later version."""
    if missing := sorted(needed - content.keys()):
        raise ValueError(f"{name} has no {missing[0]}")
    if unknown := sorted(content.keys() - needed):
        raise ValueError(f"{name} has {unknown[0]}, which is unknown")


def settings(content: Mapping) -> dict[str, Any]:
    """Return the settings of the config that a sidecar was made of."""
    options = {key: content[key] for key in SETTINGS}
    if content["selection"] == "top":
        options["indices"] = {module: entry["indices"] for module, entry in content["modules"].items()}
    return options


def verify(masks: Mapping[str, ModuleMasks], geometries: Mapping[str, Geometry], modules: Mapping[str, dict]) -> None:
    """Refuse ``masks`` that are not of the sidecar's ``modules``, or differ in shapes or digests."""
    if missing := sorted(modules.keys() - masks.keys()):
        raise PartialLoraError(f"this model has no target module {missing[0]}, which the saved adapter has.")
    for module in masks:
        if module not in modules:
            raise PartialLoraError(f"{module} is a masked module that {FILE_NAME} does not have.")
        entry = modules[module]
        for term, name in (("shape", "shape"), ("a factor A of shape", "a"), ("a factor B of shape", "b")):
            here = list(getattr(geometries[module], name))
            if name in entry and entry[name] != here:
                raise PartialLoraError(
                    f"{module} has {term} {here} in this model, but {entry[name]} in the adapter's {FILE_NAME}: load"
                    " the base model it was trained on."
                )
        for axis in AXES:
            if getattr(masks[module], axis).digest != entry["sha256"][axis]:
                raise PartialLoraError(
                    f"{module}: the mask of its {axis} does not match the digest in {FILE_NAME}: mask_seed,"
                    " sparsity or indices are not those the adapter was trained with."
                )
