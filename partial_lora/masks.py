"""Masks: the kept rows, columns or single entries of a module, as a value that checks itself; and their sparsities."""

from __future__ import annotations

import hashlib
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Literal, TypedDict, get_args

import numpy as np

from partial_lora.errors import PartialLoraError
from partial_lora.files import other_format, read_json

AXES = ("rows", "columns")
PAPER_BUDGET = 0.13  # of dense LoRA's trainable parameters, in the paper's abstract

Granularity = Literal["rows_columns", "element", "units", "groups"]
Selection = Literal["random", "top"]
Count = Literal["exact", "bernoulli"]
Rows = Literal["masked", "one_hot"]
Columns = Literal["masked", "frozen", "one_hot"]
FanIn = Literal["dense", "kept"]
MASKED = "masked"  # of rows or columns: their factor trains, where the mask keeps it


GATHER_DENSITY = 0.5
"""Up to this density of features, gathering them beats matrix products with the zero-filled factor."""

Sparsity = Mapping[str, Mapping[str, float]]
"""The share removed of each module and axis: {module: {"rows": s, "columns": s}}."""


def kept_count(size: int, sparsity: float) -> int:
    """Return how many of ``size`` rows, columns or entries stay: ``max(1, floor((1 - sparsity) * size + 0.5))``.

    At least one always stays, so that every module keeps an adapter. A measured sparsity, ``1 - kept / size``, gives
    the same number again: rounding moves the product by less than ``size * 2**-52``. Raises PartialLoraError for a
    sparsity outside [0, 1).
    """
    return max(1, math.floor((1 - _checked(sparsity)) * size + 0.5))


