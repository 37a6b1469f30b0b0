"""Search of a curve: the levels of sparsity, the score that is enough, scan and bisect, and curves as plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from partial_lora.calibration.config import CalibrationConfig
from partial_lora.masks import AXES, Sparsity

BOTH = "joint"  # one level zeroes that share of the rows and of the columns
CURVE_AXES = {"separate": AXES, "joint": (BOTH,)}  # calibration.axes: the curves of a module

Bounds = tuple[float, float]  # of a score, low and high; equal bounds are the score
Curve = dict[float, Bounds]  # by level
Levels = dict[str, dict[str, float]]  # {module: {axis of a curve: level}}

UNKNOWN: Bounds = (-math.inf, math.inf)
NOT_A_NUMBER: Bounds = (math.nan, math.nan)
COMPETING = 10  # outputs of each example whose gradients are taken
FORWARD, BACKWARD = 2.0, 5.0  # cost of a pass with gradients, in passes over an altered model, half of one over all
CHECKED, MOST_CHECKED = 0.05, 32  # share of a scan's points on predicted curves that are evaluated; at most so many
_BEFORE = 3  # passes before the search: to fit the head, to put examples in order, to score the intact model
_ROUNDING = 1e-9  # a share of a score is not exact in floating point


# --- Enough of a score


def line(*, baseline: float, threshold: float, chance: float | None = None) -> float:
    """Return the score that is just enough: the threshold's share of the baseline, or of its height above chance.

    A baseline below zero is a loss, which may grow to 1 / threshold of itself. chance: the score of guessing, if the
    threshold is a share of the part above it; a baseline that is not above it gives inf.
    """
    if chance is not None:
        return chance + threshold * (baseline - chance) if baseline > chance else math.inf
    if baseline < 0:
        return baseline / threshold if threshold else -math.inf
    return threshold * baseline


def passes(score: float, *, baseline: float, threshold: float, chance: float | None = None) -> bool:
    """Return True where enough of the baseline score is left (see `line`); a score of NaN never passes."""
    needed = line(baseline=baseline, threshold=threshold, chance=chance)
    if needed == math.inf:
        return False
    return score >= (needed if chance is None and baseline < 0 else needed - _ROUNDING)


def threshold_of(score: float, *, baseline: float) -> float:
    """Return the threshold at which a score is just enough; 0 where it always is."""
    if baseline < 0:
        return baseline / score if score < 0 else 1.0
    return max(0.0, score / baseline) if baseline else 0.0


# --- Levels, and the order in which a search tries them


def sparsity_levels(step: float, highest: float) -> list[float]:
    """Return the sparsities that are tried: multiples of `step` up to `highest`."""
    return [round(number * step, 10) for number in range(1, math.floor(highest / step + 1e-9) + 1)]


def scan(survives: Callable[[float], bool], grid: Sequence[float]) -> float:
    """Return the level before the first failure; 0 where the first level fails."""
    sparsity = 0.0
    for level in grid:
        if not survives(level):
            break
        sparsity = level
    return sparsity


def bisect(survives: Callable[[float], bool], grid: Sequence[float]) -> float:
    """Return, by halving, a level that survives below one that does not; on a monotone curve it is the scan's."""
    below, above = 0, len(grid) + 1  # of the levels 0 (intact), 1, 2, ...: this one survives, that one does not
    while above - below > 1:
        middle = (below + above) // 2
        if survives(grid[middle - 1]):
            below = middle
        else:
            above = middle
    return grid[below - 1] if below else 0.0


Search = Callable[[Callable[[float], bool], Sequence[float]], float]
SEARCHES: dict[str, Search] = {"scan": scan, "bisect": bisect, "gradient": scan}  # "gradient" scans predicted curves


def checks(points: float, outputs: float = COMPETING) -> int:
    """Return how many points are evaluated where a scan of predicted curves tries `points`.

    outputs: those of each example whose gradients predicted. The points take no longer than these: a language model,
    which has one, would else spend nearly all of its calibration on points.
    """
    return min(math.floor(CHECKED * points), MOST_CHECKED, round(FORWARD + outputs * BACKWARD))


