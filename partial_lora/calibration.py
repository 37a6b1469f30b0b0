"""Algorithm 1: how much of each module's rows and columns the adapter can do without, found from the frozen model.

(1) The score of the frozen model on few examples. (2) For each module and axis, zero the least important rows (columns)
of the weight, level by level, until less than `threshold` of that score is left: the last level before is the module's
sparsity. (3) The score with all sparsities at once, since modules that can each be cut need not be cut together.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

from torch import nn

from partial_lora import budget as budgets
from partial_lora.calibration_file import AXES, Calibration, Sparsity
from partial_lora.curves import Curves, Store
from partial_lora.errors import PartialLoraError
from partial_lora.importance import Importance, Scores, name_of, scores_of
from partial_lora.scoring import Score, frozen
from partial_lora.targets import target_linears, target_names

__all__ = ["Calibration", "bisect", "calibrate", "passes", "scan", "target_names"]

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    score: Score,
    *,
    target_modules: str | Sequence[str],
    importance: Importance = "svd",
    threshold: float = 0.9,
    budget: float | None = None,
    rank: int = 16,
    granularity: str = "rows_columns",
    search: str = "scan",
    levels: float = 0.05,
    max_sparsity: float = 0.95,
    importance_options: Mapping | None = None,
    seed: int = 0,
    chance: float | None = None,
    settings: Mapping | None = None,
    store: Path | None = None,
    progress: Callable[..., None] | None = None,
) -> Calibration:
    """Find one sparsity for each module and axis from the frozen model (Algorithm 1).

    Args:
        model: the frozen model; altered while it is scored, and given back bit for bit.
        score: `score(model) -> float`, larger = better; one with `bounds` (scoring.py) saves most of the work.
        target_modules: as in PEFT: a list of names or suffixes, or one regular expression. Linear layers only.
        importance: a measure by name, a function like those in importance.py, or {module: (rows, columns)}.
        threshold: share of the baseline score that must be left.
        budget: in place of the threshold, the trainable parameters to spend: a share (at most 1) or a count.
        rank, granularity: of the adapter that spends them; "element" where single entries of A and B are masked.
        search: "scan", the level before the first failure; or "bisect", an approximation: curves are not monotone.
        levels, max_sparsity: the levels are multiples of `levels`, up to `max_sparsity`.
        importance_options, seed: passed to the measure.
        chance: what guessing scores; a budget never follows a threshold below it.
        settings: plain data that goes into the result as it is.
        store: a JSON file of the curves found so far, kept up to date. Its name must stand for the model, the score and
            the importance: none of them is in it. Asked the same again, it is all that is read.
        progress: called as progress(done, total, module=, axis=, sparsity=) after each axis of a module; with a budget,
            anew for each threshold tried.

    Raises:
        PartialLoraError: in one line, for a target that is none, an argument out of range, a score that is not finite.
    """
    began = time.perf_counter()
    _check(threshold, search, levels, max_sparsity)
    modules = target_linears(model, target_modules)
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    units = budgets.masked_units(shapes, rank, granularity)
    count = None if budget is None else budgets.parameter_count(budget, *units)
    grid = sparsity_levels(levels, max_sparsity)

    @cache
    def scores(module: str) -> Scores:
        return scores_of(module, modules[module].weight, importance, seed=seed, options=importance_options or {})

    known = Store(store, {"importance": name_of(importance), "search": search, "shapes": shapes})
    point = {"threshold": threshold} if count is None else {"budget": count, "rank": rank, "chance": chance}
    if count is not None and granularity != "rows_columns":
        point["granularity"] = granularity
    request = json.dumps(point | {"levels": levels, "max_sparsity": max_sparsity})
    cached = request in known.results
    curves = Curves(model, score, modules, scores, known)
    if not cached:
        with frozen(model), known.kept():
            # (1) What the frozen model scores.
            baseline = curves.intact()

            # (2) For each module and axis, how much can be zeroed while enough of that is left.
            def sparsities(at: float) -> Sparsity:
                enough = partial(passes, baseline=baseline, threshold=at)
                return _find(curves, modules, SEARCHES[search], grid, enough, progress)

            if count is None:
                chosen = sparsities(threshold)
            else:
                lowest = max(0.0, chance / baseline) if chance and baseline > 0 else 0.0
                threshold, chosen = budgets.meet(count, *units, sparsities, lowest)

            # (3) What the model scores with all of it zeroed at once.
            joint = curves.joint(chosen)
            known.results[request] = {
                "baseline": baseline,
                "joint": joint,
                "threshold": threshold,
                "search": search,
                "scaled": any(value not in (0.0, *grid) for axes in chosen.values() for value in axes.values()),
                "modules": {
                    module: {axis: {"sparsity": axes[axis], "curve": curves.points(module, axis)} for axis in AXES}
                    for module, axes in chosen.items()
                },
            }
            known.changed = True
        if grid and all(sparsity >= grid[-1] for axes in chosen.values() for sparsity in axes.values()):
            logger.warning("calibration: every level of every module passes: the score does not tell modules apart")
    return Calibration(
        **known.results[request],
        budget=budget,
        evaluations=curves.evaluations,
        seconds=time.perf_counter() - began,
        cached=cached,
        settings=dict(settings or {}),
    )


def sparsity_levels(step: float, highest: float) -> list[float]:
    """The sparsities that are tried: multiples of `step` up to `highest`."""
    return [round(number * step, 10) for number in range(1, math.floor(highest / step + 1e-9) + 1)]


def passes(score: float, *, baseline: float, threshold: float) -> bool:
    """Whether enough of the baseline score is left; for scores below zero, whether the loss grew little enough."""
    if baseline < 0:
        return threshold == 0 or score >= baseline / threshold
    return score >= threshold * baseline - 1e-9


def scan(survives: Callable[[float], bool], grid: Sequence[float]) -> float:
    """The level before the first failure; 0 where the first level fails."""
    sparsity = 0.0
    for level in grid:
        if not survives(level):
            break
        sparsity = level
    return sparsity


def bisect(survives: Callable[[float], bool], grid: Sequence[float]) -> float:
    """A level that survives next to one that does not, found by halving; the scan's where the curve is monotone."""
    below, above = 0, len(grid) + 1  # of the levels 0 (intact), 1, 2, ...: this one survives, that one does not
    while above - below > 1:
        middle = (below + above) // 2
        if survives(grid[middle - 1]):
            below = middle
        else:
            above = middle
    return grid[below - 1] if below else 0.0


