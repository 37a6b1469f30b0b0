"""The sparsity setting: from a number, a dictionary or a calibration.json to one sparsity for each module and axis."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Real
from os import PathLike
from pathlib import Path

from partial_lora.errors import PartialLoraError

AXES = ("rows", "columns")

Sparsity = float | dict[str, dict[str, float]]
"""One sparsity for every row and column, or {module name or pattern: {"rows": s, "columns": s}}."""


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
        modules = json.loads(path.read_text(encoding="utf-8"))["modules"]
        found = {module: {axis: axes[axis]["sparsity"] for axis in AXES} for module, axes in modules.items()}
    except OSError as error:
        raise PartialLoraError(f"sparsity names {path}, which cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PartialLoraError(
            f"sparsity names {path}, which is no calibration.json: expected modules.<name>.rows|columns.sparsity."
        ) from None
    try:
        return read_sparsity(found)
    except PartialLoraError as error:
        raise PartialLoraError(f"{path}: {error}") from None


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
        if entry not in chosen and not any(_matches(entry, module) for module in modules):
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