def passes_at_most(
    modules: int,
    axes: int,
    levels: int,
    *,
    search: str,
    repair: bool = False,
    spends: bool = False,
    outputs: float = COMPETING,
) -> int:
    """Return the most full passes that can be needed: every point that a search can try, and the joint score.

    A repair relaxes at most every level of every curve, and takes a joint score whenever it doubles or halves.
    Gradients take one forward pass, a backward pass for each of the `outputs` that compete, and the points that are
    evaluated. spends: a budget, of which a scan may need whole curves, and gradients evaluate no point.
    """
    tried = math.ceil(math.log2(levels + 1)) if search == "bisect" and not spends else levels
    points = modules * axes * tried
    if search == "gradient":
        points = math.ceil(1 + outputs + (0 if spends else checks(points, outputs)))
    if not repair:
        return points + 1
    steps = modules * axes * levels
    every = points if search == "gradient" else steps  # the order of steps needs the levels that a bisection skips
    return every + 1 + 2 * math.ceil(math.log2(steps + 1))


def most_passes(config: CalibrationConfig, modules: int, outputs: int = COMPETING) -> int:
    """Return the most passes that can be needed once the intact model has been scored (`passes_at_most`)."""
    return passes_at_most(
        modules,
        len(CURVE_AXES[config.axes]),
        len(sparsity_levels(config.levels, config.max_sparsity)),
        search=config.search,
        repair=config.repair,
        spends=config.budget is not None,
        outputs=outputs,
    )


def seconds_at_most(
    config: CalibrationConfig, modules: int, one_pass: float, outputs: int = COMPETING, *, processes: int = 1
) -> float:
    """Return the most seconds that a calibration can take, by those of a pass over the intact model.

    outputs: those of each example whose gradients are taken.
    """
    passes = most_passes(config, modules, outputs)
    if config.search == "gradient":  # which one process predicts; gradients take longer than passes
        return one_pass * (_BEFORE + passes + outputs * (BACKWARD / FORWARD - 1))
    return one_pass * (_BEFORE + passes / processes)


def in_order(modules: Sequence[str], scope: str) -> list[str]:
    """Return the modules in the order in which they are calibrated: as the model has them, or back to front."""
    return list(reversed(modules)) if scope == "cumulative_backward" else list(modules)


def walk(levels: Mapping[str, Mapping[str, float]], scope: str) -> Iterator[tuple[str, str, float, str]]:
    """Yield every curve in the order of calibration: module, axis, level chosen, digest of the cuts made before it."""
    before: Levels = {}
    for module in in_order(list(levels), scope):
        for axis, level in levels[module].items():
            yield module, axis, level, "" if scope == "independent" else digest_of(before)
            before.setdefault(module, {})[axis] = level


def both_axes(levels: Mapping[str, Mapping[str, float]]) -> Sparsity:
    """Return each module's sparsity of rows and of columns from the levels of its curves."""
    return {module: {axis: axes.get(axis, axes.get(BOTH)) for axis in AXES} for module, axes in levels.items()}


def digest_of(cuts: Mapping[str, Mapping[str, float]]) -> str:
    """Return a name for what is zeroed elsewhere while a curve is measured; "" for nothing.

    cuts: levels by module and axis; their order does not matter, and level 0 is no cut.
    """
    entries = sorted(
        (module, axis, level) for module, axes in both_axes(cuts).items() for axis, level in axes.items() if level
    )
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16] if entries else ""


# --- Points of a curve as calibration.json has them: [[level, score | [low, high] | null], …]


def bounds_of(low: float, high: float) -> Bounds:
    """Return the bounds of a score as a point: an infinite score counts as NaN, an infinite bound stays."""
    if math.isnan(low) or math.isnan(high) or (low == high and math.isinf(low)):
        return NOT_A_NUMBER
    return float(low), float(high)


def points_of(curve: Mapping[float, Bounds]) -> list[list]:
    """Return the points of a curve by rising level, as JSON has them."""
    points = []
    for level, (low, high) in sorted(curve.items()):
        if math.isnan(low):
            value = None
        elif low == high:
            value = low
        else:
            value = [None if math.isinf(bound) else bound for bound in (low, high)]
        points.append([level, value])
    return points


def curve_of(points: Iterable[Iterable]) -> Curve:
    """Return the curve of points as `points_of` writes them."""
    curve = {}
    for level, value in points:
        if value is None:
            curve[level] = NOT_A_NUMBER
        elif isinstance(value, list):
            low, high = (unknown if bound is None else bound for bound, unknown in zip(value, UNKNOWN, strict=True))
            curve[level] = low, high
        else:
            curve[level] = value, value
    return curve
