"""The four analyses of a calibration: the parts each is made of, and what the parts say together.

A part is done in one go and kept, so its result is plain data. A summary is computed from parts alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

from partial_lora import agreement
from partial_lora.calibration import Calibration
from partial_lora.calibration_file import AXES, Sparsity
from partial_lora.errors import PartialLoraError
from partial_lora.reliability import correlation, reliability, split_half, verdict
from partial_lora.stability import deviation_of, every_two, mean_difference, mean_of
from partial_lora.subject import Subject
from partial_lora.tasks import Draws, drawn_from

Part = Callable[[Subject], dict]


@dataclass(frozen=True)
class Analysis:
    """parts: what is to be done, by name, from settings. summary: what that gave, from settings and done parts."""

    parts: Callable[[Mapping], dict[str, Part]]
    summary: Callable[[Mapping, Mapping[str, dict]], dict]


# Agreement: do measures choose the same rows and columns?


def agreement_parts(settings: Mapping) -> dict[str, Part]:
    """One part for each sparsity at which the measures' choices are compared."""
    chosen = settings["analysis"]

    @cache
    def scores(subject: Subject) -> dict:  # the same at every sparsity
        return {measure: subject.importance(measure, subject.draws()) for measure in chosen["measures"]}

    levels = {f"{level:g}": partial(_agreement, scores, level) for level in chosen["sparsities"]}
    return ({"calibrated": partial(_agreement, scores, None)} if chosen["calibrated"] else {}) | levels


def _agreement(scores_by: Callable[[Subject], dict], level: float | None, subject: Subject) -> dict:
    if level is None:
        sparsity = subject.calibration(subject.draws()).sparsity
    else:
        sparsity = {module: dict.fromkeys(AXES, level) for module in subject.shapes}
    scores = scores_by(subject)
    return {"sparsity": sparsity, "comparisons": agreement.compared(scores, sparsity)}


def agreement_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """One line for every two measures at each sparsity."""
    return {name: agreement.summary(part["comparisons"]) for name, part in parts.items()}


# Reliability: do two halves of the scored draw give the same sparsities?


def reliability_parts(settings: Mapping) -> dict[str, Part]:
    """One part for each split of the scored draw."""
    return {f"split {seed}": partial(_reliability, seed) for seed in range(settings["analysis"]["splits"])}


def _reliability(seed: int, subject: Subject) -> dict:
    draws = subject.draws()
    halves = [draws.scored[half] for half in split_half(drawn_from(subject.train)[draws.scored], seed)]
    found = [subject.calibration(Draws(fit=draws.fit, scored=half)) for half in halves]
    first, second = (calibration.sparsity for calibration in found)
    of_axis = {axis: correlation(_only(first, axis), _only(second, axis)) for axis in AXES}
    return {
        "halves": [_told(subject, each) | {"examples": len(half)} for each, half in zip(found, halves, strict=True)],
        "reliability": reliability(first, second),
        **of_axis,
    }


def _only(sparsity: Sparsity, axis: str) -> Sparsity:
    return {module: {axis: axes[axis]} for module, axes in sparsity.items()}


def reliability_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """Means and standard deviations over the splits, and what they mean in words."""
    each = [part["reliability"] for part in parts.values()]
    found = {key: _spread([one[key] for one in each]) for key in ("pearson", "spearman", "spearman_brown")}
    found |= {axis: _spread([part[axis]["pearson"] for part in parts.values()]) for axis in AXES}
    said = [f"{name}: {part['reliability']['said']}" for name, part in parts.items() if part["reliability"]["said"]]
    judged = verdict(found["spearman_brown"]["mean"])
    return found | {"splits": len(parts), "said": said + ([judged] if judged else [])}


# Stability: what do the draw, its size and wrong labels change?


def conditions(settings: Mapping) -> list[tuple[int, float]]:
    """(shots, noise) of the calibrations that are compared, the reference first: the settings' shots, no noise."""
    usual, chosen = settings["calibration"]["shots"], settings["analysis"]
    sizes = [(shots, 0.0) for shots in sorted(chosen["shots"])]
    noises = [(usual, noise) for noise in sorted(chosen["noise"])]
    return list(dict.fromkeys([(usual, 0.0), *sizes, *noises]))


def stability_parts(settings: Mapping) -> dict[str, Part]:
    """One part for each number of shots, share of wrong labels and seed.

    Raises PartialLoraError where labels are to be wrong and the task has none to confuse.
    """
    noise, task = settings["analysis"]["noise"], settings["task"]
    if any(noise) and (task["kind"] != "label" or task["regression"]):
        kind = "regression" if task["regression"] else task["kind"]
        raise PartialLoraError(
            f"analysis.noise={noise}: task={task['name']} is of kind {kind} and has no classes; expected [0.0]"
        )
    return {
        f"{shots} shots, {noise:.0%} noise, seed {seed}": partial(_stability, shots, noise, seed)
        for shots, noise in conditions(settings)
        for seed in settings["analysis"]["seeds"]
    }


