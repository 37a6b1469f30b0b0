"""What a calibration is asked: checked before anything runs, and named so that the same is never asked twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from partial_lora.calibration.calibration_file import Calibration
from partial_lora.calibration.points import CURVE_AXES, curve_of
from partial_lora.calibration.search import SCOPES, SEARCHES, threshold_of, walk
from partial_lora.calibration.store import Store
from partial_lora.errors import PartialLoraError

_SAME = ("search", "axes", "scope", "levels", "max_sparsity")  # what the points of two calibrations have to share

RECORDED = ("budget", "axes", "scope", "levels", "max_sparsity", "chance", "above_chance")  # in the result, as asked


@dataclass(frozen=True)
class Question:
    """The arguments of `calibrate` that decide its result, given the curves.

    Raises PartialLoraError, naming the argument, for one that is out of range or does not go with another.
    """

    threshold: float
    budget: float | None
    search: str
    levels: float
    max_sparsity: float
    axes: str
    scope: str
    repair: bool
    chance: float | None
    above_chance: bool

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise PartialLoraError(f"calibration.threshold={self.threshold}: expected a share in (0, 1]")
        for name, allowed in (("search", SEARCHES), ("axes", CURVE_AXES), ("scope", SCOPES)):
            if getattr(self, name) not in allowed:
                raise PartialLoraError(
                    f"calibration.{name}={getattr(self, name)}: expected one of {', '.join(allowed)}"
                )
        if not 0 < self.levels < 1:
            raise PartialLoraError(f"calibration.levels={self.levels}: expected the step between two levels, in (0, 1)")
        if not 0 <= self.max_sparsity < 1:
            raise PartialLoraError(f"calibration.max_sparsity={self.max_sparsity}: expected a share in [0, 1)")
        if self.repair and self.budget is not None:
            raise PartialLoraError(
                f"calibration.repair=true: gives parameters back, which calibration.budget={self.budget:g} has fixed; "
                "set one of them"
            )
        if self.above_chance and self.chance is None:
            raise PartialLoraError(
                "calibration.chance=majority: this score does not say what guessing scores: give it, or set ignore"
            )
        if self.chance is not None and not math.isfinite(self.chance):
            raise PartialLoraError(f"calibration.chance={self.chance}: expected what guessing scores, a finite number")

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
        point: dict = {"threshold": self.threshold}
        if count is not None:
            point = {"budget": count, "rank": rank, "chance": self.chance}
            if granularity != "rows_columns":
                point["granularity"] = granularity
        grid = {"levels": self.levels, "max_sparsity": self.max_sparsity}
        variants = {
            name: value
            for name, value, usual in (
                ("axes", self.axes, "separate"),
                ("scope", self.scope, "independent"),
                ("repair", [rank, granularity] if self.repair else None, None),
                ("above_chance", self.guessing, None),
            )
            if value != usual
        }
        return json.dumps(point | grid | variants)

    def agrees_with(self, known: Calibration, modules: Sequence[str]) -> None:
        """Raises PartialLoraError, in one line, where an earlier calibration was asked of other points."""
        for name in _SAME:
            if getattr(known, name) != getattr(self, name):
                raise PartialLoraError(
                    f"known: its {name} is {getattr(known, name)}, expected {getattr(self, name)}; "
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
