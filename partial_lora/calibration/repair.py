"""Sparsities relaxed until the model that has all of them at once scores enough.

This is the project's own step: the paper finds sparsities one by one, and does not say what to do where all of them at
once cost too much. Losses add up, so the modules whose own curves have lost most are relaxed first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from partial_lora.budget import Shapes
from partial_lora.calibration.level_search import BOTH, Levels, both_axes
from partial_lora.masks import AXES, Sparsity, kept_count

Joint = Callable[[Sparsity], float | None]
Own = Callable[[str, str, float], float]  # module, axis, level -> the score with that alone zeroed


def relax(
    levels: Levels,
    grid: Sequence[float],
    shapes: Shapes,
    *,
    own: Own,
    joint: Joint,
    enough: Callable[[float], bool],
    before: float | None,
) -> tuple[Levels, float | None, int]:
    """Return levels whose joint score is enough, that score, and the steps to them: a step lowers one curve's level.

    grid: all levels. shapes: what masks count in every module, (out, in). before: the joint score of `levels`. Steps
    are taken in the order of `relaxations`; their number is searched by doubling and then by halving, so one step fewer
    is not enough. All possible steps give the intact model, which is taken to suffice.
    """
    total = sum(grid.index(level) + 1 for axes in levels.values() for level in axes.values() if level)
    order, taken = relaxations(levels, grid, shapes, own), []  # each step is worked out only when it is needed
    scores = {0: before}

    def after(steps: int) -> Levels:
        taken.extend(islice(order, max(0, steps - len(taken))))
        relaxed = {module: dict(axes) for module, axes in levels.items()}
        for module, axis in taken[:steps]:
            relaxed[module][axis] = _below(relaxed[module][axis], grid)
        return relaxed

    def suffices(steps: int) -> bool:
        if steps not in scores:
            scores[steps] = joint(both_axes(after(steps)))
        return scores[steps] is not None and enough(scores[steps])

    failing, steps = 0, 0
    while steps < total and not suffices(steps):
        failing, steps = steps, min(max(1, 2 * steps), total)
    while steps - failing > 1:
        middle = (failing + steps) // 2
        failing, steps = (failing, middle) if suffices(middle) else (middle, steps)
    suffices(steps)  # its score may be missing where all steps are taken
    return after(steps), scores[steps], steps


def relaxations(levels: Levels, grid: Sequence[float], shapes: Shapes, own: Own) -> Iterator[tuple[str, str]]:
    """Yield the (module, axis) whose sparsity goes down by one level next, until nothing is zeroed any more.

    Its own curve has lost most of the score at its level; among equals it gives back the fewest parameters, and then
    comes first in the model's order. A level without a score has lost all of it.
    """
    curves = [(module, axis) for module, axes in levels.items() for axis in axes]

    def priority(place: int, level: float) -> tuple[float, int, int, float]:
        module, axis = curves[place]
        score = own(module, axis, level)
        sizes = [size for mask_axis, size in zip(AXES, shapes[module], strict=True) if axis in (mask_axis, BOTH)]
        regained = sum(kept_count(size, _below(level, grid)) - kept_count(size, level) for size in sizes)
        return -math.inf if math.isnan(score) else score, regained, place, level

    waiting = [
        priority(place, levels[module][axis]) for place, (module, axis) in enumerate(curves) if levels[module][axis]
    ]
    heapq.heapify(waiting)
    while waiting:
        *_, place, level = heapq.heappop(waiting)
        yield curves[place]
        if lower := _below(level, grid):
            heapq.heappush(waiting, priority(place, lower))


def _below(level: float, grid: Sequence[float]) -> float:
    """Return the next lower level; 0 below the first."""
    return grid[grid.index(level) - 1] if level > grid[0] else 0.0
