"""Algorithm 1: the frozen model decides which share of each module's rows and columns the adapter can do without.

(1) Score the frozen model on few examples. (2) For each module and axis, zero the least important rows (columns) of the
weight, level by level, until less than `threshold` of that score is left: the last level before is the module's
sparsity. (3) Score all sparsities at once, since modules that can be cut one by one may not bear it together.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import nn

from partial_lora import budget as budgets
from partial_lora.calibration.config import CalibrationConfig
from partial_lora.calibration.curves import Curves, Store
from partial_lora.calibration.gradient import Point, checked, levels_of
from partial_lora.calibration.importance import Importance, Scores, name_of, scores_of
from partial_lora.calibration.level_search import (
    BACKWARD,
    BOTH,
    CURVE_AXES,
    FORWARD,
    SEARCHES,
    Curve,
    Levels,
    both_axes,
    checks,
    curve_of,
    in_order,
    line,
    most_passes,
    passes,
    points_of,
    seconds_at_most,
    sparsity_levels,
    threshold_of,
    walk,
)
from partial_lora.calibration.peers import Alone, Peers, gathered, of_first
from partial_lora.calibration.repair import relax
from partial_lora.calibration.result import Calibration, usual_of, warnings_of
from partial_lora.calibration.score import Score
from partial_lora.errors import PartialLoraError, one_of, require
from partial_lora.masks import AXES, Sparsity
from partial_lora.models.modes import frozen
from partial_lora.models.targets import target_linears
from partial_lora.progress import bar

_ROUND = 4  # modules that each process calibrates between two exchanges; a process that is killed loses no more

Progress = Callable[..., None]

logger = logging.getLogger(__name__)
_OF_RUNS = ("kept", "shots", "share", "max_samples", "shrink", "reliability", "memory")  # read by `train`


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
    store: Path | None = None,
    peers: Peers | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Calibration:
    """Find one sparsity for each module and axis from the frozen model (Algorithm 1).

    Args:
        model: the frozen model; altered while it is scored, and its weights restored bit for bit.
        score: `score(model) -> float`, larger = better; a score with `bounds` (score.py) saves most of the work.
        target_modules: as in PEFT: a list of names or suffixes, or one regular expression. Linear layers only.
        config: the settings, by default those of CalibrationConfig; `changes` are keywords that override them:
            threshold: share of the baseline score that must be left.
            budget: in place of the threshold, the trainable parameters to spend: a share (at most 1) or a count. Met to
                within 1 %, in every scope; a cumulative scope measures new curves for each threshold tried.
            search: "scan" takes the level before the first failure. "bisect" halves, an approximation where a curve is
                not monotone. "gradient" predicts curves from gradients (gradient.py), a rougher approximation: it needs
                a score with `predicted`, such as FewShotScore, and evaluates few points, none for a budget.
            levels, max_sparsity: the levels are multiples of `levels`, up to `max_sparsity`.
            axes: "separate", a curve for each axis; or "joint", one curve, whose levels zero rows and columns alike.
            scope: "independent": all other modules stay intact. "cumulative", "cumulative_backward": earlier choices
                stay zeroed, from the first module to the last or from the last to the first.
            repair: relax sparsities until the score with all of them at once is enough, too (repair.py).
            seed: passed to the measure.
        importance: a measure by name, a function like those in importance.py, or {module: (rows, columns)}.
        importance_options: passed to the measure.
        rank: of the adapter that spends a budget.
        granularity: of that adapter; "element" where single entries of A and B are masked, "rows" where A is frozen and
            "element:rows" where both (`budget.counted_of`).
        chance: the score of guessing, by default `score.chance`; a budget never lowers the threshold's line below it.
        above_chance: apply the threshold to the part of the baseline above chance, as `config.chance` "majority" does.
        settings: plain data that goes into the result as it is.
        store: a JSON file of the curves found so far, which calls make and keep up to date. Its name must identify the
            model, the score and the importance scores, which are not in the file. A second call with the same settings
            evaluates nothing, one with another threshold or budget what the curves do not decide.
        peers: the processes that share the modules. All make the same call and get the same result; rank 0 keeps the
            store. In a cumulative scope, where modules wait for each other, rank 0 works alone.
        progress: called as progress(done, total, share=, module=, axis=, sparsity=) after each curve, with axis "joint"
            where both axes share it; gradients predict all curves at once, before that done is 0. share: of the work
            that is done, or of the most that there can be, as in a repair and for a budget, which counts curves again
            for each threshold tried. The first call is progress(0, total, share=0, left=), with the seconds that all
            will take at most, by a first pass: over a few rows, or over the intact model. None: a bar, on a terminal.

    Raises:
        PartialLoraError: in one line, for a target that the model does not have, an argument out of range, a baseline
            score that is not finite, and an error of any of the peers.
    """
    began = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose names an adapter does not have
    model = getattr(model, "get_base_model", lambda: model)()  # with its adapters, of a PeftModel
    require(isinstance(model, nn.Module), "model", model, "a torch.nn.Module")
    peers = peers or Alone()
    if above_chance is not None:
        changes["chance"] = "majority" if above_chance else "ignore"
    config = _checked(config or CalibrationConfig(), changes)
    require(isinstance(rank, Integral) and rank >= 1, "rank", rank, "a whole number, at least 1")
    one_of("granularity", granularity, *budgets.COUNTED)
    chance = _checked_chance(getattr(score, "chance", None) if chance is None else chance, config)
    modules = target_linears(model, target_modules)
    shapes = {name: (module.weight.shape[0], module.weight.shape[1]) for name, module in modules.items()}
    units = budgets.masked_units(shapes, rank, granularity)
    count = None if config.budget is None else budgets.parameter_count(config.budget, shapes, rank, granularity)

    @cache
    def scores(module: str) -> Scores:
        weight = modules[module].weight
        return scores_of(module, weight, importance, seed=config.seed or 0, options=importance_options or {})

    key = {"importance": name_of(importance), "search": config.search, "shapes": shapes}
    request = _request(config, chance, count, rank, granularity)
    cost = []  # (evaluations, seconds) of every process
    display = bar("calibrate", shown=peers.rank == 0) if progress is None else nullcontext(progress)
    with Store.shared(store, key, peers) as shared, frozen(model), display as progress:
        cached = request in shared.results
        if not cached:
            if config.search == "gradient" and not hasattr(score, "predicted"):
                raise PartialLoraError("calibration.search=gradient: expected a score with `predicted`: a FewShotScore")
            curves = Curves(model, score, modules, scores, shared)
            algorithm_1 = _Predicted if config.search == "gradient" else _Measured
            shared.results[request] = algorithm_1(curves, config, chance, units, count, peers, progress).find()
            shared.changed = True

            def paid() -> tuple[int, float]:
                shared.save()  # inside `gathered`, which raises an error in all processes
                return curves.evaluations, time.perf_counter() - began

            cost = gathered(peers, paid)
    result = Calibration(
        **shared.results[request],
        **{name: getattr(config, name) for name in ("budget", "axes", "scope", "levels", "max_sparsity")},
        chance=chance,
        above_chance=config.chance == "majority",
        evaluations=sum(evaluations for evaluations, _ in cost),
        seconds=max((seconds for _, seconds in cost), default=time.perf_counter() - began),
        cached=cached,
        settings=dict(settings or {}),
    )
    density = budgets.kept_parameters(*units, result.sparsity) / budgets.dense_parameters(shapes, rank)
    result.warnings.extend(warnings_of(result, size=getattr(score, "size", None), density=density))
    result.usual.extend(usual_of(result))
    for warning in result.warnings if peers.rank == 0 else ():
        logger.warning("calibration: %s", warning)
    return result


def _checked(config: CalibrationConfig, changes: Mapping) -> CalibrationConfig:
    """Return the settings with their changes, none of which is of a run alone or finds nothing."""
    for name in _OF_RUNS:
        require(name not in changes, name, changes.get(name), "nothing: only a run of `partial-lora` reads it")
    config = replace(config, **changes)
    for name in ("sparsity", "file"):
        require(getattr(config, name) is None, f"calibration.{name}", getattr(config, name), "null: it is to be found")
    return config


def _checked_chance(chance: Any, config: CalibrationConfig) -> float | None:
    """Return the score of guessing, a finite number, or None where it is neither known nor needed."""
    if chance is None:
        if config.chance == "majority":
            raise PartialLoraError(
                "calibration.chance=majority: the score of guessing is not known; pass `chance`, or set ignore"
            )
        return None
    is_finite = isinstance(chance, Real) and math.isfinite(chance)
    require(is_finite, "calibration.chance", chance, "the score of guessing, a finite number")
    return float(chance)


@dataclass
class _Measured:
    """Algorithm 1 on curves that a scan or a bisection evaluates, level by level, as far as a threshold needs them.

    units: what masks count in each module, and the parameters of a unit. count: the parameters of a budget, if any.
    """

    curves: Curves
    config: CalibrationConfig
    chance: float | None
    units: tuple[budgets.Shapes, int]
    count: int | None
    peers: Peers
    progress: Progress

    def __post_init__(self) -> None:
        config = self.config
        self.store, self.modules, self.axes = self.curves.store, list(self.units[0]), CURVE_AXES[config.axes]
        self.grid = sparsity_levels(config.levels, config.max_sparsity)
        self.above = self.chance if config.chance == "majority" else None
        self.total = len(self.modules) * len(self.axes)
        # How many thresholds a budget tries, and how many levels a repair relaxes, is not known before, but bounded.
        self.is_known = not config.repair and (config.budget is None or config.search == "gradient")
        self.most, self.told = most_passes(config, len(self.modules)) / self.peers.size, (0, 0.0)

    def find(self) -> dict:
        """Return the fields of `Calibration` that the steps of Algorithm 1 find."""
        self.baseline = self._of_intact()
        self.predict()
        threshold, levels, sparsity = self._chosen()
        found = of_first(self.peers, lambda: self._together(threshold, levels, sparsity))
        self.tell(self.total, 1.0)
        return found

    def _of_intact(self) -> float:
        """(1) Return the score of the frozen model, and say how long all will take."""

        def expect(seconds: float, *outputs: int) -> None:
            left = seconds_at_most(self.config, len(self.modules), seconds, *outputs, processes=self.peers.size)
            self.progress(0, self.total, share=0.0, left=left)

        if trial := self.curves.trial():
            expect(*trial)
        began = time.perf_counter()
        baseline = gathered(self.peers, self.curves.intact)[0]
        if not trial:
            expect(time.perf_counter() - began)
        self.store.check_baseline(baseline)
        return baseline

    def _chosen(self) -> tuple[float, Levels, Sparsity]:
        """(2) Return threshold, levels and sparsities: for each module and axis, up to which enough of it is left."""
        chance = self.chance
        if self.count is None:
            threshold = self.config.threshold
            levels = self.levels(threshold, line(baseline=self.baseline, threshold=threshold, chance=self.above))
            return threshold, levels, both_axes(levels)
        # The largest threshold that meets the budget, but none whose line is below chance.
        levels_at = cache(self.levels_at)
        lowest = 0.0 if chance is None or self.above is not None else threshold_of(chance, baseline=self.baseline)
        threshold, sparsity = budgets.meet(self.count, *self.units, lambda value: both_axes(levels_at(value)), lowest)
        return threshold, levels_at(threshold), sparsity

    def _together(self, threshold: float, levels: Levels, sparsity: Sparsity) -> dict:
        """(3) Score all sparsities at once; where that is not enough, a repair zeroes less."""
        curves, joint, final, repaired = self.curves, self.curves.joint(sparsity), sparsity, None
        if self.config.repair:
            before, evaluations, enough = joint, curves.evaluations, partial(self.enough, threshold=threshold)
            relaxed, joint, steps = relax(
                levels, self.grid, self.units[0], before=before, own=self.own, joint=curves.joint, enough=enough
            )
            final = both_axes(relaxed)
            repaired = {"joint_before": before, "threshold": threshold, "steps": steps}
            repaired["evaluations"] = curves.evaluations - evaluations
        return {
            "baseline": self.baseline,
            "joint": joint,
            "threshold": threshold,
            "search": self.config.search,
            "scaled": sparsity != both_axes(levels),
            "repaired": repaired,
            "modules": _entries(self.curve, levels, final, self.config.scope),
        }

    def enough(self, score: float, threshold: float) -> bool:
        """Return True where a score is enough of the frozen model's."""
        return passes(score, baseline=self.baseline, threshold=threshold, chance=self.above)

    def predict(self) -> None:
        """Find all curves at once, where that can be done."""

    def tell(self, done: int, share: float, **detail: object) -> None:
        """Tell the progress how many curves, and which share of all work, are done."""
        if not self.is_known and (detail or share < 1):
            share = min(0.99, self.curves.evaluations / self.most)
        if detail or (done, share) != self.told:
            self.progress(done, self.total, share=share, **detail)
        self.told = done, share

    def levels(self, threshold: float, least: float) -> Levels:
        """Return the levels at the only threshold that is asked for. least: the score that is just enough."""
        return self.levels_at(threshold)

    def levels_at(self, threshold: float) -> Levels:
        """Return the levels at one of several thresholds, modules in the model's order whatever the scope.

        Scope "independent": all other modules stay intact; "cumulative" and "cumulative_backward": earlier choices stay
        zeroed, from front to back or from back to front (rows before columns).
        """
        self.done, self.spent = 0, 0.0
        self.costs = {(name, axis): self.curves.cost(name, axis) for name in self.modules for axis in self.axes}
        self.whole = sum(self.costs.values())
        find = partial(self._of_module, partial(self.enough, threshold=threshold))
        levels = self._of_all(find) if self.config.scope == "independent" else self._of_first(find)
        return {module: levels[module] for module in self.modules}

    def _of_module(
        self,
        sufficient: Callable[[float], bool],
        module: str,
        choose: Callable[[str, str, float], None] | None = None,
    ) -> dict[str, float]:
        """Return the level of each axis of a module.

        choose: (module, axis, level) zeroes that level for all modules that come later.
        """
        search, levels = SEARCHES[self.config.search], {}
        for axis in self.axes:
            levels[axis] = search(partial(self.curves.survives, module, axis, passes=sufficient), self.grid)
            if choose is not None:
                choose(module, axis, levels[axis])
            if axis == self.axes[-1]:
                self.store.save()
            self._spend(module, {axis: levels[axis]})
        return levels

    def _of_first(self, find: Callable[..., dict[str, float]]) -> Levels:
        """Return the levels that the first process finds alone, as each module waits for the one before."""

        def in_turn() -> Levels:
            with self.curves.choices() as choose:
                return {module: find(module, choose) for module in in_order(self.modules, self.config.scope)}

        levels = of_first(self.peers, in_turn)
        for module in self.modules if self.peers.rank else ():
            self._spend(module, levels[module])
        return levels

    def _of_all(self, find: Callable[..., dict[str, float]]) -> Levels:
        """Return the levels that all processes find, each those of its own modules, a round of modules at a time."""
        levels: Levels = {}
        rank, size = self.peers.rank, self.peers.size
        for start in range(0, len(self.modules), _ROUND * size):

            def own(names: Sequence[str] = self.modules[start + rank : start + _ROUND * size : size]) -> tuple:
                found = {module: find(module) for module in names}
                curves = {name: {axis: points_of(self.curve(name, axis)) for axis in self.axes} for name in names}
                return found, curves

            for other, (found, curves) in enumerate(gathered(self.peers, own)):
                levels |= found
                for module in found if other != rank else ():
                    for axis in self.axes:
                        self.store.curve(module, axis).update(curve_of(curves[module][axis]))
                        self.store.changed = True
                    self._spend(module, found[module])
            self.store.save()
        return levels

    def _spend(self, module: str, levels: Mapping[str, float]) -> None:
        """Tell the progress that curves of a module are done."""
        for axis, level in levels.items():
            self.done, self.spent = self.done + 1, self.spent + self.costs[module, axis]
            share = self.spent / self.whole if self.whole else 1.0
            self.tell(self.done, share, module=module, axis=axis, sparsity=level)

    def own(self, module: str, axis: str, level: float) -> float:
        """Return the score with one level of one curve zeroed."""
        return self.curves.exact(module, axis, level)

    def curve(self, module: str, axis: str, after: str = "") -> Curve:
        """Return what is known of a curve after the cuts of a digest."""
        return self.store.curve(module, axis, after)


