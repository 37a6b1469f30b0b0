"""Differences between methods that are more than chance: intervals from variance components.

Two methods predict the same test examples with the same seeds. The difference of what they score under seed s on
example j is modelled as

    d[s, j] = truth + a[s] + b[j] + e[s, j]

a: how much better the first method does under a seed (its masks, order, head), b: on an example, e: what is left. All
three are random: with other seeds and other examples they would differ. The error of the mean over S seeds and N
examples has a part of each, Var = var(a) / S + var(b) / N + var(e) / (S N), and the mean squares of a two-way analysis
of variance estimate it (`estimate`). Few seeds say little of var(a); Student's t with S - 1 degrees of freedom makes up
for that. Where predictions were not kept, what is left is Student's t over the seeds' scores. Medical imaging compares
methods over readers and cases with the degrees of freedom of Satterthwaite (1946): Hillis, "A comparison of denominator
degrees of freedom methods for multiple observer ROC analysis", Statistics in Medicine 26 (2007). They are more where
seeds seem to agree. Of three seeds many pairs seem to by chance: among twelve comparisons, corrected by Holm, something
was falsely decided in up to three of ten simulated races. With S - 1 it is 5 % (`make coverage`).

One seed says nothing of how much seeds differ, so it decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.metrics import FUNCTIONS, LOWER_IS_BETTER, OF_ALL_TOGETHER, OF_TEXTS, within

LEVEL = 0.95  # of every interval
MARGIN = 0.01  # one point: a method that is worse by less than this "matches"


@dataclass(frozen=True)
class Estimate:
    """A difference, its standard error, and the degrees of freedom of Student's t for (difference - truth) / error."""

    difference: float
    error: float
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the ends of the interval of a level; NaN for an error of NaN, infinite at level 1."""
        from scipy.special import stdtrit  # scipy.stats takes half a second to import

        half = self.error * stdtrit(self.freedom, (1 + level) / 2) if self.error else 0.0
        return float(self.difference - half), float(self.difference + half)

    def p(self, above: float, below: float) -> float:
        """Return the significance at which the interval first lies above one number or below another; NaN as above."""
        from scipy.special import stdtr

        if not self.error:
            return float(below <= self.difference <= above)
        tails = [stdtr(self.freedom, side / self.error) for side in (above - self.difference, self.difference - below)]
        return float(np.minimum(1, 2 * np.min(tails)))

    def sides(self, above: float = 0.0, below: float = 0.0) -> tuple[float, float]:
        """Return the significance at which the interval first lies above one number, and that for below another."""
        return self.p(above, -math.inf), self.p(math.inf, below)

    def ends(self, levels: tuple[float, float]) -> tuple[float, float]:
        """Return the lower end of the interval of one significance, and the upper end of that of another."""
        return self.interval(1 - levels[0])[0], self.interval(1 - levels[1])[1]

    def upward(self, metric: str) -> Estimate:
        """Return it with the sign by which above zero is better."""
        return replace(self, difference=-self.difference) if metric in LOWER_IS_BETTER else self


def estimate(*parts: np.ndarray) -> Estimate:
    """Return the mean difference over seeds and examples, from d (seeds, examples), with its error.

    For several parts, tasks with other examples under the same seeds, it is the mean of their means: these count alike,
    and a seed may be lucky on all of them. No component is taken for less than zero. With one seed the error is over
    examples alone; with one seed and one example it is NaN.
    """
    of_seeds = np.mean([d.mean(axis=1) for d in parts], axis=0)
    seeds, left, of_examples = len(of_seeds), 0.0, 0.0  # parts of the variance of the mean
    for d in parts:
        _, by_example, rest = (square / (len(parts) ** 2 * d.size) for square in mean_squares(d))
        left += rest
        of_examples += by_example if seeds == 1 else max(0.0, by_example - rest)  # NaN, of scores alone, adds nothing
    if seeds == 1:
        variance, freedom = of_examples, sum(d.shape[1] - 1 for d in parts)
    else:  # the spread of the seeds' means has e in it; where it is less than that, var(a) is taken for zero
        variance, freedom = of_examples + max(of_seeds.var(ddof=1) / seeds, left), seeds - 1
    return Estimate(float(of_seeds.mean()), math.sqrt(variance), float(freedom))


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares of seeds, examples and what is left, from d (…, seeds, examples); of a single one NaN.

    They are expected to be N var(a) + var(e), S var(b) + var(e), and var(e).
    """
    seeds, examples = d.shape[-2:]
    of_seeds, of_examples = d.mean(axis=-1, keepdims=True), d.mean(axis=-2, keepdims=True)
    mean = of_seeds.mean(axis=-2, keepdims=True)
    parts = (of_seeds - mean, of_examples - mean, d - of_seeds - of_examples + mean)
    totals = [(part**2).sum(axis=(-2, -1)) for part in parts]
    totals = [examples * totals[0], seeds * totals[1], totals[2]]
    freedoms = (seeds - 1, examples - 1, (seeds - 1) * (examples - 1))
    return tuple(total / freedom if freedom else math.nan for total, freedom in zip(totals, freedoms, strict=True))


