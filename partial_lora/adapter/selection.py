"""From settings to masks: which sparsity each module gets, and which of its rows and columns stay."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path

import numpy as np

from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask, kept_count

AXES = ("rows", "columns")

Sparsity = float | dict[str, dict[str, float]]
"""One sparsity for every row and column, or {module name or pattern: {"rows": s, "columns": s}}."""


@dataclass(frozen=True)
class Geometry:
    """What masks have to know of a module before they can be made.

    Attributes:
        shape: (out, in) of W; for a convolution its output and input channels.
        a: the shape of the dense A, (rank, in) or (rank, in, height, width).
        b: the shape of the dense B, (out, rank) or (out, rank / groups, 1, 1).
    """

    shape: tuple[int, int]
    a: tuple[int, ...]
    b: tuple[int, ...]


@dataclass(frozen=True)
class ModuleMasks:
    """The masks of one module with W (out × in): which part of B (out × rank) and of A (rank × in) stays.

    Masks of whole rows and columns: ``rows`` over the ``out`` rows of B, ``columns`` over the ``in`` columns of A.
    Masks of single entries: ``rows`` over the entries of B, ``columns`` over those of A, both flat and row-major;
    their sizes are then not those of W, and ``shape`` has to say (out, in).
    """

    rows: Mask
    columns: Mask
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        shape = (self.rows.size, self.columns.size) if self.shape is None else tuple(self.shape)
        object.__setattr__(self, "shape", shape)

    @property
    def element(self) -> bool:
        """Whether single entries are masked; at rank 1 a row of B, a column of A is one entry: the same masks."""
        return (self.rows.size, self.columns.size) != self.shape


def read_sparsity(sparsity: float | Mapping | str | PathLike) -> Sparsity:
    """The sparsity setting in its one canonical form, whatever form the user gave it in.

    Takes a number, {module name or pattern: number or {"rows": number, "columns": number}}, or the path of a
    calibration.json. Raises PartialLoraError naming the entry that is no sparsity.
    """
    if isinstance(sparsity, (str, PathLike)):
        return _calibrated_sparsity(Path(sparsity))
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise PartialLoraError("sparsity is empty: give a number or at least one module with its sparsity.")
        return {str(module): _both_axes(module, value) for module, value in sparsity.items()}
    return _share(sparsity, "sparsity")


def _calibrated_sparsity(path: Path) -> Sparsity:
    try:
        modules = json.loads(path.read_text())["modules"]
        found = {module: {axis: axes[axis]["sparsity"] for axis in AXES} for module, axes in modules.items()}
    except OSError as error:
        raise PartialLoraError(f"sparsity names {path}, which cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PartialLoraError(
            f"sparsity names {path}, which is no calibration.json: expected modules.<name>.rows|columns.sparsity."
        ) from None
    return read_sparsity(found)


def _both_axes(module: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        share = _share(value, f"sparsity[{module!r}]")
        return dict.fromkeys(AXES, share)
    if set(value) != set(AXES):
        raise PartialLoraError(f"sparsity[{module!r}] has {sorted(map(str, value))}: expected rows and columns.")
    return {axis: _share(value[axis], f"sparsity[{module!r}][{axis!r}]") for axis in AXES}


def _share(value: object, key: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise PartialLoraError(f"{key} is {value!r}: it is the share removed, a number in [0, 1).")
    return float(value)


def assign_sparsity(sparsity: Sparsity, modules: list[str]) -> dict[str, dict[str, float]]:
    """One {"rows": s, "columns": s} for each of ``modules``, in their order.

    A module takes the entry of its own full name, else of the first pattern that ends it (PEFT's rule for patterns:
    the whole name, or what follows a dot). Raises PartialLoraError for a module without an entry, and for an entry
    without a module.
    """
    if not isinstance(sparsity, dict):
        return {module: dict.fromkeys(AXES, sparsity) for module in modules}
    chosen = {module: _entry_of(module, sparsity) for module in modules}
    for module, entry in chosen.items():
        if entry is None:
            raise PartialLoraError(
                f"sparsity has no entry for the target module {module}: add one, or do not target it."
            )
    for entry in sparsity:
        if not any(_matches(entry, module) for module in modules):
            raise PartialLoraError(f"sparsity names {entry!r}, which matches no target module (first: {modules[0]}).")
    return {module: sparsity[entry] for module, entry in chosen.items()}


def _entry_of(module: str, sparsity: Mapping) -> str | None:
    if module in sparsity:
        return module
    return next((entry for entry in sparsity if _matches(entry, module)), None)


def _matches(entry: str, module: str) -> bool:
    try:
        return entry == module or re.match(rf"(.*\.)?({entry})$", module) is not None
    except re.error:
        raise PartialLoraError(
            f"sparsity names {entry!r}, which is neither a module nor a regular expression."
        ) from None


def random_masks(geometries: Mapping[str, Geometry], sparsity: Sparsity, *, mask_seed: int) -> dict[str, ModuleMasks]:
    """Random masks for modules of the given ``geometries`` {module: geometry}: the selection "random"."""
    shares = assign_sparsity(sparsity, list(geometries))
    return {
        module: ModuleMasks(
            *(
                Mask.random(size, shares[module][axis], mask_seed=mask_seed, module=module, axis=axis)
                for axis, size in zip(AXES, geometry.shape, strict=True)
            )
        )
        for module, geometry in geometries.items()
    }


def given_masks(geometries: Mapping[str, Geometry], indices: Mapping[str, Mapping]) -> dict[str, ModuleMasks]:
    """Masks that keep the given ``indices`` {module: {"rows": [...], "columns": [...]}}: the selection "top"."""
    for module in indices:
        if module not in geometries:
            raise PartialLoraError(f"indices names {module!r}, which is no target module.")
    for module in geometries:
        if module not in indices:
            raise PartialLoraError(f"indices has no entry for the target module {module}: selection 'top' needs one.")
    return {module: _given_mask(module, geometry.shape, indices[module]) for module, geometry in geometries.items()}


def _given_mask(module: str, shape: tuple[int, int], kept: Mapping) -> ModuleMasks:
    try:
        return ModuleMasks(*(Mask(size, np.asarray(kept[axis])) for axis, size in zip(AXES, shape, strict=True)))
    except KeyError as axis:
        raise PartialLoraError(f"indices[{module!r}] has no {axis}: expected rows and columns.") from None
    except PartialLoraError as error:
        raise PartialLoraError(f"indices[{module!r}]: {error}") from None


def check_counts(masks: Mapping[str, ModuleMasks], sparsity: Sparsity) -> None:
    """Refuse given masks that keep another number of rows or columns than ``sparsity`` says."""
    for module, shares in assign_sparsity(sparsity, list(masks)).items():
        for axis in AXES:
            mask = getattr(masks[module], axis)
            if len(mask.kept) != kept_count(mask.size, shares[axis]):
                raise PartialLoraError(
                    f"indices[{module!r}][{axis!r}] keeps {len(mask.kept)} of {mask.size}, but its sparsity"
                    f" {shares[axis]} keeps {kept_count(mask.size, shares[axis])}: give one of the two."
                )
