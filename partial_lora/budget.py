"""Sizes of an adapter: its trainable parameters and their bytes, and the sparsities that spend a given number of them.

The adapter of a weight (m, n) with |I| rows and |J| columns kept trains rank * (|I| + |J|) parameters. Rows and columns
are kept whole, so a budget is met from below, to within the cost of one more row or column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, GRANULARITIES, MASKED, Sparsity, kept_count

TOLERANCE = 0.01  # share of a budget that may stay unused
FARTHEST = 0.2  # share of a budget: a method whose nearest size is further away is not applicable
_NARROW = 1e-6  # thresholds closer than this are one threshold
_HALVINGS = 100  # of a float interval: until no number lies between its ends
FP32 = 4  # bytes of a number in an adapter's file, a gradient or a moment; weights may be narrower, these are not
_MOMENTS = 2  # AdamW keeps a mean and a mean square of every gradient

Shapes = Mapping[str, tuple[int, int]]
Counts = dict[str, dict[str, int]]


def counted_of(granularity: str, rows: str, columns: str) -> str:
    """Return what masks count and a budget is spent on: the granularity, of both factors or of the one that trains.

    "element" are the single entries of both factors, "element:rows" those of B alone; whole "rows" need no more.
    """
    trains = [axis for axis, factor in zip(AXES, (rows, columns), strict=True) if factor == MASKED]
    return granularity if len(trains) == 2 else f"{granularity}:{trains[0]}".removeprefix("rows_columns:")


COUNTED = tuple(
    dict.fromkeys(
        counted_of(granularity, *factors)
        for granularity in GRANULARITIES
        for factors in ((MASKED, MASKED), (MASKED, "frozen"), ("one_hot", MASKED))
        if not GRANULARITIES[granularity].tied or factors == (MASKED, MASKED)
    )
)


def _parts(counted: str) -> tuple[str, Collection[str]]:
    """Return the granularity, and the axes whose factor trains."""
    granularity, _, axis = counted.rpartition(":")
    return (granularity or "rows_columns", (axis,)) if axis in AXES else (counted, AXES)


def masked_units(shapes: Shapes, rank: int, counted: str) -> tuple[Shapes, int]:
    """Return what masks count in modules with W (out, in): {module: (units of B, of A)}, and the parameters of a unit.

    A row of B and a column of A are `rank` parameters; where single entries are masked, a unit is one parameter. A
    factor that does not train has no units. counted: as `counted_of` says it.
    """
    granularity, axes = _parts(counted)
    single = GRANULARITIES[granularity].single
    of_feature = rank if single else 1
    units = {
        module: tuple(of_feature * size * (axis in axes) for axis, size in zip(AXES, shape, strict=True))
        for module, shape in shapes.items()
    }
    return units, 1 if single else rank


def dense_parameters(shapes: Shapes, rank: int) -> int:
    """Return the trainable parameters of the dense adapter."""
    return rank * sum(m + n for m, n in shapes.values())


def kept_parameters(shapes: Shapes, rank: int, sparsity: Mapping[str, Mapping[str, float]] | float) -> int:
    """Return the trainable parameters at a sparsity for each module and axis, or at one for all."""
    if not isinstance(sparsity, Mapping):
        sparsity = {module: dict.fromkeys(AXES, sparsity) for module in shapes}
    return _cost({module: _kept(shapes[module], sparsity[module]) for module in shapes}, rank)


def saturated(
    shapes: Shapes, rank: int, sparsity: Mapping[str, Mapping[str, float]] | float, granularity: str
) -> list[str]:
    """Return the modules that train at least as many numbers as there are entries of W (out, in) that they can change.

    Rows I and columns J change |I| |J| entries of W by rank * (|I| + |J|) numbers; where these are no fewer, a lower
    rank with more rows and columns reaches more of W at the same size. Units of the rank and single entries are taken
    to keep different rows and columns as long as there are any, and to change all entries of W where these cross.
    """
    kind, axes = _parts(granularity)
    if len(axes) < 2:  # what does not train is whole, or meets as many rows or columns as train
        return []
    units, unit = masked_units(shapes, rank, granularity)
    modules, reached = [], rank if GRANULARITIES[kind].apart else 1
    for module, (m, n) in shapes.items():
        shares = sparsity[module] if isinstance(sparsity, Mapping) else dict.fromkeys(AXES, sparsity)
        rows, columns = _kept(units[module], shares).values()
        if unit * (rows + columns) >= min(m, reached * rows) * min(n, reached * columns):
            modules.append(module)
    return modules


def parameter_count(budget: float, shapes: Shapes, rank: int, granularity: str = "rows_columns") -> int:
    """Return the trainable parameters that a budget allows: at most 1 is a share of the dense adapter, more is a count.

    budget: above 0. Raises PartialLoraError for one that no adapter meets, or that is above all that masks can keep.
    """
    units, unit = masked_units(shapes, rank, granularity)
    dense, most = dense_parameters(shapes, rank), dense_parameters(units, unit)
    least = unit * sum(size > 0 for sizes in units.values() for size in sizes)
    count = math.floor(budget * dense + 1e-6) if budget <= 1 else math.floor(budget)
    if count < least:
        raise PartialLoraError(
            f"calibration.budget={budget:g}: allows {count} parameters, expected at least {least} "
            f"(one row and one column of each of {len(shapes)} modules at rank {rank})"
        )
    if count > most:
        whose = "the dense adapter's" if most == dense else "those of the factor that trains"
        raise PartialLoraError(f"calibration.budget={budget:g}: expected at most {most} parameters, {whose}")
    return count


def meet(
    count: int, shapes: Shapes, rank: int, sparsities: Callable[[float], Sparsity], lowest: float = 0.0
) -> tuple[float, Sparsity]:
    """Return the largest threshold whose sparsities train at most `count` parameters, and sparsities that spend them.

    sparsities: what calibration chooses at a threshold; a larger threshold never gives a larger sparsity.
    lowest: the threshold whose line is the score of chance; below it a pass says nothing about a module. Where even
    its sparsities cost too much, their densities are scaled down in proportion; where a threshold leaves more than 1 %
    unused, they are scaled up.
    """
    threshold = largest(lambda value: kept_parameters(shapes, rank, sparsities(value)) <= count, lowest)
    chosen = sparsities(threshold)
    if (1 - TOLERANCE) * count <= kept_parameters(shapes, rank, chosen) <= count:
        return threshold, chosen
    return threshold, scaled(chosen, shapes, rank, count)


def largest(fits: Callable[[float], bool], lowest: float, highest: float = 1.0, within: float = _NARROW) -> float:
    """Return the largest number in [lowest, highest] that fits, about; `lowest`, at most `highest`, where none does.

    It starts with the highest, since a low threshold leads deep into the curves.
    """
    low, high = lowest, highest
    if low >= high or fits(high):
        return high
    while high - low > within:
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def scaled(sparsity: Mapping[str, Mapping[str, float]], shapes: Shapes, rank: int, count: int) -> Sparsity:
    """Return the sparsities that multiply every density by one factor (to 1 at most) and spend `count` parameters.

    Not one parameter more is spent. As the factor grows, rows of equal density appear together; of those that the last
    step adds, as many are kept as still fit, in the order of the modules.
    """

    def at(factor: float) -> Counts:
        return {
            module: _kept(shape, {axis: max(0.0, 1 - factor * (1 - sparsity[module][axis])) for axis in AXES})
            for module, shape in shapes.items()
        }

    low, high = 0.0, max(1 / (1 - sparsity[module][axis]) for module in shapes for axis in AXES)
    if _cost(at(high), rank) <= count:
        low = high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(at(middle), rank) <= count else (low, middle)
    kept, next_kept = at(low), at(high)
    room = (count - _cost(kept, rank)) // rank
    for module in shapes:
        for axis in AXES:
            added = min(room, next_kept[module][axis] - kept[module][axis])
            kept[module][axis] += added
            room -= added
    return {
        module: {axis: 1 - kept[module][axis] / size if size else 0.0 for axis, size in zip(AXES, shape, strict=True)}
        for module, shape in shapes.items()
    }


def shrunk(sparsity: Mapping[str, Mapping[str, float]], shapes: Shapes, rank: int, shrink: float) -> Sparsity:
    """Return the sparsities whose densities are moved towards a common one, with as many trainable parameters.

    shrink: how far, in logarithms: 0 not at all, 0.5 half-way, 1 all the way, 2 as far on the other side, so that a
    module of twice the density of another has half of it. No density exceeds 1.
    """
    densities = {
        module: {axis: (1 - share) ** (1 - shrink) for axis, share in axes.items()} for module, axes in sparsity.items()
    }
    most = max(density for axes in densities.values() for density in axes.values())  # above 1 on the other side
    moved = {module: {axis: 1 - density / most for axis, density in axes.items()} for module, axes in densities.items()}
    return scaled(moved, shapes, rank, kept_parameters(shapes, rank, sparsity))


def even_sparsity(shapes: Shapes, rank: int, count: int) -> Sparsity:
    """Return the sparsities of one density everywhere that spend `count` parameters, and not one more, by `scaled`."""
    return scaled({module: dict.fromkeys(AXES, 0.5) for module in shapes}, shapes, rank, count)  # any one density


def _kept(shape: tuple[int, int], sparsity: Mapping[str, float]) -> dict[str, int]:
    return {axis: kept_count(size, sparsity[axis]) if size else 0 for axis, size in zip(AXES, shape, strict=True)}


def _cost(kept: Counts, rank: int) -> int:
    return rank * sum(count for axes in kept.values() for count in axes.values())


# --- The size of what trains, as result.json and `info` have it.


def counts_of(
    *, base: int, dense: int, trainable: int, head: int, modules: int, saturated: int
) -> dict[str, int | float | None]:
    """Return `parameters` of result.json; without an adapter, or with one larger than the dense, sparsity is None."""
    return {
        "base": base,
        "adapter_dense": dense,
        "adapter_trainable": trainable,
        "head": head,
        "adapter_sparsity": 1 - trainable / dense if 0 < trainable <= dense else None,
        "adapted_modules": modules,
        "saturated_modules": saturated,
    }


def with_bytes(counts: dict, *, adapter_bytes: int) -> dict[str, int | float | None]:
    trainable = counts["adapter_trainable"] + counts["head"]
    return counts | {
        "adapter_bytes": adapter_bytes,
        "compact_bytes": FP32 * trainable,
        "gradient_bytes": FP32 * trainable,
        "optimizer_bytes": FP32 * _MOMENTS * trainable,
    }