def over_sets(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean difference over sets of which those at hand are a sample (random effects).

    The interval is that of Hartung and Knapp (2001), Student's t with one degree of freedom less than there are sets,
    never narrower than what errors alone would have (Knapp and Hartung 2003). Two sets say next to nothing of others:
    t is 12.7 then.
    """
    differences, weights = [one.difference for one in estimates], _weights_of_sets(estimates)
    # With this tau² the factor of Hartung and Knapp, spread / due, is 1, or less where sets are more alike than due.
    error = math.sqrt(1 / weights.sum()) if len(estimates) > 1 else math.nan
    return Estimate(float(np.average(differences, weights=weights)), error, float(len(estimates) - 1))


def _weights_of_sets(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return what sets count in their mean, 1 / (error² + tau²).

    A set k is expected to have mean + u[k]: sets differ, by a variance tau². It is found by the condition that the
    differences spread about their weighted mean as far as they should (Paule and Mandel 1982).
    """
    from scipy.optimize import brentq

    differences = np.array([one.difference for one in estimates])
    errors = np.maximum([one.error for one in estimates], 1e-12)

    def spread(tau2: float) -> float:
        weights = 1 / (errors**2 + tau2)
        return float((weights * (differences - np.average(differences, weights=weights)) ** 2).sum())

    due = len(estimates) - 1
    # At tau² = var(differences) the spread is no more than due, but for rounding.
    tau2 = brentq(lambda tau2: spread(tau2) - due, 0, 2 * differences.var(ddof=1)) if spread(0) > due > 0 else 0.0
    return 1 / (errors**2 + tau2)


def half_interval(std: float, n: int) -> float:
    """Return half the 95 % interval of a mean of n values, by Student's t; NaN of a single one."""
    return Estimate(0.0, std / math.sqrt(n), n - 1).interval()[1] if n > 1 else math.nan


def holm(significances: Sequence[float]) -> list[float]:
    """Return the significance at which each of several comparisons may be judged, by the step-down of Holm (1979).

    The most significant of n may be judged at 5 % / n, the next at 5 % / (n - 1), and so on; from the first that misses
    its own level on all have that level. So the chance that any judgement is wrong is at most 5 %, if every
    significance is of one hypothesis: of one end of an interval, or of both about one number. NaN, a comparison that
    cannot be judged, is not counted among the n; its level is 0.
    """
    order = sorted((place for place, p in enumerate(significances) if not math.isnan(p)), key=significances.__getitem__)
    steps = [(1 - LEVEL) / (len(order) - step) for step in range(len(order))]
    missed = next((step for step, place in enumerate(order) if significances[place] > steps[step]), len(order))
    levels = [0.0] * len(significances)
    for step, place in enumerate(order):
        levels[place] = steps[min(step, missed)]
    return levels


def by_sides(significances: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the levels of both ends of intervals, by Holm's correction of each side for itself.

    A difference that is surely below one number may still be wrongly called above another. So what is decided on one
    side leaves no level to the other. An end errs half as often as the interval: both sides together in 5 %.
    """
    return list(zip(*map(holm, zip(*significances, strict=True)), strict=True))


def judge(estimate: Estimate, metric: str, seeds: int, levels: tuple[float, float] = (1 - LEVEL, 1 - LEVEL)) -> str:
    """Return the verdict on an estimate by the ends of its interval: 5 %, or what `by_sides` says.

    "better": all of the interval is above zero; "matches": it is above minus the margin; "worse": below zero and not
    above minus the margin; else "undecided". Of a metric where less is better, better is below, and nothing matches.
    One seed decides nothing: its interval, if there is one, is over examples alone.
    """
    low, high = estimate.upward(metric).ends(levels)
    if seeds == 1 or math.isnan(low):
        return "undecided"
    if low > 0:
        return "better"
    if metric not in LOWER_IS_BETTER and low > -MARGIN:
        return "matches"
    return "worse" if high < 0 else "undecided"


def by_example(first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], metric: str) -> np.ndarray:
    """Return the differences of two methods' predictions (seeds, examples), whose mean is the metric's difference.

    Raises PartialLoraError as `per_example`, and where the examples are not the same.
    """
    label = first[0]["label"].to_numpy()
    for frame in (*first, *second):
        if not np.array_equal(frame["label"].to_numpy(), label):
            raise PartialLoraError("the predictions are of different test examples: only the same can be compared")
    values, others = (np.stack([per_example(frame, metric) for frame in frames]) for frames in (first, second))
    return values - others


def per_example(frame: pd.DataFrame, metric: str) -> np.ndarray:
    """Return what every example adds to a metric (N,), whose mean is the metric.

    For a metric of all examples together it is what the metric loses without the example: the jackknife's
    pseudo-values, N m - (N - 1) m without it (Tukey 1958), moved so that their mean is m. The loss of responses is a
    mean over their tokens: a longer one adds more. To perplexity it adds exp(loss) times as much, to first order.
    Raises PartialLoraError for a metric that these predictions do not give.
    """
    if "member" in frame:
        raise PartialLoraError("a mixture: compare its members one by one (`partial-lora evaluate RUN --member NAME`)")
    column = {"accuracy": "prediction", "accuracy_norm": "prediction_norm"}.get(metric, metric)
    if metric in ("accuracy", "accuracy_norm") and column in frame:
        return (frame["label"] == frame[column]).to_numpy(dtype=float)
    if metric == "mse":
        return (frame["prediction"] - frame["label"]).to_numpy(dtype=float) ** 2
    if metric in OF_TEXTS and metric in frame:
        return frame[metric].to_numpy(dtype=float)
    if metric in ("loss", "perplexity") and "tokens" in frame:
        losses = (frame["loss"] * frame["tokens"]).to_numpy(dtype=float) / frame["tokens"].mean()
        return losses if metric == "loss" else np.exp(losses.mean()) * (1 + losses - losses.mean())
    if metric in OF_ALL_TOGETHER:
        label, output = frame["label"].to_numpy(), frame["prediction"].to_numpy()
        if metric == "pearson":
            whole, without = _pearson(label, output)
            return whole - (len(label) - 1) * (without - without.mean())
        options = {}
        if metric == "f1" and ("classes" in frame or "logits" in frame):
            options["classes"] = int(frame["classes"].iloc[0]) if "classes" in frame else len(frame["logits"].iloc[0])
        score = partial(FUNCTIONS[metric], **options)
        every = np.arange(len(label))
        # Examples of one label and one output are alike: one of each kind is left out.
        kinds, which = np.unique([label, output], axis=1, return_index=True, return_inverse=True)[1:]
        without = np.array([score(output[every != one], label[every != one]) for one in kinds])[which.ravel()]
        return score(output, label) - (len(label) - 1) * (without - without.mean())
    raise PartialLoraError(f"the predictions do not say {metric}: examples cannot be compared by it")


def _pearson(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Return Pearson's correlation, and what it is without each example (N,); 0 where one of the two is constant.

    Without an example: from the sums over all others, of centred numbers.
    """
    x, y = (values.astype(float) - values.mean(dtype=float) for values in (x, y))
    n = len(x) - 1
    xx, xy, yy = (n * (a @ b - a * b) for a, b in ((x, x), (x, y), (y, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        without = (xy - x * y) / np.sqrt((xx - x**2) * (yy - y**2))
        return float(np.nan_to_num(x @ y / np.sqrt((x @ x) * (y @ y)))), np.nan_to_num(without, posinf=0, neginf=0)


def over_examples(predicted: pd.DataFrame | pa.Table | None, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of one run's metric over its test examples; None where its predictions do not give one.

    For a share it is Wilson's, else Student's t, no wider than the metric can be. It does not cover how much another
    seed would move the metric.
    """
    from scipy.stats import binomtest  # half a second

    if isinstance(predicted, pa.Table):  # without its lists, which pandas takes long to make
        unread = {"scores"} if metric in OF_ALL_TOGETHER else {"scores", "logits"}
        predicted = predicted.select([name for name in predicted.column_names if name not in unread]).to_pandas()
    try:
        values = per_example(predicted, metric)
    except (PartialLoraError, ValueError, TypeError, KeyError):  # none, of a mixture, a loss, other columns, one row
        return None
    if set(values) <= {0.0, 1.0}:  # with few examples, or none that is wrong, Student's t would be too narrow
        return tuple(binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, "wilson"))
    return within(estimate(values[None]).interval(), metric)
