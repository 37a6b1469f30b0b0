"""The rubric of a metric that is no mean of examples: F1, Matthews, correlations, or a function of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor

from partial_lora.calibration.rubric import Batch, Rows, as_labels, shares
from partial_lora.errors import PartialLoraError

Metric = Callable[[np.ndarray, np.ndarray], float]


class Whole(Rows):
    """Any function (predictions, labels) -> float, larger = better, of all examples at once, as numpy arrays (N,).

    A prediction is the class with the largest logit or, where labels are real numbers, the model's one output.
    """

    lowest = highest = None

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def check(self, batch: Batch) -> None:
        if batch["labels"].ndim != 1:
            raise PartialLoraError(f"labels: expected one for each example, found {list(batch['labels'].shape)}")

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch["labels"].is_floating_point():
            return as_labels(logits, batch["labels"]).double()
        return torch.where(logits.isfinite().all(-1), logits.argmax(-1).double(), math.nan)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.zeros(len(logits))  # all are needed whatever comes first

    def whole(self, values: Tensor, labels: Tensor) -> float:
        predictions = values.cpu().numpy() if labels.is_floating_point() else values.long().cpu().numpy()
        return float(self.metric(predictions, labels.cpu().numpy()))

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """The metric of the majority class for all; of real labels 0 for a correlation, else None."""
        labels = torch.cat([batch["labels"] for batch in batches])
        if labels.is_floating_point():
            return 0.0 if self.metric in (pearson, spearman) else None
        majority = labels.unique()[shares(batches).argmax()]
        return self.whole(majority.expand(len(labels)).double(), labels)


def f1(predictions: np.ndarray, labels: np.ndarray, classes: int | None = None) -> float:
    """F1 of the second of two classes, as GLUE has it; of more, averaged over those that occur, each alike (macro).

    classes: how many there are; None for as many as are seen.
    """
    if (classes or max(predictions.max(), labels.max()) + 1) == 2:
        return float(metrics.f1_score(labels, predictions, pos_label=1, zero_division=0))
    return float(metrics.f1_score(labels, predictions, average="macro", zero_division=0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two or more classes; 0 for a constant."""
    return float(metrics.matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation; 0 for a constant, which says nothing of the labels."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of the ranks; 0 for a constant."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(function: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(predictions, labels).statistic)


METRICS: dict[str, Metric] = {"f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
