"""What the numbers of a calibration say that nobody has asked: sentences for whoever is about to rely on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partial_lora.calibration.points import Sparsity
from partial_lora.calibration.search import line, passes

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
    return [f"the score is not a number with part of {_some(broken)} zeroed; that counts as a failure"]


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
        return [f"{len(never)} {what}, even at sparsity {grid[-1]:g}: {_some(never)}"]
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


def _some(modules: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(modules) - _NAMED
    return ", ".join(modules[:_NAMED]) + (f" and {more} more" if more > 0 else "")
