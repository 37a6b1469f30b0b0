"""Two methods compared example by example: how much better one is, and how sure that is.

Both have predicted the same test examples with the same seeds. The paired bootstrap draws examples and seeds again,
with replacement, and looks at the difference each time: what is common to both, an example that is hard or a seed that
is lucky, drops out. Drawing both at once is cautious where examples and seeds vary together, and of few seeds it knows
little of how much they vary: in simulated experiments with three seeds and 200 examples (`coverage` in
tests/test_comparison.py), 95 % intervals held the truth in 99.7 % where seeds moved a method's accuracy by 2 points
(one standard deviation), in 93 % where by 5, and in 84 % where by 10; with ten seeds in 99, 95 and 92 %. Of one seed it
knows nothing of that, and so nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pandas as pd

from partial_lora.calibration.reliability import every_two, mean_difference
from partial_lora.errors import PartialLoraError
from partial_lora.report.records import Predictions
from partial_lora.tasks.metrics import LOWER_IS_BETTER

MARGIN = 0.01  # one point: a method that is worse by less than this "matches"
_MOST_DRAWS_OF_WHOLE = 1_000
_COUNTS_AT_ONCE = 2**22  # of examples in draws: 32 MiB, and as much again for the same as floats
_LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """The first method's metric less the second's, over the test examples and seeds that both have.

    low, high: ends of its 95 % interval. verdict: "better" where all of the interval is above zero, "matches" where it
    is above minus the margin, "worse" where it is below zero and not above minus the margin, else "undecided". For a
    metric where less is better, better is below. Without a margin nothing "matches". Of one seed the interval is over
    examples alone, so whatever it says the verdict is "undecided", and `reason` says why: "one seed".

    seeds: how many both have; all numbers are of these. left_out: the seeds that only one of them has.
    """

    difference: float
    low: float
    high: float
    seeds: int
    examples: int
    verdict: str
    reason: str | None = None
    left_out: tuple[int, ...] = ()


def compared(
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
    and so computed anew for each. Raises PartialLoraError where there are no such seeds, where the examples are not
    the same, and for a metric that predictions do not say.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise PartialLoraError(f"no seed that both have: {sorted(first)} and {sorted(second)}")
    of_first, of_second = ([frames[number] for number in seeds] for frames in (first, second))
    _check_alike([*of_first, *of_second])
    drawn = np.random.default_rng(seed)
    if per_example(of_first[0], metric) is None:
        difference, spread = _of_whole(of_first, of_second, metric, drawn, min(draws, _MOST_DRAWS_OF_WHOLE))
    else:
        values = [np.stack([per_example(frame, metric) for frame in frames]) for frames in (of_first, of_second)]
        differences = values[0] - values[1]
        difference, spread = float(differences.mean()), resampled(differences, drawn, draws)
    low, high = np.quantile(spread, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    sign = -1 if metric in LOWER_IS_BETTER else 1
    ends = sorted([sign * low, sign * high])
    reason = "one seed" if len(seeds) == 1 else None
    judged = "undecided" if reason else verdict(*ends, margin if metric not in LOWER_IS_BETTER else None)
    left_out = tuple(sorted(first.keys() ^ second.keys()))
    return Comparison(difference, float(low), float(high), len(seeds), len(of_first[0]), judged, reason, left_out)


def verdict(low: float, high: float, margin: float | None = MARGIN) -> str:
    """What an interval of how much better a method is says of it (`Comparison`)."""
    if low > 0:
        return "better"
    if margin is not None and low > -margin:
        return "matches"
    return "worse" if high < 0 else "undecided"


def resampled(
    differences: np.ndarray, drawn: np.random.Generator, draws: int, of_seeds: np.ndarray | None = None
) -> np.ndarray:
    """The mean difference in every draw of seeds and examples (draws,), from differences (seeds, examples).

    of_seeds: each seed's share in every draw (draws, seeds), where these are drawn already; else they are drawn here.

    Examples that differ alike under every seed are drawn together: how often a kind of them comes up is multinomial.
    The draws are made in parts, of 64 MiB or one draw's counts at a time, which changes no number but by rounding; what
    is kept of each is its mean under every seed (draws, seeds).
    """
    seeds, examples = differences.shape
    kinds, counts = np.unique(differences, axis=1, return_counts=True)
    at_once = max(1, _COUNTS_AT_ONCE // len(counts))
    means = np.empty((draws, seeds))
    for start in range(0, draws, at_once):
        part = means[start : start + at_once]
        part[:] = drawn.multinomial(examples, counts / examples, size=len(part)) @ kinds.T / examples
    if of_seeds is None:
        of_seeds = drawn.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    return (of_seeds * means).sum(axis=1)


def per_example(frame: pd.DataFrame, metric: str) -> np.ndarray | None:
    """What every example adds to the metric, which is their mean (N,); None for a metric that is no such mean.

    Raises PartialLoraError for a metric that these predictions do not say.
    """
    said = {"accuracy": "prediction", "accuracy_norm": "prediction_norm", "mse": "prediction"}.get(metric, metric)
    if "member" in frame:
        raise PartialLoraError("a mixture: compare its members one by one (`partial-lora evaluate RUN --member NAME`)")
    if metric in ("accuracy", "accuracy_norm") and said in frame:
        return (frame["label"] == frame[said]).to_numpy(dtype=float)
    if metric == "mse":
        return (frame["prediction"] - frame["label"]).to_numpy(dtype=float) ** 2
    if metric in ("exact_match", "rouge_l") and metric in frame:
        return frame[metric].to_numpy(dtype=float)
    if metric in ("f1", "matthews", "pearson", "spearman"):
        return None
    raise PartialLoraError(f"the predictions do not say {metric}: examples cannot be compared by it")


def _of_whole(
    first: list[pd.DataFrame], second: list[pd.DataFrame], metric: str, drawn: np.random.Generator, draws: int
) -> tuple[float, np.ndarray]:
    """The difference of a metric of all examples together, and the same in every draw."""
    from partial_lora.training.metrics import function_of  # torch and its kin: for these metrics alone

    label = first[0]["label"].to_numpy()
    said = [[frame["prediction"].to_numpy() for frame in frames] for frames in (first, second)]
    score = function_of(metric, len(first[0]["logits"].iloc[0]) if "logits" in first[0] else None)

    def of(rows: np.ndarray, runs: np.ndarray) -> float:
        own, other = (np.mean([score(each[run][rows], label[rows]) for run in runs]) for each in said)
        return float(own - other)

    examples, seeds = len(label), len(first)
    again = ((drawn.integers(examples, size=examples), drawn.integers(seeds, size=seeds)) for _ in range(draws))
    return of(np.arange(examples), np.arange(seeds)), np.array([of(*each) for each in again])


def _check_alike(frames: list[pd.DataFrame]) -> None:
    """Refuse predictions of different examples."""
    label = frames[0]["label"].to_numpy()
    for frame in frames[1:]:
        if len(frame) != len(label) or not np.array_equal(frame["label"].to_numpy(), label):
            raise PartialLoraError("the predictions are of different test examples: only the same can be compared")


# --- Which rows of a table are the best, where that is more than chance.

BLOCK = ["task", "model", "operating_point", "metric", "conditions"]  # within which one row may be the best
_DRAWS = 2_000


def best(table: pd.DataFrame, predictions: Predictions) -> set[int]:
    """The indices of rows that are better than every other of the same task, model, operating point and conditions.

    table: of `grouping.group`, one row a folder of runs. Better is what the paired bootstrap over examples and seeds
    says of the predictions (`comparison.compared`). A row whose predictions are not there, or that has nothing beside
    it, is not marked.
    """
    found = set()
    for _, block in table.groupby(BLOCK, sort=False, dropna=False):
        if len(block) < 2:
            continue
        metric = block["metric"].iloc[0]
        ranked = block.sort_values(
            "test_mean", ascending=metric in LOWER_IS_BETTER
        )  # the likeliest to refute come first
        first, others = ranked.iloc[0], ranked.iloc[1:]
        if all(_beats(first, other, metric, predictions) for _, other in others.iterrows()):
            found.add(first.name)
    return found


def _beats(first: pd.Series, second: pd.Series, metric: str, predictions: Predictions) -> bool:
    both = set(map(int, first["seeds"].split())) & set(map(int, second["seeds"].split()))
    try:
        pair = (predictions.of(each["group"], sorted(both), metric) for each in (first, second))
        return compared(*pair, metric, margin=None, draws=_DRAWS).verdict == "better"
    except (PartialLoraError, ValueError, KeyError):
        return False


# --- How reliable the sparsities of finished runs are, by their records: what calibrating again would bring back.

_AS_CALIBRATED = ("partial", "targeted", "flow")  # methods whose sparsities are calibration's own


def reliability(records: Iterable[Mapping]) -> float:
    """A correlation that two calibrations are expected to have; NaN where the runs do not tell.

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
    found = mean_difference(every_two([own[seed] for seed in sorted(own)]))["pearson"]
    return math.nan if found is None else found


def _calibrated_itself(record: Mapping) -> bool:
    config, calibration = record["config"], record.get("calibration")
    if not calibration or config["method"]["name"] not in _AS_CALIBRATED:
        return False
    return config["calibration"].get("file") is None and config["calibration"].get("seed", 0) is None
