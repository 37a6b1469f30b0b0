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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from torch import nn

from partial_lora.calibration import budget as budgets
from partial_lora.calibration.config import CalibrationConfig
from partial_lora.calibration.curves import Curves, Store
from partial_lora.calibration.importance import Importance, Scores, name_of, scores_of
from partial_lora.calibration.peers import Alone, Peers, gathered, of_first
from partial_lora.calibration.repair import repaired
from partial_lora.calibration.result import Calibration, warnings_of
from partial_lora.calibration.score import Score, frozen
from partial_lora.calibration.search import (
    BOTH,
    CURVE_AXES,
    SEARCHES,
    Levels,
    bisect,
    both_axes,
    curve_of,
    in_order,
    listed,
    passes,
    scan,
    sparsity_levels,
    threshold_of,
    walk,
)
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AXES, Sparsity
from partial_lora.models.targets import target_linears, target_names

# --- The sparsity of each module and axis at one threshold, each found alone or after those chosen before it.

_ROUND = 4  # modules of each process between two exchanges: as much is lost where one of them is killed

Find = Callable[[str, str], float]  # module, axis -> level
Progress = Callable[..., None]


def chosen(
    curves: Curves,
    modules: Sequence[str],
    axes: Sequence[str],
    find: Find,
    *,
    scope: str,
    peers: Peers,
    progress: Progress | None,
) -> Levels:
    """The level of every curve, the modules in their own order whatever the scope.

    axes: of a module's curves. find: the search of one curve, which asks `curves`. scope: "independent", all other
    modules intact; "cumulative" and "cumulative_backward", all that was chosen before stays zeroed, from front to back
    or from back to front (rows before columns). progress: called after every curve.
    """
    told = _Told(progress, len(modules) * len(axes))
    if scope == "independent":
        return _independent(curves, modules, axes, find, peers, told)
    levels = of_first(peers, lambda: _cumulative(curves, in_order(modules, scope), axes, find, told))
    for module in modules if peers.rank else ():
        told.all_of(module, levels[module])
    return {module: levels[module] for module in modules}


def _independent(
    curves: Curves, modules: Sequence[str], axes: Sequence[str], find: Find, peers: Peers, told: _Told
) -> Levels:
    """Every process finds those of its own modules, (rank, rank + size, ...), and is given those of the others."""
    levels: Levels = {}
    step = _ROUND * peers.size
    for start in range(0, len(modules), step):
        own = modules[start + peers.rank : start + step : peers.size]

        def work(own: Sequence[str] = own) -> tuple[Levels, dict]:
            found = {module: _of_module(curves, module, axes, find, told) for module in own}
            return found, {module: {axis: listed(curves.curve(module, axis)) for axis in axes} for module in own}

        for rank, (found, points) in enumerate(gathered(peers, work)):
            levels |= found
            for module in found if rank != peers.rank else ():
                for axis in axes:
                    curves.learn(module, axis, curve_of(points[module][axis]))
                told.all_of(module, found[module])
        curves.save()
    return {module: levels[module] for module in modules}


def _cumulative(curves: Curves, modules: Sequence[str], axes: Sequence[str], find: Find, told: _Told) -> Levels:
    with curves.choices() as choose:
        return {module: _of_module(curves, module, axes, find, told, choose) for module in modules}


def _of_module(
    curves: Curves,
    module: str,
    axes: Sequence[str],
    find: Find,
    told: _Told,
    choose: Callable[[str, str, float], None] | None = None,
) -> dict[str, float]:
    levels = {}
    for axis in axes:
        levels[axis] = find(module, axis)
        if choose is not None:
            choose(module, axis, levels[axis])
        if axis == axes[-1]:
            curves.save()
        told(module, axis, levels[axis])
    return levels


