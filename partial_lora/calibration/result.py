"""A calibration's result: the sparsities, the curves they were read from, and the calibration.json that holds both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from partial_lora.calibration.level_search import BOTH, CURVE_AXES, Levels, line, passes, sparsity_levels
from partial_lora.errors import PartialLoraError, kind_and_line, shortlist
from partial_lora.files import FORMAT, other_format, read_json, write_json
from partial_lora.masks import AXES, Sparsity

_NEAR = 0.1  # share of the way from chance to the best score that luck covers on so few examples
_FEW, _SPARSE = 64, 0.2  # examples, and density of the whole adapter


@dataclass(frozen=True)
class Calibration:
    """Sparsities of each module and axis, and the curves they were read from.

    joint: the score with all of them at once; None where it is no number.
    threshold: as it was set, or as it was found for `budget`. scaled: densities were then scaled to spend the budget,
    so that sparsities lie between the levels. chance: the score of guessing; above_chance: the threshold is a share of
    the part above it. repaired: {"joint_before", "steps", "threshold", "evaluations"} of a repair.
    evaluations, seconds: the cost of this call, in all processes; cached: it evaluated nothing. warnings: sentences.
    usual: sentences about what is no cause for concern (`usual_of`).
    modules: {name: {"rows"|"columns": {"sparsity", "curve": [[level, score | [low, high] | null]...]}}}, and "level",
    the level chosen from the curve, where a budget or a repair has then changed the sparsity.
    """

    baseline: float
    joint: float | None
    threshold: float | None
    modules: dict[str, dict[str, dict]]
    budget: float | None = None
    search: str = "scan"
    scaled: bool = False
    evaluations: int = 0
    seconds: float = 0.0
    cached: bool = False
    settings: dict = field(default_factory=dict)
    format: int = FORMAT
    axes: str = "separate"
    scope: str = "independent"
    levels: float = 0.05
    max_sparsity: float = 0.95
    chance: float | None = None
    above_chance: bool = False
    repaired: dict | None = None
    warnings: list[str] = field(default_factory=list)
    usual: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> Sparsity:
        """{module: {"rows": s, "columns": s}}, as PartialLoraConfig takes it."""
        return {name: {axis: axes[axis]["sparsity"] for axis in AXES} for name, axes in self.modules.items()}

    @property
    def chosen(self) -> Levels:
        """Level that was chosen from each curve, before a budget scaled it or a repair relaxed it."""
        of_axis = {axis: AXES[0] if axis == BOTH else axis for axis in CURVE_AXES[self.axes]}
        return {
            name: {axis: axes[stored].get("level", axes[stored]["sparsity"]) for axis, stored in of_axis.items()}
            for name, axes in self.modules.items()
        }

    @property
    def grid(self) -> list[float]:
        """Levels that may be chosen, in rising order."""
        return sparsity_levels(self.levels, self.max_sparsity)

    @property
    def never_failing(self) -> list[str]:
        """Names of the modules for which the highest level was chosen on every axis, where there are levels."""
        highest = self.grid[-1] if self.grid else math.inf
        return [name for name, levels in self.chosen.items() if all(level >= highest for level in levels.values())]

    def line(self, threshold: float) -> float:
        """Return the score that is just enough at a threshold."""
        return line(baseline=self.baseline, threshold=threshold, chance=self.chance if self.above_chance else None)

    def passes(self, score: float, threshold: float) -> bool:
        """Return True where a score is enough at a threshold."""
        chance = self.chance if self.above_chance else None
        return passes(score, baseline=self.baseline, threshold=threshold, chance=chance)

    def summary(self) -> dict:
        """Return the calibration as a run's result.json has it: everything but settings and curves."""
        left_out = ("modules", "settings", "format")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}

    def save(self, path: Path) -> None:
        """Write calibration.json, atomically."""
        write_json(Path(path), dataclasses.asdict(self))

    def reused_for(self, modules: Sequence[str]) -> Calibration:
        """Return the calibration as a run that reuses it records it: cached, at no cost.

        Raises PartialLoraError, naming the first module, where `modules`, which the run adapts, are not its own.
        """
        for module in sorted(self.modules.keys() ^ set(modules)):
            where = "not in this model's targets" if module in self.modules else "missing"
            raise PartialLoraError(f"calibration.file: {module} is {where}; expected a calibration of the same model")
        return dataclasses.replace(self, cached=True, evaluations=0, seconds=0.0)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read calibration.json. Raises PartialLoraError, naming the file, where it is broken or of another format."""
        try:
            content = read_json(path)
            if {*content} & {"modules", "format"} and (fault := other_format(content.get("format"))):
                raise PartialLoraError(f"{path}: {fault}")
            fields = {item.name for item in dataclasses.fields(cls)}
            loaded = cls(**{key: value for key, value in content.items() if key in fields})
            for name, axes in loaded.sparsity.items():
                for axis, value in axes.items():
                    if not (isinstance(value, (int, float)) and 0 <= value < 1):
                        raise ValueError(f"{name}.{axis}: sparsity {value} is not in [0, 1)")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PartialLoraError(f"{path}: expected a calibration.json ({kind_and_line(error)})") from error
        return loaded


def warnings_of(calibration: Calibration, *, size: int | None = None, density: float | None = None) -> list[str]:
    """Return what a calibration's numbers warn of, one sentence each, the gravest first.

    size: scored examples. density: of the adapter as a whole.
    """
    baseline, chance, threshold = calibration.baseline, calibration.chance, calibration.threshold
    budget, words = calibration.budget is not None, []
    if chance is not None:
        best = 1.0 if chance >= 0 else 0.0  # of shares, and of losses
        if baseline <= chance + _NEAR * (best - chance):
            words.append(
                f"the frozen model scores {baseline:.3g} where guessing scores {chance:.3g}: poorly suited model"
            )
        line = math.inf if budget or threshold is None else calibration.line(threshold)
        if not calibration.above_chance and line <= chance:
            words.append(
                f"the threshold's line, {line:.3g}, is not above chance ({chance:.3g}), so the rule is void: a model "
                "that guesses passes; set calibration.chance=majority"
            )
    broken = [
        module
        for module, axes in calibration.modules.items()
        if any(value is None for entry in axes.values() for _, value in entry["curve"])
    ]
    if broken:
        words.append(
            f"the score is not a number with part of {shortlist(broken, most=3)} zeroed; that counts as a failure"
        )
    if calibration.grid:
        if len(calibration.never_failing) == len(calibration.modules):
            words.append("every level of every module passes: the score does not tell modules apart")
        elif not any(level for axes in calibration.chosen.values() for level in axes.values()):
            words.append("no reduction: no module can lose anything, the sign of a poorly suited model")
    if calibration.joint is None:
        words.append("the joint score, with all sparsities at once, is not a number")
    if size is not None and density is not None and size < _FEW and density < _SPARSE:
        words.append(f"few examples: only {size} of them decide to leave out {1 - density:.0%} of the adapter")
    return words


def usual_of(calibration: Calibration) -> list[str]:
    """Return sentences that would alarm about a pruned model, and are usual here since training zeroes nothing of W.

    Nine in ten of the calibrations in results/ have either sentence.
    """
    joint, threshold, chance, words = calibration.joint, calibration.threshold, calibration.chance, []
    if 0 < (never := len(calibration.never_failing)) < len(calibration.modules):
        subject = "modules never fail" if never > 1 else "module never fails"
        words.append(f"{never} {subject}, even at sparsity {calibration.grid[-1]:g}")
    if joint is None or threshold is None:
        return words
    if not calibration.passes(joint, threshold):
        needed, where = calibration.line(threshold), None
        if chance is not None and joint <= chance:
            where = f"no better than chance ({chance:.3g})"
        elif calibration.budget is None and needed != math.inf:  # a budget has no line, nothing reaches an infinite one
            where = f"below the threshold's line ({needed:.3g})"
        if where:
            words.append(
                f"the frozen model with all sparsities at once scores {joint:.3g}, {where}: it says how much modules "
                "depend on each other, and nothing of the adapter, which leaves the frozen weights whole"
            )
    return words