@dataclass
class _Predicted(_Measured):
    """Curves that gradients predict all at once; points near the line of the only threshold are then evaluated."""

    def predict(self) -> None:
        points = self.total * len(self.grid)
        self.checks = checks(points, self.curves.outputs) if self.config.budget is None else 0  # at most
        self.predicting = 0.0  # the share of all work that predicts; the rest evaluates points

        def seen(examples: float, outputs: int) -> None:
            cost = FORWARD + outputs * BACKWARD
            self.predicting = cost / (cost + self.checks)
            self.tell(0, examples * self.predicting)

        self.predicted = of_first(self.peers, lambda: self.curves.predicted(self.axes, self.grid, seen))
        self.found: dict[Point, bool] = {}  # points that were evaluated: whether the score was enough

    def levels(self, threshold: float, least: float) -> Levels:
        sufficient = partial(self.enough, threshold=threshold)
        evaluated = itertools.count(1)

        def survives(module: str, axis: str, level: float) -> bool:
            is_enough = self.curves.survives(module, axis, level, sufficient)
            share = self.predicting + (1 - self.predicting) * next(evaluated) / self.checks
            self.tell(0, share, module=module, axis=axis, sparsity=level)
            return is_enough

        def near() -> dict[Point, bool]:
            predicted, grid, outputs = self.predicted, self.grid, self.curves.outputs
            return checked(predicted, grid, enough=sufficient, line=least, survives=survives, outputs=outputs)

        self.found |= of_first(self.peers, near)
        return self.levels_at(threshold)

    def levels_at(self, threshold: float) -> Levels:
        return levels_of(self.predicted, self.grid, partial(self.enough, threshold=threshold), self.found)

    def own(self, module: str, axis: str, level: float) -> float:
        return self.predicted[module][axis][level][0]

    def curve(self, module: str, axis: str, after: str = "") -> Curve:
        points = self.store.curve(module, axis, after)
        evaluated = {level: points[level] for *curve, level in self.found if curve == [module, axis]}
        return self.predicted[module][axis] | evaluated


