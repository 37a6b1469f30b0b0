"""Metrics: which fit which labels, which are shares, in which lower is better, and the functions of some."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

FITTING = {  # metrics of a task, by what its labels are; the first is the usual one
    "classes": ("accuracy", "f1", "matthews"),
    "real numbers": ("pearson", "spearman", "mse"),
    "places of options": ("accuracy", "accuracy_norm"),
    "texts": ("exact_match", "rouge_l", "perplexity"),
}
SHARES = {"accuracy", "accuracy_norm", "f1", "exact_match", "rouge_l"}  # read as percentages
RANGES = {
    **dict.fromkeys(SHARES, (0.0, 1.0)),
    **dict.fromkeys(("matthews", "pearson", "spearman"), (-1.0, 1.0)),
    "mse": (0.0, math.inf),
    "perplexity": (1.0, math.inf),
}
LOWER_IS_BETTER = {"mse", "perplexity"}
OF_ALL_TOGETHER = {"f1", "matthews", "pearson", "spearman"}  # not means over examples
OF_EXAMPLES = {metric for fitting in FITTING.values() for metric in fitting} - {"perplexity"}  # told by predictions
IGNORED = -100  # the label of a token that does not count, as in transformers


def standard_error(score: float, count: int) -> float:
    """Return about how far off a score is that was measured on so many rows: that of a share, also for correlations.

    One right and one wrong row are added, so that it is not 0 for a perfect score (Agresti and Coull, 1998).
    """
    share = (max(score, 0.0) * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / (count + 2))


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of predictions that equal their reference."""
    return float(np.mean(predictions == references))


def mse(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the mean squared error."""
    return float(np.mean((predictions - references) ** 2))


def f1(predictions: np.ndarray, references: np.ndarray, classes: int | None = None) -> float:
    """Return F1 of the second of two classes, as GLUE has it; of more classes, the mean over those that occur (macro).

    classes: how many there are; None for as many as are seen.
    """
    from sklearn.metrics import f1_score  # slow to import, as scipy.stats is: only runs with such a metric do

    if (classes or max(predictions.max(), references.max()) + 1) == 2:
        return float(f1_score(references, predictions, pos_label=1, zero_division=0))
    return float(f1_score(references, predictions, average="macro", zero_division=0))


def matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return Matthews' correlation of two or more classes; 0 for a constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the linear correlation; 0 for a constant, which says nothing of the labels."""
    from scipy import stats

    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the correlation of the ranks; 0 for a constant."""
    from scipy import stats

    return _correlation(stats.spearmanr, predictions, references)


def _correlation(function: Callable, predictions: np.ndarray, references: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references).statistic)


def within(ends: Sequence[float], metric: str, *, difference: bool = False, room: float = 0.0) -> tuple[float, float]:
    """Return the ends of an interval that reach no further, but for `room`, than a metric or a difference of it can."""
    low, high = RANGES.get(metric, (-math.inf, math.inf))
    low, high = (low - high, high - low) if difference else (low, high)
    return max(ends[0], low - room), min(ends[1], high + room)


FUNCTIONS: dict[str, Callable[..., float]] = {  # (predictions, references) -> a metric, each an array of one dimension
    function.__name__: function for function in (accuracy, f1, matthews, pearson, spearman, mse)
}
