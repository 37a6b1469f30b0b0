"""From settings to masks: which rows and columns, or which single entries, of each module stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from partial_lora.adapter.sparsity import AXES, Sparsity, assign_sparsity
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask, kept_count

Values = dict[str, dict[str, np.ndarray]]
"""Scores or indices: {module: {"rows": array (size,), "columns": array (size,)}}."""


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

    def sizes(self, granularity: str) -> dict[str, int]:
        """How many there are to keep or remove: rows and columns of W, or ("element") entries of B and A."""
        sizes = self.shape if granularity != "element" else (math.prod(self.b), math.prod(self.a))
        return dict(zip(AXES, sizes, strict=True))


@dataclass(frozen=True)
class ModuleMasks:
    """The masks of one module.

    Of rows and columns: ``rows`` over the outputs, ``columns`` over the inputs of its W, of ``shape`` (out, in).
    Of single entries: ``rows`` is over the entries of B, ``columns`` over those of A, both flat and row-major;
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


def random_masks(
    geometries: Mapping[str, Geometry], sparsity: Sparsity, *, granularity: str, count: str, mask_seed: int
) -> dict[str, ModuleMasks]:
    """Random masks for modules of the given ``geometries`` {module: geometry}: the selection "random"."""
    shares = assign_sparsity(sparsity, list(geometries))
    draw = Mask.bernoulli if count == "bernoulli" else Mask.random

    def choose(module: str, axis: str, size: int) -> Mask:
        return draw(size, shares[module][axis], mask_seed=mask_seed, module=module, axis=axis)

    return _for_each(geometries, granularity, choose)


def _for_each(
    geometries: Mapping[str, Geometry], granularity: str, choose: Callable[[str, str, int], Mask]
) -> dict[str, ModuleMasks]:
    """The masks that ``choose(module, axis, size)`` gives for every module and axis."""
    return {
        module: ModuleMasks(
            **{axis: choose(module, axis, size) for axis, size in geometry.sizes(granularity).items()},
            shape=geometry.shape,
        )
        for module, geometry in geometries.items()
    }


def read_values(values: object, key: str) -> Values:
    """Scores or indices in one form, whatever they came as: lists, arrays or tensors become arrays of numbers.

    ``values`` is {module: {"rows": numbers, "columns": numbers}}; ``key`` is its name in errors. Raises
    PartialLoraError naming the entry that is no such thing, or holds what is not finite.
    """
    if not isinstance(values, Mapping):
        raise PartialLoraError(f"{key} is a {type(values).__name__}: expected {{module: {{rows, columns}}}}.")
    read = {}
    for module, axes in values.items():
        if not isinstance(axes, Mapping) or set(axes) != set(AXES):
            has = sorted(map(str, axes)) if isinstance(axes, Mapping) else type(axes).__name__
            raise PartialLoraError(f"{key}[{module!r}] has {has}: expected rows and columns.")
        read[str(module)] = {axis: _numbers(axes[axis], f"{key}[{module!r}][{axis!r}]") for axis in AXES}
    return read


def _numbers(values: object, key: str) -> np.ndarray:
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
        numbers = np.array(values)  # a copy, which nobody else changes
    except (ValueError, TypeError, RuntimeError):  # a ragged list, a sparse tensor, one without values
        numbers = np.array(None)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        raise PartialLoraError(
            f"{key} is no list of numbers: expected one dimension (single entries in row-major order)."
        )
    if not np.isfinite(numbers).all():
        raise PartialLoraError(f"{key} has NaN or infinity: expected finite numbers.")
    whole = numbers.dtype.kind != "f" and numbers.max(initial=0) <= np.iinfo(np.int64).max
    numbers = numbers.astype(np.int64 if whole else np.float64)
    numbers.flags.writeable = False
    return numbers


def top_masks(
    geometries: Mapping[str, Geometry], sparsity: Sparsity, scores: Values, *, granularity: str
) -> dict[str, ModuleMasks]:
    """Masks that keep what has the highest of ``scores``, as much of it as ``sparsity`` says: the selection "top"."""
    _same_modules(geometries, scores, "scores")
    shares = assign_sparsity(sparsity, list(geometries))

    def choose(module: str, axis: str, size: int) -> Mask:
        given = scores[module][axis]
        if len(given) != size:
            raise PartialLoraError(f"scores[{module!r}][{axis!r}] has {len(given)} scores: expected {size}.")
        return Mask.top(given, shares[module][axis])

    return _for_each(geometries, granularity, choose)


def given_masks(geometries: Mapping[str, Geometry], indices: Values, *, granularity: str) -> dict[str, ModuleMasks]:
    """Masks that keep the given ``indices``, ascending: the selection "top" of those who have selected already."""
    _same_modules(geometries, indices, "indices")

    def choose(module: str, axis: str, size: int) -> Mask:
        try:
            return Mask(size, indices[module][axis])
        except PartialLoraError as error:
            raise PartialLoraError(f"indices[{module!r}][{axis!r}]: {error}") from None

    return _for_each(geometries, granularity, choose)


def _same_modules(geometries: Mapping[str, Geometry], values: Values, key: str) -> None:
    for module in values:
        if module not in geometries:
            raise PartialLoraError(
                f"{key} names {module!r}, which is no target module (first: {next(iter(geometries))})."
            )
    for module in geometries:
        if module not in values:
            raise PartialLoraError(f"{key} has no entry for the target module {module}: selection 'top' needs one.")


def check_counts(masks: Mapping[str, ModuleMasks], sparsity: Sparsity) -> None:
    """Refuse given masks that keep another number than ``sparsity`` says."""
    for module, shares in assign_sparsity(sparsity, list(masks)).items():
        for axis in AXES:
            mask = getattr(masks[module], axis)
            if len(mask.kept) != kept_count(mask.size, shares[axis]):
                raise PartialLoraError(
                    f"indices[{module!r}][{axis!r}] keeps {len(mask.kept)} of {mask.size}, but its sparsity"
                    f" {shares[axis]} keeps {kept_count(mask.size, shares[axis])}: give one of the two."
                )