def _entries(
    curve: Callable[[str, str, str], Curve], levels: Levels, sparsity: Sparsity, scope: str
) -> dict[str, dict[str, dict]]:
    """Return sparsity and curve by module and axis, and the level chosen from the curve where the sparsity differs.

    curve: (module, axis, digest of the cuts made before) -> the curve.
    """
    entries: dict[str, dict[str, dict]] = {module: {} for module in levels}
    for module, axis, level, after in walk(levels, scope):
        points = points_of(curve(module, axis, after))
        for mask_axis in AXES if axis == BOTH else (axis,):
            entry = {"sparsity": sparsity[module][mask_axis], "curve": points}
            entries[module][mask_axis] = entry if entry["sparsity"] == level else entry | {"level": level}
    return entries


def _request(config: CalibrationConfig, chance: float | None, count: int | None, rank: int, granularity: str) -> str:
    """Return the key of a result among those of one store, whose curves are of one model and draw."""
    spent = {"budget": count, "rank": rank, "chance": chance, "granularity": granularity}
    return json.dumps(
        {
            **({"threshold": config.threshold} if count is None else spent),
            **{name: getattr(config, name) for name in ("levels", "max_sparsity", "axes", "scope")},
            "repair": [rank, granularity] if config.repair else None,
            "above_chance": chance if config.chance == "majority" else None,
        }
    )