class _Told:
    """Counts the curves that are done, and says so."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, module: str, axis: str, level: float) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, module=module, axis=axis, sparsity=level)

    def all_of(self, module: str, levels: dict[str, float]) -> None:
        for axis, level in levels.items():
            self(module, axis, level)


# --- What a calibration is asked: checked before anything runs, and named so that the same is never asked twice.

_SAME = ("search", "axes", "scope", "levels", "max_sparsity")  # what the points of two calibrations have to share

RECORDED = ("budget", "axes", "scope", "levels", "max_sparsity")  # in the result, as they were set


@dataclass(frozen=True)
class Question:
    """What decides a calibration's result, given the curves: its settings, and what guessing scores.

    Raises PartialLoraError for a `chance` that is no finite number, and where the settings need one and it is None.
    """

    config: CalibrationConfig
    chance: float | None

    def __post_init__(self) -> None:
        if self.above_chance and self.chance is None:
            raise PartialLoraError(
                "calibration.chance=majority: this score does not say what guessing scores: give it, or set ignore"
            )
        if self.chance is not None and not math.isfinite(self.chance):
            raise PartialLoraError(f"calibration.chance={self.chance}: expected what guessing scores, a finite number")

    @property
    def above_chance(self) -> bool:
        return self.config.chance == "majority"

    @property
    def guessing(self) -> float | None:
        """What guessing scores, where the threshold is of what is above it."""
        return self.chance if self.above_chance else None

    def lowest(self, baseline: float) -> float:
        """The threshold of a score that is no better than chance: what passes below it says nothing."""
        if self.chance is None or self.above_chance:
            return 0.0
        return threshold_of(self.chance, baseline=baseline)

    def named(self, count: int | None, rank: int, granularity: str) -> str:
        """This question among those of one store; what is as it always was is not mentioned."""
        config = self.config
        point: dict = {"threshold": config.threshold}
        if count is not None:
            point = {"budget": count, "rank": rank, "chance": self.chance}
            if granularity != "rows_columns":
                point["granularity"] = granularity
        grid = {"levels": config.levels, "max_sparsity": config.max_sparsity}
        variants = {
            name: value
            for name, value, usual in (
                ("axes", config.axes, "separate"),
                ("scope", config.scope, "independent"),
                ("repair", [rank, granularity] if config.repair else None, None),
                ("above_chance", self.guessing, None),
            )
            if value != usual
        }
        return json.dumps(point | grid | variants)

    def agrees_with(self, known: Calibration, modules: Sequence[str]) -> None:
        """Raises PartialLoraError, in one line, where an earlier calibration was asked of other points."""
        for name in _SAME:
            expected = getattr(self.config, name)
            if getattr(known, name) != expected:
                raise PartialLoraError(
                    f"known: its {name} is {getattr(known, name)}, expected {expected}; "
                    "give a calibration that was asked the same"
                )
        if list(known.modules) != list(modules):
            differing = sorted(known.modules.keys() ^ set(modules)) or list(modules)
            raise PartialLoraError(
                f"known: its modules are not those to calibrate ({differing[0]}); "
                "give a calibration of the same model and target_modules"
            )


def start_from(store: Store, known: Calibration) -> None:
    """Take the points of an earlier calibration, where the store knows no better.

    Raises PartialLoraError where its baseline is not that of the model in the store.
    """
    if not math.isclose(known.baseline, store.baseline, rel_tol=1e-6, abs_tol=1e-9):
        raise PartialLoraError(
            f"known: its baseline score is {known.baseline}, this model's is {store.baseline}; "
            "give a calibration of the same model and score"
        )
    for module, axis, _, after in walk(known.chosen, known.scope):
        curve = store.curve(module, axis, after)
        for level, (low, high) in curve_of(known.points(module, axis)).items():
            if level not in curve or high - low < curve[level][1] - curve[level][0]:
                curve[level], store.changed = (low, high), True


logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    score: Score,
    config: CalibrationConfig | None = None,
    *,
    target_modules: str | Sequence[str],
    importance: Importance = "svd",
    importance_options: Mapping | None = None,
    rank: int = 16,
    granularity: str = "rows_columns",
    chance: float | None = None,
    above_chance: bool | None = None,
    settings: Mapping | None = None,
    known: Calibration | None = None,
    store: Path | None = None,
    peers: Peers | None = None,
    progress: Callable[..., None] | None = None,
    **changes: object,
) -> Calibration:
    """Find one sparsity for each module and axis from the frozen model (Algorithm 1).

    Args:
        model: the frozen model; altered while it is scored, and given back bit for bit.
        score: `score(model) -> float`, larger = better; one with `bounds` (scoring.py) saves most of the work.
        target_modules: as in PEFT: a list of names or suffixes, or one regular expression. Linear layers only.
        config: the settings, by default those of CalibrationConfig; `changes`, by keyword, go before them:
            threshold: share of the baseline score that must be left.
            budget: in place of the threshold, the trainable parameters to spend: a share (at most 1) or a count. Met to
                within 1 %, in every scope; in a cumulative one each threshold tried has curves of its own to pay for.
            search: "scan", the level before the first failure; or "bisect", an approximation: curves are not monotone.
            levels, max_sparsity: the levels are multiples of `levels`, up to `max_sparsity`.
            axes: "separate"; or "joint", one level zeroes that share of rows and of columns, so both have one curve.
            scope: "independent", all other modules intact; "cumulative" and "cumulative_backward", what was chosen
                before stays zeroed, from the first module to the last or from the last to the first.
            repair: relax sparsities until the score with all of them at once is enough, too (repair.py).
            seed: passed to the measure.
        importance: a measure by name, a function like those in importance.py, or {module: (rows, columns)}.
        importance_options: passed to the measure.
        rank, granularity: of the adapter that spends a budget; "element" where single entries of A and B are masked.
        chance: what guessing scores, by default what `score.chance` says; a budget never follows a threshold below it.
        above_chance: apply the threshold to what the baseline is above chance: `config.chance`, "majority" or "ignore".
        settings: plain data that goes into the result as it is.
        known: an earlier result for the same model and score; what its curves decide is not evaluated again.
        store: a JSON file of the curves found so far, kept up to date. Its name must stand for the model, the score and
            the importance: none of them is in it. Asked the same again, it is all that is read.
        peers: the processes that share the work by module. Each calls this alike; all have the same result, and the
            one of rank 0 keeps the store. In a cumulative scope, where modules wait for each other, it works alone.
        progress: called as progress(done, total, module=, axis=, sparsity=) after each curve, axis being "joint" where
            both share it; with a budget, anew for each threshold tried.

    Raises:
        PartialLoraError: in one line, for a target that is none, an argument out of range, a baseline score that is
            not finite, a `known` of something else, and what stopped any of the peers.
    """
    began = time.perf_counter()
    peers = peers or Alone()
    if above_chance is not None:
        changes["chance"] = "majority" if above_chance else "ignore"
    config = replace(config or CalibrationConfig(), **changes)
    threshold, budget = config.threshold, config.budget
    chance = getattr(score, "chance", None) if chance is None else chance
    asked = Question(config, None if chance is None else float(chance))
    modules = target_linears(model, target_modules)
    shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
    units = budgets.masked_units(shapes, rank, granularity)
    count = None if budget is None else budgets.parameter_count(budget, *units)
    grid = sparsity_levels(config.levels, config.max_sparsity)
    if known is not None:
        asked.agrees_with(known, list(modules))

    @cache
    def scores(module: str) -> Scores:
        return scores_of(
            module, modules[module].weight, importance, seed=config.seed or 0, options=importance_options or {}
        )

    question = {"importance": name_of(importance), "search": config.search, "shapes": shapes}
    cost = []  # (evaluations, seconds) of every process
    with Store.shared(store, question, peers) as kept, frozen(model):
        request = asked.named(count, rank, granularity)
        cached = request in kept.results
        curves = Curves(model, score, modules, scores, kept)
        if not cached:
            # (1) What the frozen model scores.
            baseline = gathered(peers, curves.intact)[0]
            kept.belongs_to(baseline)
            if known is not None:
                start_from(kept, known)
            steps = _Steps(asked, list(modules), grid, units, baseline, curves, kept, peers, progress)
            # (2) For each module and axis, how much can be zeroed while enough of that is left.
            if count is None:
                sparsity = both_axes(steps.levels_at(threshold))
            else:
                threshold, sparsity = steps.spending(count)
            # (3) What the model scores with all of it zeroed at once; where that is too little, less is zeroed.
            kept.results[request] = of_first(peers, partial(steps.together, threshold, sparsity))
            kept.changed = True

            def paid() -> tuple[int, float]:
                kept.save()  # here, where an error is one in all processes
                return curves.evaluations, time.perf_counter() - began

            cost = gathered(peers, paid)
    result = Calibration(
        **kept.results[request],
        **{name: getattr(config, name) for name in RECORDED},
        chance=asked.chance,
        above_chance=asked.above_chance,
        evaluations=sum(evaluations for evaluations, _ in cost),
        seconds=max((seconds for _, seconds in cost), default=time.perf_counter() - began),
        cached=cached,
        settings=dict(settings or {}),
    )
    density = budgets.kept_parameters(*units, result.sparsity) / budgets.dense_parameters(*units)
    result.warnings.extend(warnings_of(result, size=getattr(score, "size", None), density=density))
    for warning in result.warnings if peers.rank == 0 else ():
        logger.warning("calibration: %s", warning)
    return result


@dataclass
class _Steps:
    """Steps (2) and (3) of Algorithm 1: of one question about one model, whose score is known."""

    asked: Question
    modules: list[str]
    grid: Sequence[float]
    units: tuple[budgets.Shapes, int]
    baseline: float
    curves: Curves
    kept: Store
    peers: Peers
    progress: Callable[..., None] | None

    def __post_init__(self) -> None:
        self.levels_at = cache(self._levels_at)  # a budget asks for those of its threshold again

    def enough(self, value: float, at: float) -> bool:
        """Whether a score has the share `at` of the baseline."""
        return passes(value, baseline=self.baseline, threshold=at, chance=self.asked.guessing)

    def _levels_at(self, at: float) -> Levels:
        """For each module and axis the level that a threshold leaves."""

        def find(module: str, axis: str) -> float:
            survives = partial(self.curves.survives, module, axis, passes=partial(self.enough, at=at))
            return SEARCHES[self.asked.config.search](survives, self.grid)

        how = {"scope": self.asked.config.scope, "peers": self.peers, "progress": self.progress}
        return chosen(self.curves, self.modules, CURVE_AXES[self.asked.config.axes], find, **how)

    def spending(self, count: int) -> tuple[float, Sparsity]:
        """The threshold, and the sparsity of its levels, at which `count` parameters are left."""
        lowest = self.asked.lowest(self.baseline)
        return budgets.meet(count, *self.units, lambda at: both_axes(self.levels_at(at)), lowest)

    def together(self, threshold: float, sparsity: Sparsity) -> dict:
        """The result: the score with all zeroed at once, repaired if that was asked for, and every module's entry."""
        found = self.levels_at(threshold)
        joint, zeroed, mended = self.curves.joint(sparsity), sparsity, None
        if self.asked.config.repair:
            before, mended = self.curves.evaluations, {"joint_before": joint, "threshold": threshold}
            enough = partial(self.enough, at=threshold)
            asking = {"own": self.curves.exact, "joint": self.curves.joint, "enough": enough}
            relaxed, joint, mended["steps"] = repaired(found, self.grid, self.units[0], before=joint, **asking)
            mended["evaluations"] = self.curves.evaluations - before
            zeroed = both_axes(relaxed)
        return {
            "baseline": self.baseline,
            "joint": joint,
            "threshold": threshold,
            "search": self.asked.config.search,
            "scaled": sparsity != both_axes(found),
            "repaired": mended,
            "modules": _entries(self.kept, found, zeroed, self.asked.config.scope),
        }


def _entries(kept: Store, levels: Levels, sparsity: Sparsity, scope: str) -> dict[str, dict[str, dict]]:
    """What a result says of each module and axis: the sparsity, the curve, and the level of it where another."""
    entries: dict[str, dict[str, dict]] = {module: {} for module in levels}
    for module, axis, level, after in walk(levels, scope):
        points = listed(kept.curve(module, axis, after))
        for each in AXES if axis == BOTH else (axis,):
            entry = {"sparsity": sparsity[module][each], "curve": points}
            entries[module][each] = entry if entry["sparsity"] == level else entry | {"level": level}
    return entries


__all__ = ["Calibration", "Peers", "bisect", "calibrate", "passes", "scan", "sparsity_levels", "target_names"]
