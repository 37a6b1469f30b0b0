"""Differences between methods that are more than chance, by a paired bootstrap over test examples and seeds.

Two methods predict the same test examples with the same seeds. The bootstrap draws examples and seeds with replacement
and looks at the difference each time: an example that is hard for both or a seed that is lucky for both drops out.
Drawing both at once is cautious where examples and seeds vary together, but of few seeds it cannot know how much they
vary: in simulated experiments with three seeds and 200 examples (`coverage` in tests/report/test_statistics.py), 95 %
intervals held the truth in 99.7 % where seeds moved a method's accuracy by 2 points (one standard deviation), in 93 %
where by 5, and in 84 % where by 10; with ten seeds in 99, 95 and 92 %. One seed says nothing of that, so it decides
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pandas as pd

from partial_lora.calibration.reliability import every_two, mean_difference
from partial_lora.errors import PartialLoraError
from partial_lora.report.records import BLOCK, LEVEL, Predictions
from partial_lora.tasks.metrics import LOWER_IS_BETTER

MARGIN = 0.01  # one point: a method that is worse by less than this "matches"
_MOST_DRAWS_OF_WHOLE = 1_000
_DRAWS_FOR_BEST = 2_000
_DRAWS_OF_EXAMPLES = 10_000
_COUNTS_AT_ONCE = 2**22  # of examples in draws: 32 MiB, and as much again for the same as floats
_AS_CALIBRATED = ("partial", "targeted", "flow")  # methods whose sparsities are calibration's own


@dataclass(frozen=True)
class Comparison:
    """The first method's metric less the second's, over the test examples and seeds that both have.

    low, high: ends of its 95 % interval. verdict: "better" where all of the interval is above zero, "matches" where it
    is above minus the margin, "worse" where it is below zero and not above minus the margin, else "undecided". For a
    metric where less is better, better is below. Without a margin nothing "matches". Of one seed the interval is over
    examples alone, so whatever it says the verdict is "undecided", and `reason` says why: "one seed".

    seeds: how many both have; all numbers are of these.
    """

    difference: float
    low: float
    high: float
    verdict: str
    seeds: int
    examples: int
    reason: str | None = None


def compare(
    first: Mapping[int, pd.DataFrame],
    second: Mapping[int, pd.DataFrame],
    metric: str,
    *,
    margin: float | None = MARGIN,
    seed: int = 0,
    draws: int = 10_000,
) -> Comparison:
    """Compare the predictions {seed: one row an example} of two methods by the metric of their task.

    Only seeds that both have are used. Of the `draws` at most 1,000 are made for a metric that is no mean over examples
    and so computed again for each. Raises PartialLoraError where there are no such seeds, where the examples are not
    the same, and for a metric that predictions do not give.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise PartialLoraError(f"no seed that both have: {sorted(first)} and {sorted(second)}")
    sides = [[frames[number] for number in seeds] for frames in (first, second)]
    generator, differences = np.random.default_rng(seed), by_example(*sides, metric)
    if differences is None:
        difference, drawn = _bootstrap_of_whole(*sides, metric, generator, min(draws, _MOST_DRAWS_OF_WHOLE))
    else:
        difference, drawn = float(differences.mean()), bootstrap(differences, generator, draws)
    return Comparison(
        difference,
        *judge(drawn, metric, len(seeds), margin),
        seeds=len(seeds),
        examples=len(sides[0][0]),
        reason="one seed" if len(seeds) == 1 else None,
    )


