"""partial_lora.json, the file beside an ordinary LoRA adapter that tells its masked zeros from the others.

Masks cannot be read off the zeros, since B starts as all zeros. The file holds the settings they are made from, and
their digests, which the masks made again must match.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from partial_lora.adapter.selection import OF_ENTRIES, Geometry, ModuleMasks
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, CHOICES, Mask, Sparsity, assign_sparsity, kept_count, read_sparsity

FILE_NAME = "partial_lora.json"
VERSION = 1


def describe(
    masks: Mapping[str, ModuleMasks],
    geometries: Mapping[str, Geometry],
    sparsity: float | Sparsity,
    *,
    rank: int,
    granularity: str,
    selection: str,
    mask_seed: int,
    count: str,
    columns: str,
    fan_in: str,
) -> dict:
    """Return the content of the sidecar of an adapter with these ``masks``.

    Its keys: version, granularity, selection, mask_seed, count (for single entries only), columns (where A is frozen),
    fan_in (where A is drawn for the kept inputs), sparsity as in the config, and modules. A module has: rows, columns
    (the measured sparsity; the requested one for "bernoulli", whose number is random), shape [out, in], rank (where it
    is not the adapter's), a, b (the shapes of the dense factors, for masks over entries only), sha256 {rows, columns}
    of the kept indices as little-endian int64, and indices {rows, columns} where the selection is not random.
    """
    content = {"version": VERSION, "granularity": granularity, "selection": selection, "mask_seed": mask_seed}
    if granularity == "element":
        content["count"] = count
    if columns == "frozen":
        content["columns"] = columns
    if fan_in != "dense":
        content["fan_in"] = fan_in
    content |= {"sparsity": sparsity, "modules": {}}
    requested = assign_sparsity(sparsity, list(masks)) if count == "bernoulli" else None
    for module, of_module in masks.items():
        both = {axis: getattr(of_module, axis) for axis in AXES}
        entry = {axis: requested[module][axis] if requested else mask.sparsity for axis, mask in both.items()}
        entry["shape"] = list(of_module.shape)
        if geometries[module].a[0] != rank:
            entry["rank"] = geometries[module].a[0]
        if granularity in OF_ENTRIES:
            entry |= {factor: list(getattr(geometries[module], factor)) for factor in ("a", "b")}
        entry["sha256"] = {axis: mask.digest for axis, mask in both.items()}
        if selection != "random":
            entry["indices"] = {axis: mask.kept.tolist() for axis, mask in both.items()}
        content["modules"][module] = entry
    return content


def read(path: Path) -> dict:
    """Return the sidecar at ``path``, as `describe` made it, every value checked.

    Raises PartialLoraError, naming the file and the key, if it is missing, broken or of another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PartialLoraError(f"{path} cannot be read ({error.strerror}): the adapter has no masks.") from None
    except (ValueError, RecursionError) as error:
        raise PartialLoraError(f"{path} is broken: no JSON ({error}); copy the adapter's folder again.") from None
    version = content.get("version") if isinstance(content, dict) else None
    if _is_whole(version) and version != VERSION:
        raise PartialLoraError(f"{path} has version {version}: this partial-lora reads version {VERSION}, upgrade it.")
    try:
        _check(content)
    except _BrokenError as broken:
        raise PartialLoraError(f"{path} is broken: {broken}.") from None
    return content


def verify(
    masks: Mapping[str, ModuleMasks], geometries: Mapping[str, Geometry], modules: Mapping[str, dict], *, count: str
) -> None:
    """Refuse ``masks`` that differ from the sidecar's ``modules`` in modules, shapes or digests."""
    for module in [*masks, *modules]:
        if module not in modules or module not in masks:
            where = "the sidecar" if module not in modules else "this model"
            raise PartialLoraError(f"{module} is a masked module that {where} does not have.")
        entry = modules[module]
        for what, name in (("shape", "shape"), ("a factor A of shape", "a"), ("a factor B of shape", "b")):
            here = list(getattr(geometries[module], name))
            if name in entry and entry[name] != here:
                raise PartialLoraError(
                    f"{module} has {what} {here} in this model, but {entry[name]} in the adapter's {FILE_NAME}: load"
                    " the base model it was trained on."
                )
        for axis in AXES:
            mask = getattr(masks[module], axis)
            fits = count == "bernoulli" or len(mask.kept) == kept_count(mask.size, entry[axis])
            if mask.digest != entry["sha256"][axis] or not fits:
                raise PartialLoraError(
                    f"{module}: the mask of its {axis} does not match the digest in {FILE_NAME}: mask_seed,"
                    " sparsity or indices are not those the adapter was trained with."
                )


# The checks of `read`, from the whole file down to the indices of one axis.


class _BrokenError(Exception):
    """A key, its value and what was expected."""


def _check(content: object) -> None:
    _expect(isinstance(content, dict), "the content", content, "one object")
    for name in ("granularity", "selection"):
        if name in content:
            _expect_one_of(content, name, CHOICES[name])
    element, top = content.get("granularity") == "element", content.get("selection") == "top"
    entries, frozen = content.get("granularity") in OF_ENTRIES, "columns" in content
    later = [name for name in ("fan_in", "sparsity") if name in content]  # older files have neither
    optional = [*["count"] * element, *["columns"] * frozen, *later]
    _expect_keys(content, "", ["version", "granularity", "selection", "mask_seed", *optional, "modules"])
    _expect(_is_whole(content["version"]), "version", content["version"], str(VERSION))
    _expect(_is_whole(content["mask_seed"]), "mask_seed", content["mask_seed"], "a whole number")
    if element:
        _expect_one_of(content, "count", ("exact",) if top else CHOICES["count"])
    if frozen:
        _expect_one_of(content, "columns", ("frozen",))
    if "fan_in" in content:
        _expect_one_of(content, "fan_in", ("kept",))
    if "sparsity" in content:
        _check_sparsity(content["sparsity"])
    modules = content["modules"]
    _expect(isinstance(modules, dict) and modules != {}, "modules", modules, "an object with an entry for each module")
    for module, entry in modules.items():
        _check_module(entry, f"modules[{module!r}]", entries=entries, top=top)


def _check_sparsity(sparsity: object) -> None:
    _expect(not isinstance(sparsity, str), "sparsity", sparsity, "a number, or one for each module")
    try:
        read_sparsity(sparsity)
    except PartialLoraError as error:
        raise _BrokenError(f"{error}".rstrip(".")) from None


def _check_module(entry: object, key: str, *, entries: bool, top: bool) -> None:
    ranked = isinstance(entry, dict) and "rank" in entry
    _expect_keys(entry, key, [*AXES, "shape", *["rank"] * ranked, *["a", "b"] * entries, "sha256", *["indices"] * top])
    for axis in AXES:
        share = entry[axis]
        fits = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share < 1
        _expect(fits, f"{key}[{axis!r}]", share, "a sparsity in [0, 1)")
    if ranked:
        _expect(_is_whole(entry["rank"]) and entry["rank"] > 0, f"{key}['rank']", entry["rank"], "a rank")
    for name in ("shape", *["a", "b"] * entries):
        sizes = entry[name]
        fits = isinstance(sizes, list) and len(sizes) >= 2 and all(_is_whole(size) and size > 0 for size in sizes)
        fits = fits and (name != "shape" or len(sizes) == 2)
        _expect(fits, f"{key}[{name!r}]", sizes, "[out, in]" if name == "shape" else "the shape of a factor")
    shape, a, b = tuple(entry["shape"]), tuple(entry.get("a", ())), tuple(entry.get("b", ()))
    if entries:
        _expect(a[1] == shape[1], f"{key}['a']", entry["a"], f"[rank, {shape[1]}, ...], as in shape")
        fits = b[0] == shape[0] and a[0] % b[1] == 0 and len(b) == len(a)
        _expect(fits, f"{key}['b']", entry["b"], f"[{shape[0]}, rank, ...], as in shape and a")
    _expect_keys(entry["sha256"], f"{key}['sha256']", AXES)
    for axis, digest in entry["sha256"].items():
        fits = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
        _expect(fits, f"{key}['sha256'][{axis!r}]", digest, "64 hexadecimal digits")
    if top:
        _expect_keys(entry["indices"], f"{key}['indices']", AXES)
        for axis, size in Geometry(shape, a, b).sizes("element" if entries else "rows_columns").items():
            _check_indices(entry, key, axis, size)


def _check_indices(entry: dict, key: str, axis: str, size: int) -> None:
    kept, name = entry["indices"][axis], f"{key}['indices'][{axis!r}]"
    _expect(isinstance(kept, list) and all(map(_is_whole, kept)), name, kept, "whole numbers")
    try:
        mask = Mask(size, np.array(kept))
    except (PartialLoraError, OverflowError) as error:
        raise _BrokenError(f"{name}: {error}".rstrip(".")) from None
    count = kept_count(size, entry[axis])
    _expect(len(kept) == count, f"the number of {name}", len(kept), f"{count}, by the sparsity")
    _expect(mask.digest == entry["sha256"][axis], f"{key}['sha256'][{axis!r}]", entry["sha256"][axis], "its indices'")


def _expect(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        shown = repr(value)
        raise _BrokenError(f"{key} is {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {expected}")


def _expect_keys(content: object, key: str, expected: list[str] | tuple[str, ...]) -> None:
    _expect(isinstance(content, dict), key, content, f"an object with {', '.join(expected)}")
    inside = f" in {key}" if key else ""
    for name in expected:
        if name not in content:
            raise _BrokenError(f"{name}{inside} is missing")
    for name in content:
        if name not in expected:
            raise _BrokenError(f"{name}{inside} is unknown, expected {', '.join(expected)}")


def _expect_one_of(content: dict, key: str, choices: tuple[str, ...]) -> None:
    _expect(content[key] in choices, key, content[key], " or ".join(map(repr, choices)))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