def _stability(shots: int, noise: float, seed: int, subject: Subject) -> dict:
    draws = subject.draws(shots=shots, seed=seed)
    train, drawn = subject.mislabelled(draws, noise, seed) if noise else (None, draws)
    found = subject.calibration(drawn, train=train, shots=shots, seed=seed)
    return {"shots": shots, "noise": noise, "seed": seed, "examples": len(drawn.scored)} | _told(subject, found)


def stability_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """One line for each condition: the agreement of its seeds with each other, and with the reference's same seeds."""
    by_condition: dict[tuple[int, float], list[dict]] = {}
    for part in parts.values():
        by_condition.setdefault((part["shots"], part["noise"]), []).append(part)
    reference = {part["seed"]: part["sparsity"] for part in by_condition[conditions(settings)[0]]}
    lines = []
    for (shots, noise), found in sorted(by_condition.items()):
        sparsities = [part["sparsity"] for part in found]
        same_seed = [(part["sparsity"], reference[part["seed"]]) for part in found]
        lines.append(
            {
                "shots": shots,
                "noise": noise,
                "seeds": len(found),
                "examples": mean_of([part["examples"] for part in found]),
                "between_seeds": mean_difference(every_two(sparsities)),
                "to_reference": mean_difference(same_seed),
                **{key: _spread([part[key] for part in found]) for key in ("density", "baseline", "joint")},
                **{key: _spread([part["cost"][key] for part in found]) for key in ("evaluations", "seconds")},
            }
        )
    return {"reference": {"shots": conditions(settings)[0][0], "noise": 0.0}, "conditions": lines}


# Cost: what does a calibration take, and what each measure of importance?


def cost_parts(settings: Mapping) -> dict[str, Part]:
    """One part for each search and for each measure."""
    searches = {f"search {search}": partial(_search_cost, search) for search in ("scan", "bisect")}
    measures = settings["analysis"]["measures"]
    return searches | {f"importance {measure}": partial(_importance_cost, measure) for measure in measures}


def _search_cost(search: str, subject: Subject) -> dict:
    draws = subject.draws()
    found, score = subject.counted(draws, search)
    counted = score.evaluations
    return {
        "search": search,
        "passes": counted.passes,
        "examples": counted.examples,
        "sample_blocks": counted.sample_blocks,
        "seconds": found.seconds,
        "scored": len(draws.scored),
        "rows": score.rows,
        "depth": subject.blocks,
        "sparsity": found.sparsity,
    }


def _importance_cost(measure: str, subject: Subject) -> dict:
    draws = subject.draws()
    began = time.perf_counter()
    subject.importance(measure, draws)
    return {"measure": measure, "seconds": time.perf_counter() - began}


def cost_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """Both searches beside the literal reference, how far they differ, and the seconds of each measure.

    The literal reference is counted, not run: full passes over the whole scored draw, for the baseline, for each level
    upward to the first failure, and for all sparsities at once. With a budget, and where sparsities were repaired and
    no longer say how many levels were tried, there is none.
    """
    scan, bisect = parts["search scan"], parts["search bisect"]
    chosen = settings["calibration"]
    literal = None
    if chosen["budget"] is None and not chosen["repair"]:
        curves = AXES[:1] if chosen["axes"] == "joint" else AXES
        passes = 2 + _levels_tried(scan["sparsity"], curves, chosen["levels"], chosen["max_sparsity"])
        rows = scan.get("rows", scan["scored"])  # which earlier parts have not: each example was one row
        literal = {
            "passes": passes,
            "examples": passes * scan["scored"],
            "sample_blocks": passes * rows * scan["depth"],
            "seconds": None,
        }
    pairs = [
        (axes[axis], bisect["sparsity"][module][axis]) for module, axes in scan["sparsity"].items() for axis in axes
    ]
    return {
        "searches": {"literal": literal}
        | {
            part["search"]: {key: part[key] for key in ("passes", "examples", "sample_blocks", "seconds")}
            for part in (scan, bisect)
        },
        "differ": sum(first != second for first, second in pairs) / len(pairs),
        "importance": {part["measure"]: part["seconds"] for part in parts.values() if "measure" in part},
    }


def _levels_tried(sparsity: Sparsity, curves: tuple[str, ...], step: float, highest: float) -> int:
    """How many levels an upward scan evaluates: those that pass and the first that fails, where there is one."""
    levels = int(highest / step + 1e-9)
    return sum(min(round(axes[axis] / step) + 1, levels) for axes in sparsity.values() for axis in curves)


def _told(subject: Subject, found: Calibration) -> dict:
    """What is kept of a calibration. One that was found in the cache says nothing of what it had cost."""
    cost = {"evaluations": found.evaluations, "seconds": found.seconds}
    return {
        "baseline": found.baseline,
        "joint": found.joint,
        "density": subject.density(found.sparsity),
        "cost": dict.fromkeys(cost) if found.cached else cost,
        "sparsity": found.sparsity,
        "warnings": found.warnings,
    }


def _spread(values: list[float | None]) -> dict:
    return {"mean": mean_of(values), "deviation": deviation_of(values)}


ANALYSES = {
    "agreement": Analysis(agreement_parts, agreement_summary),
    "reliability": Analysis(reliability_parts, reliability_summary),
    "stability": Analysis(stability_parts, stability_summary),
    "cost": Analysis(cost_parts, cost_summary),
}