def judge(drawn: np.ndarray, metric: str, seeds: int, margin: float | None = MARGIN) -> tuple[float, float, str]:
    """Return the ends of the 95 % interval of drawn differences and its verdict (`Comparison`)."""
    low, high = map(float, np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    if seeds == 1:
        return low, high, "undecided"
    return low, high, verdict(-high, -low, None) if metric in LOWER_IS_BETTER else verdict(low, high, margin)


def verdict(low: float, high: float, margin: float | None = MARGIN) -> str:
    """Return the verdict on an interval of how much better a method is (`Comparison`)."""
    if low > 0:
        return "better"
    if margin is not None and low > -margin:
        return "matches"
    return "worse" if high < 0 else "undecided"


def bootstrap(
    differences: np.ndarray, generator: np.random.Generator, draws: int, of_seeds: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean difference in every draw of seeds and examples (draws,), from differences (seeds, examples).

    of_seeds: each seed's share in every draw (draws, seeds), where these are drawn already; else they are drawn here.

    Examples that differ alike under every seed are drawn together: the count of such a kind is multinomial. The draws
    are made in parts, of 64 MiB or one draw's counts at a time, which changes no number but by rounding; what stays of
    each is its mean under every seed (draws, seeds).
    """
    seeds, examples = differences.shape
    kinds, counts = np.unique(differences, axis=1, return_counts=True)
    at_once = max(1, _COUNTS_AT_ONCE // len(counts))
    means = np.empty((draws, seeds))
    for start in range(0, draws, at_once):
        part = means[start : start + at_once]
        part[:] = generator.multinomial(examples, counts / examples, size=len(part)) @ kinds.T / examples
    if of_seeds is None:
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    return (of_seeds * means).sum(axis=1)


def by_example(first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], metric: str) -> np.ndarray | None:
    """Return the differences of two methods' predictions (seeds, examples), whose mean is the metric's difference.

    None for a metric that is no mean over examples. Raises PartialLoraError as `per_example`, and where the examples
    are not the same.
    """
    label = first[0]["label"].to_numpy()
    for frame in (*first, *second):
        if not np.array_equal(frame["label"].to_numpy(), label):
            raise PartialLoraError("the predictions are of different test examples: only the same can be compared")
    if per_example(first[0], metric) is None:
        return None
    own, other = (np.stack([per_example(frame, metric) for frame in frames]) for frames in (first, second))
    return own - other


def per_example(frame: pd.DataFrame, metric: str) -> np.ndarray | None:
    """Return what every example adds to a metric that is their mean (N,); None for a metric that is no such mean.

    Raises PartialLoraError for a metric that these predictions do not give.
    """
    if "member" in frame:
        raise PartialLoraError("a mixture: compare its members one by one (`partial-lora evaluate RUN --member NAME`)")
    column = {"accuracy": "prediction", "accuracy_norm": "prediction_norm"}.get(metric, metric)
    if metric in ("accuracy", "accuracy_norm") and column in frame:
        return (frame["label"] == frame[column]).to_numpy(dtype=float)
    if metric == "mse":
        return (frame["prediction"] - frame["label"]).to_numpy(dtype=float) ** 2
    if metric in ("exact_match", "rouge_l") and metric in frame:
        return frame[metric].to_numpy(dtype=float)
    if metric in ("f1", "matthews", "pearson", "spearman"):
        return None
    raise PartialLoraError(f"the predictions do not say {metric}: examples cannot be compared by it")


def _bootstrap_of_whole(
    first: Sequence[pd.DataFrame],
    second: Sequence[pd.DataFrame],
    metric: str,
    generator: np.random.Generator,
    draws: int,
) -> tuple[float, np.ndarray]:
    """Return the difference of a metric of all examples together, and the same in every draw."""
    from partial_lora.training.metrics import function_of  # torch and its kin: for these metrics alone

    label = first[0]["label"].to_numpy()
    outputs = [[frame["prediction"].to_numpy() for frame in frames] for frames in (first, second)]
    score = function_of(metric, len(first[0]["logits"].iloc[0]) if "logits" in first[0] else None)

    def difference(rows: np.ndarray, runs: np.ndarray) -> float:
        own, other = (np.mean([score(each[run][rows], label[rows]) for run in runs]) for each in outputs)
        return float(own - other)

    examples, seeds = len(label), len(first)
    drawn = ((generator.integers(examples, size=examples), generator.integers(seeds, size=seeds)) for _ in range(draws))
    return difference(np.arange(examples), np.arange(seeds)), np.array([difference(*each) for each in drawn])


def best(table: pd.DataFrame, predictions: Predictions) -> set[int]:
    """Return the indices of rows that are better than every other of the same `records.BLOCK`.

    table: of `records.group`, one row a folder of runs. Better is the verdict of `compare`. A row without predictions,
    or with nothing beside it, is not marked.
    """
    marked = set()
    for (*_, metric, _), block in table.groupby(list(BLOCK), sort=False, dropna=False):
        # The others that are the most likely to refute it come first.
        first, *others = block.sort_values("test_mean", ascending=metric in LOWER_IS_BETTER).itertuples()
        if others and all(_beats(first, other, metric, predictions) for other in others):
            marked.add(first.Index)
    return marked


def _beats(first: tuple, second: tuple, metric: str, predictions: Predictions) -> bool:
    seeds = sorted(set(map(int, first.seeds.split())) & set(map(int, second.seeds.split())))
    try:
        pair = (predictions.of(each.group, seeds, metric) for each in (first, second))
        return compare(*pair, metric, margin=None, draws=_DRAWS_FOR_BEST).verdict == "better"
    except (PartialLoraError, ValueError, KeyError):
        return False


def over_examples(frame: pd.DataFrame, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of one run's metric over its test examples; None for a metric that is no mean of theirs.

    Of a share it is Wilson's, else of a bootstrap. How much another seed would move the metric is not in it.
    """
    from scipy.stats import binomtest  # half a second

    try:
        each = per_example(frame, metric)
    except PartialLoraError:  # of a mixture, or a loss, which predictions do not have
        return None
    if each is None:
        return None
    if set(each) <= {0.0, 1.0}:  # of few examples, or none that is wrong, the bootstrap knows too little
        return tuple(binomtest(int(each.sum()), len(each)).proportion_ci(LEVEL, "wilson"))
    drawn = bootstrap(each[None], np.random.default_rng(0), _DRAWS_OF_EXAMPLES)
    return tuple(map(float, np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])))


def reliability(records: Iterable[Mapping]) -> float:
    """Return the correlation that two calibrations are expected to have; NaN where runs do not tell.

    records: runs that differ in their seed alone. Where they calibrated on halves of their draw
    (`calibration.reliability`) it is the Spearman–Brown correlation, the mean over runs. Where every seed calibrated on
    examples of its own (`calibration.seed=null`) it is Pearson's correlation of their sparsities, over modules and
    axes, the mean over all pairs of seeds: of `partial`, `targeted` and `flow`, since controls do not have the
    sparsities that were calibrated.
    """
    records = list(records)
    halves = [(record.get("calibration") or {}).get("reliability") or {} for record in records]
    corrected = [each["spearman_brown"] for each in halves if each.get("spearman_brown") is not None]
    if corrected:
        return fmean(corrected)
    own = {record["seed"]: record["sparsity"] for record in records if _calibrated_itself(record)}
    mean = mean_difference(every_two([own[seed] for seed in sorted(own)]))["pearson"]
    return math.nan if mean is None else mean


def _calibrated_itself(record: Mapping) -> bool:
    config, calibration = record["config"], record.get("calibration")
    if not calibration or config["method"]["name"] not in _AS_CALIBRATED:
        return False
    return config["calibration"].get("file") is None and config["calibration"].get("seed", 0) is None