Search = Callable[[Callable[[float], bool], Sequence[float]], float]
SEARCHES: dict[str, Search] = {"scan": scan, "bisect": bisect}


def _find(
    curves: Curves,
    modules: Collection[str],
    search: Search,
    grid: Sequence[float],
    enough: Callable[[float], bool],
    progress: Callable[..., None] | None,
) -> Sparsity:
    """The sparsity of each module and axis, the other modules intact."""
    chosen: Sparsity = {module: {} for module in modules}
    for done, (module, axis) in enumerate(product(modules, AXES), start=1):
        sparsity = search(partial(curves.survives, module, axis, passes=enough), grid)
        chosen[module][axis] = sparsity
        if axis == AXES[-1]:
            curves.save()
        if progress is not None:
            progress(done, len(AXES) * len(modules), module=module, axis=axis, sparsity=sparsity)
    return chosen


def _check(threshold: float, search: str, levels: float, max_sparsity: float) -> None:
    if not 0 < threshold <= 1:
        raise PartialLoraError(f"calibration.threshold={threshold}: expected a share in (0, 1]")
    if search not in SEARCHES:
        raise PartialLoraError(f"calibration.search={search}: expected one of {', '.join(SEARCHES)}")
    if not 0 < levels < 1:
        raise PartialLoraError(f"calibration.levels={levels}: expected the step between two levels, in (0, 1)")
    if not 0 <= max_sparsity < 1:
        raise PartialLoraError(f"calibration.max_sparsity={max_sparsity}: expected a share in [0, 1)")