def _checked(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise PartialLoraError(f"sparsity is {sparsity}: it is the share removed and must be in [0, 1).")
    return sparsity


@dataclass(frozen=True, eq=False)
class Mask:
    """A subset of ``size`` rows, columns or entries: ``kept`` holds the indices that stay, ascending, as int64.

    Two masks are equal when they keep the same indices of the same size. Raises PartialLoraError when ``kept`` is
    empty, out of order, repeated or out of range.
    """

    size: int
    kept: np.ndarray

    def __post_init__(self) -> None:
        kept = np.asarray(self.kept)
        if kept.ndim != 1 or kept.size == 0 or kept.dtype.kind not in "iu":
            raise PartialLoraError(f"a mask over {self.size} entries needs a non-empty list of whole numbers to keep.")
        kept = kept.astype(np.int64)  # a copy: the mask owns its indices
        if kept[0] < 0 or kept[-1] >= self.size or (kept[1:] <= kept[:-1]).any():
            raise PartialLoraError(
                f"a mask over {self.size} entries needs ascending, distinct indices from 0 to {self.size - 1}."
            )
        kept.flags.writeable = False
        object.__setattr__(self, "kept", kept)

    @classmethod
    def full(cls, size: int) -> Mask:
        """Return the mask that keeps everything."""
        return cls(size, np.arange(size, dtype=np.int64))

    @classmethod
    def random(cls, size: int, sparsity: float, *, mask_seed: int, module: str, axis: str) -> Mask:
        """Return the random mask of one module and axis ("rows" or "columns"), which keeps the smallest random keys.

        Single entries are masked alike: ``size`` is then their number, "rows" stands for B and "columns" for A.

        The keys depend on the seed, the module's name and the axis only. So masks of one seed are nested across
        sparsities, and neither the device, the rank, the number of processes nor the order of injection changes them.
        """
        return cls._lowest(random_keys(size, mask_seed=mask_seed, module=module, axis=axis), sparsity)

    @classmethod
    def bernoulli(cls, size: int, sparsity: float, *, mask_seed: int, module: str, axis: str) -> Mask:
        """Return the mask that keeps each row, column or entry independently with probability ``1 - sparsity``.

        Keys are drawn as in `random`; keys below ``(1 - sparsity) * 2**64`` stay, and the lowest always does. So the
        number kept is random too, and masks of one seed are nested across sparsities.
        """
        keys = random_keys(size, mask_seed=mask_seed, module=module, axis=axis)
        limit = math.ceil((1 - _checked(sparsity)) * 2**64)  # exact: a product with a power of two does not round
        kept = np.flatnonzero(keys < limit) if limit < 2**64 else np.arange(size)
        return cls(size, kept if kept.size else np.array([keys.argmin()]))

    @classmethod
    def top(cls, scores: np.ndarray, sparsity: float) -> Mask:
        """Return the mask that keeps the largest of ``scores`` (size,); of equal scores the lower index stays."""
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
            raise PartialLoraError("importance scores must be one list of finite numbers.")
        return cls._lowest(-scores, sparsity)

    @classmethod
    def _lowest(cls, keys: np.ndarray, sparsity: float) -> Mask:
        count = kept_count(len(keys), sparsity)
        highest = np.partition(keys, count - 1)[count - 1]  # of those that stay; sorting all takes five times as long
        kept = np.flatnonzero(keys <= highest)
        if len(kept) > count:  # of equals the lower index stays
            below = np.flatnonzero(keys < highest)
            kept = np.union1d(below, np.setdiff1d(kept, below)[: count - len(below)])
        return cls(len(keys), kept)

    @property
    def density(self) -> float:
        """The share kept, as measured."""
        return len(self.kept) / self.size

    @property
    def reach(self) -> float:
        """The share of rows, columns or entries that are not fixed at zero."""
        return self.density

    @property
    def sparsity(self) -> float:
        """The share removed, as measured: rounding to whole rows makes it differ from the requested one."""
        return 1 - self.density

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the kept indices as little-endian int64."""
        return hashlib.sha256(self.kept.astype("<i8").tobytes()).hexdigest()

    def dense(self) -> np.ndarray:
        """Return the mask as booleans (size,), True where kept."""
        dense = np.zeros(self.size, dtype=bool)
        dense[self.kept] = True
        return dense

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(other) is type(self) and all(map(np.array_equal, self._values(), other._values()))

    def __hash__(self) -> int:
        return hash((self.size, self.digest))

    def __deepcopy__(self, memo: dict) -> Mask:
        return self  # nobody can change it

    def __reduce__(self) -> tuple:
        return type(self), self._values()  # through the constructor, which makes the indices read-only

    def _values(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class TiedMask(Mask):
    """A mask that sets nothing to zero: each removed row or column repeats a kept one, with sign 1 or −1.

    So rows fall into one group for each kept row, of sizes that differ by at most one, and a group shares its values.

    Attributes:
        places: for each of the ``size``, the place in ``kept`` of the one that it repeats, (size,).
        signs: 1 or −1 for each, (size,); 1 for the kept ones.
    """

    places: np.ndarray
    signs: np.ndarray

    @classmethod
    def tied(cls, size: int, sparsity: float, *, mask_seed: int, module: str, axis: str) -> TiedMask:
        """Draw the groups of one module and axis, by the keys of `random`, so that the same ones are kept."""
        keys = random_keys(size, mask_seed=mask_seed, module=module, axis=axis)
        order, count = np.argsort(keys, kind="stable"), kept_count(size, sparsity)
        kept, places, signs = np.sort(order[:count]), np.empty(size, dtype=np.int64), np.ones(size, dtype=np.int64)
        places[order] = np.searchsorted(kept, order[np.arange(size) % count])
        others = order[count:]
        signs[others] -= 2 * (keys[others] & np.uint64(1)).astype(np.int64)
        return cls(size, kept, places, signs)

    @property
    def reach(self) -> float:
        """The share that is not fixed at zero: all."""
        return 1.0


def _of_units(size: int, sparsity: float, *, shape: tuple[int, ...], mask_seed: int, module: str, axis: str) -> Mask:
    """Draw rows of B, or columns of A, for each unit of the rank by itself, as a mask over the factor's entries.

    Units take the next ones in turn from one random order, which starts again at its end. So units are disjoint while
    it lasts, and 16 units of 6 % reach 96 % of W's rows.
    """
    kept = np.zeros(shape, dtype=bool)
    of_units = kept.swapaxes(0, 1) if axis == "rows" else kept  # (units, rows or columns, ...): a view of `kept`
    units, features = of_units.shape[:2]
    order = np.argsort(random_keys(features, mask_seed=mask_seed, module=module, axis=axis), kind="stable")
    count = kept_count(features, sparsity)
    taken = order[np.arange(units * count).reshape(units, count) % features]
    of_units[np.arange(units)[:, None], taken] = True
    return Mask(size, np.flatnonzero(kept))


class Draw(TypedDict):
    """The inputs that A is drawn for, and the power of the density of rows that divides the scaling."""

    fan_in: FanIn
    row_exponent: float


AS_PEFT: Draw = {"fan_in": "dense", "row_exponent": 0.0}
_BY_DENSITY: Draw = {"fan_in": "kept", "row_exponent": 1.0}  # so that dense LoRA's learning rate suits every density


@dataclass(frozen=True)
class Form:
    """Form of the masks of a granularity: all that depends on which one it is.

    Attributes:
        random: draws the mask of one module and axis, (size, sparsity, *, mask_seed, module, axis); where units are
            `apart` also (shape), that of the dense factor.
        draw: how A is drawn and the adapter scaled where nothing is set (docs/concepts/learning-rates.md). Single
            entries keep PEFT's draw: with the other they scored less (results/race/race.md).
        over_entries: masks are over the entries of B and A, and not over rows and columns of W.
        single: a budget counts single entries; else rows of B and columns of A.
        ranked: scores or indices may choose what is kept.
        rate_power: the learning rate to try first grows with the density to the power of minus this.
    """

    random: Callable[..., Mask]
    draw: Draw
    over_entries: bool = False
    single: bool = False
    ranked: bool = True
    rate_power: float = 0.0

    @property
    def apart(self) -> bool:
        """True where each unit of the rank keeps rows and columns of its own."""
        return self.over_entries and not self.single

    def drawn(self, count: str) -> Callable[..., Mask]:
        """Return what draws a mask, as `random` does, that keeps an exact number or, "bernoulli", each by itself."""
        return Mask.bernoulli if count == "bernoulli" else self.random

    @property
    def tied(self) -> bool:
        """True where no entry is zero, so that the density moves nothing."""
        return self.random == TiedMask.tied


GRANULARITIES: dict[str, Form] = {
    "rows_columns": Form(Mask.random, _BY_DENSITY),
    "element": Form(Mask.random, AS_PEFT, over_entries=True, single=True, rate_power=1 / 6),
    "units": Form(_of_units, _BY_DENSITY, over_entries=True, ranked=False),
    "groups": Form(TiedMask.tied, _BY_DENSITY, ranked=False),
}
CHOICES: dict[str, tuple[str, ...]] = {  # of a mask, of the factors under it, and of how A is drawn
    "granularity": tuple(GRANULARITIES),
    "selection": get_args(Selection),
    "count": get_args(Count),
    "rows": get_args(Rows),
    "columns": get_args(Columns),
    "fan_in": get_args(FanIn),
}


def check_factors(granularity: str, rows: str, columns: str, name: str = "") -> None:
    """Refuse what does not go together: both factors frozen, or one of them under masks that tie features.

    name: of the settings in front of their keys. Raises PartialLoraError, naming the key.
    """
    if rows != MASKED and columns != MASKED:
        raise PartialLoraError(f"{name}rows={rows}: expected masked beside columns={columns}, or nothing would train")
    if GRANULARITIES[granularity].tied and (rows, columns) != (MASKED, MASKED):
        raise PartialLoraError(f"{name}granularity={granularity}: expected another where a factor is frozen")


def random_keys(size: int, *, mask_seed: int, module: str, axis: str) -> np.ndarray:
    """Draw a 64-bit number for each row, column or entry (size,), from seed, module name and axis alone."""
    entropy = hashlib.sha256(f"{mask_seed}/{module}/{axis}".encode()).digest()[:16]
    return np.random.PCG64(int.from_bytes(entropy, "big")).random_raw(size)


# The sparsity setting: from a number, a dictionary or a calibration.json to one sparsity for each module and axis.


def read_sparsity(sparsity: float | Mapping | str | PathLike) -> float | Sparsity:
    """Normalise the sparsity setting to a number or {module or pattern: {"rows": s, "columns": s}}.

    Takes a number, {module name or pattern: number or {"rows": number, "columns": number}}, or the path of a
    calibration.json. Raises PartialLoraError, naming the entry, where one is no sparsity.
    """
    if isinstance(sparsity, (str, PathLike)):
        if re.fullmatch(r"\d*\.?\d+", str(sparsity)):
            raise PartialLoraError(f"sparsity is the text {str(sparsity)!r}: expected the number {sparsity}.")
        return _calibrated_sparsity(Path(sparsity))
    if not isinstance(sparsity, Mapping):
        return _share(sparsity, "sparsity")
    if not sparsity:
        raise PartialLoraError("sparsity is empty: give a number or at least one module with its sparsity.")
    read = {}
    for module, value in sparsity.items():
        key = f"sparsity[{module!r}]"
        if not isinstance(value, Mapping):
            read[str(module)] = dict.fromkeys(AXES, _share(value, key))
        elif set(value) != set(AXES):
            raise PartialLoraError(f"{key} has {sorted(map(str, value))}: expected rows and columns.")
        else:
            read[str(module)] = {axis: _share(value[axis], f"{key}[{axis!r}]") for axis in AXES}
    return read


def _calibrated_sparsity(path: Path) -> float | Sparsity:
    try:
        content = read_json(path)
        if "modules" in content and (fault := other_format(content.get("format"))):
            raise PartialLoraError(f"sparsity names {path}: {fault}.")
        modules = content["modules"]
        sparsity = {module: {axis: axes[axis]["sparsity"] for axis in AXES} for module, axes in modules.items()}
    except OSError as error:
        raise PartialLoraError(f"sparsity names {path}, which cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PartialLoraError(
            f"sparsity names {path}, which is no calibration.json: expected modules.<name>.rows|columns.sparsity."
        ) from None
    return read_sparsity(sparsity)


def _share(value: object, key: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < 1:
        raise PartialLoraError(f"{key} is {reprlib.repr(value)}: it is the share removed, a number in [0, 1).")
    return float(value)


def assign_sparsity(sparsity: float | Sparsity, modules: list[str]) -> Sparsity:
    """Return one {"rows": s, "columns": s} for each of `modules`, in their order.

    A module takes the entry of its own full name, else of the first pattern that matches its end (as in PEFT: the
    whole name, or what follows a dot). Raises PartialLoraError for a module without an entry, and for an entry
    without a module.
    """
    if not isinstance(sparsity, Mapping):
        return {module: dict.fromkeys(AXES, sparsity) for module in modules}
    entries = {}
    for module in modules:
        matching = (entry for entry in sparsity if _matches(entry, module))
        entry = module if module in sparsity else next(matching, None)
        if entry is None:
            raise PartialLoraError(
                f"sparsity has no entry for the target module {module}: add one, or do not target it."
            )
        entries[module] = entry
    for entry in sparsity:
        if entry not in entries and not any(_matches(entry, module) for module in modules):
            raise PartialLoraError(f"sparsity names {entry!r}, which matches no target module (first: {modules[0]}).")
    return {module: sparsity[entry] for module, entry in entries.items()}


def _matches(entry: str, module: str) -> bool:
    try:
        return entry == module or re.match(rf"(.*\.)?({entry})$", module) is not None
    except re.error:
        raise PartialLoraError(
            f"sparsity names {entry!r}, which is neither a module nor a regular expression."
        ) from None
