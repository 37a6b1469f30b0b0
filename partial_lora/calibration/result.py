"""What calibration found, and the calibration.json that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from partial_lora.calibration.search import (
    BOTH,
    CURVE_AXES,
    SEARCHES,
    UNKNOWN,
    Levels,
    curve_of,
    line,
    passes,
    sparsity_levels,
    walk,
)
from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.files import write_json
from partial_lora.masks import AXES, Sparsity

# --- What the numbers of a calibration say that nobody has asked: sentences for whoever is about to rely on it.

_NEAR = 0.1  # share of the way from chance to the best score that is no more than luck on so few examples
_FEW, _SPARSE = 64, 0.2  # examples, and density of the whole adapter
_NAMED = 3


def findings(
    modules: Mapping[str, Mapping[str, Mapping]],
    grid: Sequence[float],
    *,
    baseline: float,
    threshold: float,
    chance: float | None,
    above_chance: bool,
    joint: float | None,
    jointly: bool = True,
    budget: bool = False,
    size: int | None = None,
    density: float | None = None,
) -> list[str]:
    """The warnings, one sentence each, the gravest first.

    modules: as in Calibration. grid: the levels there are. jointly: whether the joint score was evaluated, so
    that None means it is no number. size: scored examples. density: of the adapter as a whole.
    """
    levels = {
        module: {axis: entry.get("level", entry["sparsity"]) for axis, entry in axes.items()}
        for module, axes in modules.items()
    }
    above = chance if above_chance else None
    words = _of_baseline(baseline, None if budget else threshold, chance, above)
    words += _of_points(modules)
    words += _of_levels(levels, grid)
    if jointly:
        words += _of_joint(joint, baseline, threshold, chance, above, budget)
    if size is not None and density is not None and size < _FEW and density < _SPARSE:
        remedy = "raise the budget" if budget else "raise the threshold"
        words.append(f"risk of collapse: {1 - density:.0%} of the adapter is given up on {size} examples: {remedy}")
    return words


def _of_baseline(baseline: float, threshold: float | None, chance: float | None, above: float | None) -> list[str]:
    if chance is None:
        return []
    best = 1.0 if chance >= 0 else 0.0  # of shares, and of losses
    words = []
    if baseline <= chance + _NEAR * (best - chance):
        words.append(f"the frozen model scores {baseline:.3g} where guessing scores {chance:.3g}: poorly suited model")
    if threshold is not None and above is None and line(baseline=baseline, threshold=threshold) <= chance:
        words.append(
            f"the threshold's line, {line(baseline=baseline, threshold=threshold):.3g}, is not above chance "
            f"({chance:.3g}), so the rule is void: all that guesses passes; set calibration.chance=majority"
        )
    return words


def _of_points(modules: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    broken = [
        module
        for module, axes in modules.items()
        if any(value is None for entry in axes.values() for _, value in entry["curve"])
    ]
    if not broken:
        return []
    return [f"the score is not a number with part of {shortlist(broken, _NAMED)} zeroed; that counts as a failure"]


def _of_levels(levels: Sparsity, grid: Sequence[float]) -> list[str]:
    if not grid:
        return []
    never = [module for module, axes in levels.items() if all(level >= grid[-1] for level in axes.values())]
    if len(never) == len(levels):
        return ["every level of every module passes: the score does not tell modules apart"]
    if not any(level for axes in levels.values() for level in axes.values()):
        return ["no reduction: no module can lose anything, the sign of a poorly suited model"]
    if never:
        what = "modules never fail" if len(never) > 1 else "module never fails"
        return [f"{len(never)} {what}, even at sparsity {grid[-1]:g}: {shortlist(never, _NAMED)}"]
    return []


def _of_joint(
    joint: float | None, baseline: float, threshold: float, chance: float | None, above: float | None, budget: bool
) -> list[str]:
    remedy = "raise calibration.budget" if budget else "set calibration.repair=true"
    if joint is None:
        return [f"the joint score, with all sparsities at once, is not a number: {remedy}"]
    if passes(joint, baseline=baseline, threshold=threshold, chance=above):
        return []
    needed = line(baseline=baseline, threshold=threshold, chance=above)
    where = f"below the threshold's line ({needed:.3g})"
    if chance is not None and joint <= chance:
        where = f"no better than chance ({chance:.3g})"
    elif budget or needed == float("inf"):  # nobody asked for this line, or nothing can reach it
        return []
    return [f"the joint score, with all sparsities at once, is {joint:.3g}, {where}: {remedy}"]


VERSION = 1
_GRID = ("levels", "max_sparsity")


@dataclass(frozen=True)
class Calibration:
    """What calibration found: one sparsity for each module and axis, and the curves it was read from.

    joint: the score with all of them at once; None where it is no number, or where nobody has asked for it (`at`).
    threshold: the one asked for, or the one that meets `budget`. scaled: densities were then scaled to spend the
    budget, so the sparsities are no levels of the curves. chance: what guessing scores; above_chance: the threshold is
    of what is above it. repaired: {"joint_before", "steps", "threshold", "evaluations"} where a repair was asked for.
    evaluations, seconds: what this call cost, in all processes; cached: it evaluated nothing. warnings: sentences.
    modules: {name: {"rows"|"columns": {"sparsity", "curve": [[level, score | [low, high] | null]...]}}}, and "level",
    the one chosen from the curve, where a budget or a repair has made the sparsity another one.
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
    version: int = VERSION
    axes: str = "separate"
    scope: str = "independent"
    levels: float = 0.05
    max_sparsity: float = 0.95
    chance: float | None = None
    above_chance: bool = False
    repaired: dict | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> Sparsity:
        """{module: {"rows": s, "columns": s}}, as PartialLoraConfig takes it."""
        return {name: {axis: axes[axis]["sparsity"] for axis in AXES} for name, axes in self.modules.items()}

    @property
    def chosen(self) -> Levels:
        """The level that was chosen from each curve, before a budget scaled it or a repair relaxed it."""
        entries = {name: {axis: self._entry(name, axis) for axis in CURVE_AXES[self.axes]} for name in self.modules}
        return {
            name: {axis: entry.get("level", entry["sparsity"]) for axis, entry in of.items()}
            for name, of in entries.items()
        }

    def points(self, module: str, axis: str) -> list[list]:
        """The curve of a module and axis ("joint" where its axes share one), by rising level."""
        return self._entry(module, axis)["curve"]

    def _entry(self, module: str, axis: str) -> dict:
        return self.modules[module][AXES[0] if axis == BOTH else axis]

    def at(self, threshold: float) -> Calibration:
        """The sparsities at another threshold, from the points that are stored; the joint score is then not known.

        No repair, no budget. Raises PartialLoraError where the points do not decide it, as a curve measured after
        earlier choices never does once one of these is another.
        """
        if not 0 < threshold <= 1:
            raise PartialLoraError(f"calibration.threshold={threshold}: expected a share in (0, 1]")
        grid = sparsity_levels(self.levels, self.max_sparsity)
        chance = self.chance if self.above_chance else None
        enough = partial(passes, baseline=self.baseline, threshold=threshold, chance=chance)
        undecided, moved = 0, False
        modules: dict[str, dict[str, dict]] = {module: {} for module in self.modules}
        for module, axis, before, _ in walk(self.chosen, self.scope):
            curve = self.points(module, axis)
            level = None if moved else _read(curve, self.search, grid, enough)
            undecided += level is None
            moved = self.scope != "independent" and level != before
            for each in AXES if axis == BOTH else (axis,):
                modules[module][each] = {"sparsity": level, "curve": curve}
        if undecided:
            raise PartialLoraError(
                f"calibration: at threshold {threshold:g}, {undecided} point{'s are' if undecided > 1 else ' is'} "
                f"undecided; calibrate(..., threshold={threshold:g}, known=calibration) evaluates what is needed"
            )
        read = dataclasses.replace(
            self,
            joint=None,
            threshold=threshold,
            modules=modules,
            budget=None,
            scaled=False,
            evaluations=0,
            seconds=0.0,
            cached=True,
            repaired=None,
            warnings=[],
        )
        read.warnings.extend(read.findings(jointly=False))
        return read

    def findings(self, *, jointly: bool = True, size: int | None = None, density: float | None = None) -> list[str]:
        """What its numbers say that nobody has asked, in sentences (findings.py).

        jointly: whether the joint score was evaluated, so that None means it is no number. size: scored examples.
        density: of the adapter as a whole.
        """
        return findings(
            self.modules,
            sparsity_levels(self.levels, self.max_sparsity),
            baseline=self.baseline,
            threshold=self.threshold,
            chance=self.chance,
            above_chance=self.above_chance,
            joint=self.joint,
            jointly=jointly,
            budget=self.budget is not None,
            size=size,
            density=density,
        )

    def summary(self) -> dict:
        """What a run's result.json says of its calibration: everything but settings and curves."""
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in ("modules", "settings", "version")
        }

    def save(self, path: Path) -> None:
        """Write calibration.json, atomically."""
        write_json(Path(path), dataclasses.asdict(self))

    def reused_for(self, modules: Sequence[str]) -> Calibration:
        """The same, as a run that did not pay for it records it.

        Raises PartialLoraError, naming the first, where these are not the modules that the run adapts.
        """
        for module in sorted(self.modules.keys() ^ set(modules)):
            where = "not in this model's targets" if module in self.modules else "missing"
            raise PartialLoraError(f"calibration.file: {module} is {where}; expected a calibration of the same model")
        return dataclasses.replace(self, cached=True, evaluations=0, seconds=0.0)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read calibration.json. Raises PartialLoraError, naming the file, for one that is broken."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']} instead of {VERSION}")
            known = {item.name for item in dataclasses.fields(cls)}
            earlier = {key: content["settings"][key] for key in _GRID if key in content.get("settings", {})}
            content = {"threshold": None} | earlier | content  # files once had them among the settings alone
            found = cls(**{key: value for key, value in content.items() if key in known})
            for name, axes in found.sparsity.items():
                for axis, value in axes.items():
                    if not (isinstance(value, (int, float)) and 0 <= value < 1):
                        raise ValueError(f"{name}.{axis}: sparsity {value} is not in [0, 1)")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PartialLoraError(f"{path}: expected a calibration.json ({type(error).__name__}: {error})") from error
        return found


def _read(points: list, search: str, grid: Sequence[float], enough: Callable[[float], bool]) -> float | None:
    """The level that a search finds on a stored curve; None where a point that it asks for is not decided."""
    curve = curve_of(points)

    def survives(level: float) -> bool:
        low, high = curve.get(level, UNKNOWN)
        if enough(high) and not enough(low):
            raise LookupError
        return enough(low)

    try:
        return SEARCHES[search](survives, grid)
    except LookupError:
        return None


__all__ = ["AXES", "VERSION", "Calibration", "Sparsity"]
