"""Two methods on several tasks: the paired difference on each, and on average over them, with 95 % intervals.

Seeds and test examples are drawn again, as comparison.py does for one task: examples within each task, seeds once for
all, since a seed draws the same masks and the same order on every task. The tasks themselves are not drawn: an average
is of these tasks, and says nothing of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from partial_lora.comparison import MARGIN, Comparison, compared, per_example, resampled, verdict
from partial_lora.errors import PartialLoraError
from partial_lora.evidence.recorded import Outcome
from partial_lora.runs import LOWER_IS_BETTER

_LEVEL = 0.95
BOTH, SEEDS, EXAMPLES, NOTHING = "seeds and examples", "seeds", "examples", "–"


@dataclass(frozen=True)
class Pair:
    """Two methods' runs on one task, by seed, and the metric that they are compared by."""

    first: Mapping[int, Outcome]
    second: Mapping[int, Outcome]
    metric: str

    @property
    def seeds(self) -> set[int]:
        return self.first.keys() & self.second.keys()


@dataclass(frozen=True)
class Difference:
    """The first method's score less the second's, and the 95 % interval of it; NaN where there is nothing to draw.

    over: what was drawn again: seeds and examples; examples, of one seed; seeds, where predictions were not kept
    (Student's t). seeds: that both have, the fewest of a task; examples: of all tasks together. verdict: in
    comparison.py's words; of one seed nothing is decided, since how much seeds differ is not known.
    """

    difference: float
    low: float
    high: float
    seeds: int
    examples: int
    over: str
    verdict: str


@dataclass(frozen=True)
class _Drawn:
    difference: float
    draws: np.ndarray | None
    seeds: int
    examples: int
    over: str


def between(pairs: Sequence[Pair], *, draws: int = 10_000, margin: float | None = MARGIN) -> Difference:
    """The difference on one task. Of several pairs on it (other importance measures, say) it is the mean over them.

    Raises PartialLoraError where there is no seed that all have.
    """
    drawn = _drawn(pairs, np.random.default_rng(0), draws)
    return _judged([drawn], [pairs[0].metric], margin)


def average(tasks: Mapping[str, Sequence[Pair]], *, draws: int = 10_000, margin: float | None = MARGIN) -> Difference:
    """The mean over tasks of the differences on each, all tasks counting alike.

    What is not drawn by example (other metrics, predictions that were not kept) is drawn by itself on each task.
    Raises PartialLoraError as `between`, and where a metric is one of which less is better.
    """
    if falling := sorted({pair.metric for pairs in tasks.values() for pair in pairs} & LOWER_IS_BETTER):
        raise PartialLoraError(f"{falling[0]}: no average over tasks, since less of it is better")
    shares = _seed_shares([_in_common(pairs) for pairs in tasks.values()], draws)
    # A stream of its own for each task: with one for all, lucky examples would be so on every task at once.
    each = [
        _drawn(pairs, np.random.default_rng([0, place]), draws, own)
        for place, (pairs, own) in enumerate(zip(tasks.values(), shares, strict=True))
    ]
    return _judged(each, [pairs[0].metric for pairs in tasks.values()], margin)


def _seed_shares(of_tasks: Sequence[Sequence[int]], draws: int) -> list[np.ndarray]:
    """For each task the share of its seeds in every draw (draws, seeds): one draw of all seeds serves all tasks.

    A draw that has none of a task's seeds is made again. How many a draw has of a task that has not all seeds varies,
    which widens what such a task adds to an interval by about a tenth.
    """
    every = sorted(set().union(*of_tasks))
    columns = [[every.index(seed) for seed in seeds] for seeds in of_tasks]
    stream, counts = np.random.default_rng(0), np.empty((0, len(every)))
    while len(counts) < draws:
        more = stream.multinomial(len(every), np.full(len(every), 1 / len(every)), size=draws)
        usable = np.all([more[:, own].sum(axis=1) > 0 for own in columns], axis=0)
        counts = np.concatenate([counts, more[usable]])
    of_task = [counts[:draws, own] for own in columns]
    return [own / own.sum(axis=1, keepdims=True) for own in of_task]


def _in_common(pairs: Sequence[Pair]) -> list[int]:
    seeds = sorted(set.intersection(*(set(pair.seeds) for pair in pairs)))
    if not seeds:
        raise PartialLoraError("no seed in common")
    return seeds


def _judged(each: Sequence[_Drawn], metrics: Sequence[str], margin: float | None) -> Difference:
    difference, seeds = float(np.mean([one.difference for one in each])), min(one.seeds for one in each)
    over = each[0].over if len({one.over for one in each}) == 1 else "; ".join(sorted({one.over for one in each}))
    low = high = float("nan")
    judged = "undecided"
    if all(one.draws is not None for one in each):
        spread = np.mean([one.draws for one in each], axis=0)
        low, high = map(float, np.quantile(spread, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]))
        if seeds > 1:
            judged = verdict(-high, -low, None) if metrics[0] in LOWER_IS_BETTER else verdict(low, high, margin)
    return Difference(difference, low, high, seeds, sum(one.examples for one in each), over, judged)


def _drawn(
    pairs: Sequence[Pair], stream: np.random.Generator, draws: int, of_seeds: np.ndarray | None = None
) -> _Drawn:
    seeds = _in_common(pairs)
    over = BOTH if len(seeds) > 1 else EXAMPLES
    found = _told(pairs, seeds)
    if isinstance(found, np.ndarray):
        return _Drawn(float(found.mean()), resampled(found, stream, draws, of_seeds), len(seeds), found.shape[1], over)
    shares = stream.permutation((np.arange(draws) + 0.5) / draws)
    if found is not None:  # what is known of it is its interval: drawn from the normal that has it
        deviation = (found.high - found.low) / (2 * ndtri((1 + _LEVEL) / 2))
        normal = found.difference + deviation * ndtri(shares)
        return _Drawn(found.difference, normal, len(seeds), found.examples, over)
    of_seeds = np.mean([[pair.first[seed].score - pair.second[seed].score for seed in seeds] for pair in pairs], axis=0)
    mean = float(of_seeds.mean())
    if len(seeds) == 1:
        return _Drawn(mean, None, 1, 0, NOTHING)
    error = of_seeds.std(ddof=1) / np.sqrt(len(seeds))
    return _Drawn(mean, mean + error * stdtrit(len(seeds) - 1, shares), len(seeds), 0, SEEDS)


def _told(pairs: Sequence[Pair], seeds: Sequence[int]) -> np.ndarray | Comparison | None:
    """What predictions say: differences (seeds, examples), the mean over pairs; of one pair whose metric is no mean
    over examples its comparison; None where they were not kept, or are of other examples."""
    arrays = []
    for pair in pairs:
        first, second = ({seed: side[seed].predictions for seed in seeds} for side in (pair.first, pair.second))
        if any(frame is None for frame in (*first.values(), *second.values())):
            return None
        try:
            of_examples = per_example(first[seeds[0]], pair.metric) is not None
            # For means over examples this only refuses predictions of other examples.
            found = compared(first, second, pair.metric, draws=1 if of_examples else 1_000)
            if not of_examples:
                return found if len(pairs) == 1 else None
            values = [[per_example(side[seed], pair.metric) for seed in seeds] for side in (first, second)]
        except (PartialLoraError, ValueError, KeyError):
            return None
        arrays.append(np.array(values[0]) - np.array(values[1]))
    return np.mean(arrays, axis=0) if len({each.shape for each in arrays}) == 1 else None
