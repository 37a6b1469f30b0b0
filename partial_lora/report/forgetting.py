"""What methods forget: the change of a language model's score on another set, from the untouched model to the trained.

The runs of a comparison are of one model and judged on the same rows, so the untouched model's score cancels where two
methods are compared. Intervals are as in `sequential`: over seeds and rows, what seeds move a difference by pooled over
all methods. The leader was chosen by other scores; all comparisons with it, of all sets, err together in 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from partial_lora.report.sequential import NOTHING, OPEN, Outputs, Seeds
from partial_lora.report.statistics import LEVEL, estimate

LOSS = "loss"  # what is measured today; records may have a share, of which more is better
LESS, MORE = "forgets less", "forgets more"


@dataclass(frozen=True)
class Changes:
    """Changes of a metric on a set, after training less before: by method and seed, of each row (N,) or in sum (1,).

    before: the score of the untouched model.
    """

    metric: str
    before: float
    by_row: Outputs


@dataclass(frozen=True)
class Change:
    """Change that a method's training makes on a set, a mean over its seeds, with the ends of its 95 % interval.

    verdict: beside the leader, LESS or MORE forgotten, OPEN if they are not told apart. less: by how much it forgets
    less, upward, with the ends of that interval. An interval of one seed is over rows alone, and decides nothing.
    """

    change: float
    low: float
    high: float
    verdict: str = OPEN
    less: float = 0.0
    less_low: float = 0.0
    less_high: float = 0.0


def changes_of(runs: Mapping[str, Mapping[int, Mapping[str, Mapping]]]) -> dict[str, Changes]:
    """Return by set what the runs of methods have changed; a method counts with the seeds that were measured.

    runs: what is recorded of each (`packs.forgetting`), by method and seed. Means count where rows are not known.
    """
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    metrics, before = {}, {}
    for method, seeds in runs.items():
        for seed, recorded in seeds.items():
            for name, measured in recorded.items():
                rows = [np.asarray(measured[when], float) for when in ("before", "after")]
                metrics[name], before[name] = measured["metric"], float(rows[0].mean())
                found.setdefault(name, {}).setdefault(method, {})[seed] = rows[1] - rows[0]
    return {name: Changes(metrics[name], before[name], _of_the_same_rows(methods)) for name, methods in found.items()}


def _of_the_same_rows(outputs: Outputs) -> Outputs:
    """Return outputs as they are where all have as many rows, else their means."""
    counts = {len(values) for seeds in outputs.values() for values in seeds.values()}
    if len(counts) == 1:
        return outputs
    return {name: {seed: one.mean(keepdims=True) for seed, one in seeds.items()} for name, seeds in outputs.items()}


def judged(found: Mapping[str, Changes], leader: str) -> dict[str, dict[str, Change]]:
    """Return the change of each method on each set, and whether it forgets less than the leader."""
    comparisons = sum(max(1, len(changes.by_row) - 1) for changes in found.values())
    return {name: _judged(changes, leader, 1 - (1 - LEVEL) / comparisons) for name, changes in found.items()}


def _judged(changes: Changes, leader: str, level: float) -> dict[str, Change]:
    sign = -1 if changes.metric == LOSS else 1
    own = changes.by_row.get(leader, {})
    shared = {name: seeds for name, seeds in changes.by_row.items() if len(seeds.keys() & own.keys()) > 1}
    moved = Seeds.of(shared) if len(shared) > 1 else None
    found = {}
    for name, seeds in changes.by_row.items():
        alone = estimate(np.stack(list(seeds.values())))
        found[name] = change = Change(alone.difference, *alone.interval())
        if moved and name != leader and name in shared:
            pairs = [(seeds[seed], own[seed]) for seed in sorted(seeds.keys() & own.keys())]
            d = np.stack([sign * (one - other) for one, other in pairs])
            apart = moved.estimate(d)
            low, high = apart.interval(level)
            verdict = OPEN if apart.error <= NOTHING or low <= 0 <= high else LESS if low > 0 else MORE
            found[name] = Change(change.change, change.low, change.high, verdict, apart.difference, low, high)
    return found


def as_record(found: Mapping[str, Changes], leader: str) -> dict:
    """Return what is judged as plain data, by set."""
    return {
        name: {
            "metric": found[name].metric,
            "before": found[name].before,
            "methods": {method: asdict(change) for method, change in of_set.items()},
        }
        for name, of_set in judged(found, leader).items()
    }
