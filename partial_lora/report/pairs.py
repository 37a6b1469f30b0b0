"""Pairs of methods on the same tasks and seeds: how far apart they are, and how sure that is.

Runs that kept their predictions have an interval over seeds and test examples (statistics.py); the others have
Student's t over seeds. Over several sets a difference is the mean over sets of which these are a sample, by random
effects: sets differ, and a claim is of more than these. The members of a mixture are no such sample but parts of one
task, with the same seeds: their mean has an interval over seeds and examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.report.predictions import Predictions
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import Estimate, by_example, estimate, judge, over_sets
from partial_lora.tasks.metrics import within

BOTH, SEEDS, EXAMPLES, SETS = "seeds and examples", "seeds", "examples", "sets"


@dataclass(frozen=True, eq=False)
class Outcome:
    """The score of a run on the test rows of one task, and its predictions; member: of a mixture, that task."""

    score: float
    metric: str
    group: str
    seed: int
    stored: Predictions | None
    member: str | None = None

    @classmethod
    def of(cls, row: Mapping, stored: Predictions | None) -> Outcome:
        """Return the outcome of a row of `rows.row`."""
        return cls(row["test"], row["metric"], row["group"], row["seed"], stored)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """A row a test example; raises PartialLoraError or ValueError, which says why there are none."""
        if self.stored is None:
            raise PartialLoraError(f"{self.group}: its predictions are not asked for")
        frame = self.stored.of(self.group, self.seed, self.metric)
        if self.member is None or "member" not in frame:
            return frame
        return frame[frame["member"] == self.member].drop(columns="member").reset_index(drop=True)


Side = Mapping[int, Outcome]  # the runs of a method on one task, by seed


@dataclass(frozen=True)
class Pair:
    """Two methods' runs on one task, by seed, and the metric that they are compared by."""

    first: Side
    second: Side
    metric: str

    @property
    def seeds(self) -> set[int]:
        return self.first.keys() & self.second.keys()

    def by_example(self, seeds: Sequence[int]) -> np.ndarray:
        """Return differences (seeds, examples); raises PartialLoraError, ValueError or KeyError that says why not."""
        frames = ([side[seed].predictions for seed in seeds] for side in (self.first, self.second))
        return by_example(*frames, self.metric)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first method's score less the second's, on one task or over several; NaN where there is no interval.

    low, high: ends of the 95 % interval. verdict: of `statistics.judge`; reason: why it is undecided, "one seed". over:
    what is taken for chance: seeds and examples; examples, of one seed; seeds, where predictions were not kept; sets.
    seeds: that both have, the fewest of a task; examples: of all tasks together; up, down: tasks on which the first is
    above and below.
    """

    difference: float
    low: float
    high: float
    verdict: str
    reason: str | None
    error: float
    freedom: float
    seeds: int
    examples: int
    over: str
    up: int
    down: int

    @classmethod
    def of(
        cls, estimate: Estimate, metric: str, seeds: int, examples: int, over: str, differences: Iterable[float]
    ) -> Difference:
        """Return what an estimate says. differences: on the tasks."""
        differences, (low, high) = list(differences), within(estimate.interval(), metric, difference=True)
        return cls(
            **asdict(estimate),
            low=low,
            high=high,
            verdict=judge(estimate, metric, seeds),
            reason="one seed" if seeds == 1 else None,
            seeds=seeds,
            examples=examples,
            over=over,
            up=sum(one > 0 for one in differences),
            down=sum(one < 0 for one in differences),
        )

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.difference, self.error, self.freedom)


def between(pair: Pair) -> Difference:
    """The difference on one task; raises PartialLoraError where there is no seed that both have."""
    seeds = _in_common([pair])
    d = differences_by_example(pair, seeds)
    if d is None:
        return _over_seeds([_scores(pair, seeds)], pair.metric, predicted=False)
    return _over_seeds([d], pair.metric, predicted=True)


def average(tasks: Mapping[str, Pair]) -> Difference:
    """The mean over tasks that have the same seeds, all tasks counting alike, as of the members of a mixture.

    More of their metrics is better. Raises PartialLoraError where there is no seed that all have.
    """
    pairs = list(tasks.values())
    seeds = _in_common(pairs)
    arrays = [differences_by_example(pair, seeds) for pair in pairs]
    has_examples = all(d is not None for d in arrays)
    parts = arrays if has_examples else [_scores(pair, seeds) for pair in pairs]
    return _over_seeds(parts, pairs[0].metric, has_examples)


def over_tasks(tasks: Mapping[str, Pair]) -> Difference:
    """The mean over sets of which these tasks are a sample (`statistics.over_sets`). Raises as `between`."""
    differences = [between(pair) for pair in tasks.values()]
    overall, metric = over_sets([one.estimate for one in differences]), next(iter(tasks.values())).metric
    seeds, examples = min(one.seeds for one in differences), sum(one.examples for one in differences)
    return Difference.of(overall, metric, seeds, examples, SETS, (one.difference for one in differences))


def _in_common(pairs: Sequence[Pair]) -> list[int]:
    seeds = sorted(set.intersection(*(pair.seeds for pair in pairs)))
    if not seeds:
        raise PartialLoraError("no seed in common")
    return seeds


def _over_seeds(parts: Sequence[np.ndarray], metric: str, predicted: bool) -> Difference:
    """The mean over parts d (seeds, examples); of scores in place of predictions there is one "example" a part."""
    seeds, examples = len(parts[0]), sum(d.shape[1] for d in parts) if predicted else 0
    over = (BOTH if seeds > 1 else EXAMPLES) if predicted else (SEEDS if seeds > 1 else NONE)
    return Difference.of(estimate(*parts), metric, seeds, examples, over, (d.mean() for d in parts))


def _scores(pair: Pair, seeds: Sequence[int]) -> np.ndarray:
    """Differences of scores (seeds, 1)."""
    return np.array([[pair.first[seed].score - pair.second[seed].score] for seed in seeds])


def differences_by_example(pair: Pair, seeds: Sequence[int]) -> np.ndarray | None:
    """Differences by example (seeds, examples); None where predictions were not kept, or are of other examples."""
    try:
        return pair.by_example(seeds)
    except (PartialLoraError, ValueError, KeyError):
        return None


def by_seed(runs: pd.DataFrame) -> Side:
    """Return the runs of a method, rows with an outcome each, by seed."""
    return dict(zip(runs["seed"], runs["outcome"], strict=True))


def is_best(side: Side, others: Iterable[Side], metric: str) -> bool:
    """Return whether a method is better than all others: each time the interval over seeds and examples is above zero.

    others: those that are the most likely to refute it come first. What stands alone is not best.
    """
    pairs = [Pair(side, other, metric) for other in others]
    return bool(pairs) and all(_beats(pair) for pair in pairs)


def _beats(pair: Pair) -> bool:
    if not pair.seeds:
        return False
    difference = between(pair)
    return difference.over == BOTH and difference.estimate.upward(pair.metric).interval()[0] > 0
