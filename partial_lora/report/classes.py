"""The classes of a task in what a run predicted: which are confused, and how well each is told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

MOST = 20  # classes of a matrix that can be read
_NAMED = {"label", "prediction", "label_name", "prediction_name"}


@dataclass(frozen=True)
class Classes:
    """Test examples by their class and the predicted one. counts: (class, predicted class), whole numbers."""

    names: list[str]
    counts: np.ndarray

    def scores(self) -> list[tuple[str, int, float, float, float]]:
        """Return name, examples, precision, recall and F1 of every class; NaN where nothing is divided by."""
        right, actual, predicted = self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = right / predicted, right / actual
            rows = zip(actual.tolist(), precision, recall, 2 * right / (actual + predicted), strict=True)
        return [(name, *map(float, numbers)) for name, numbers in zip(self.names, rows, strict=True)]

    def confused(self, most: int = 5) -> list[tuple[str, str, int]]:
        """Return the most frequent mistakes: class, predicted class, examples."""
        wrong = np.where(np.eye(len(self.names), dtype=bool), 0, self.counts)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [
            (self.names[row], self.names[column], int(wrong[row, column]))
            for row, column in pairs
            if wrong[row, column]
        ]


def counted(predicted: pa.Table) -> Classes | None:
    """Return the classes of a run's predictions, in their order; None where it predicts something else, or members."""
    if not set(predicted.column_names) >= _NAMED or "member" in predicted.column_names:
        return None
    names: dict[int, str] = {}
    for column in ("label", "prediction"):
        names |= dict(zip(predicted[column].to_pylist(), predicted[f"{column}_name"].to_pylist(), strict=True))
    order = sorted(names)
    counts = np.zeros((len(order), len(order)), int)
    np.add.at(counts, tuple(np.searchsorted(order, predicted[column]) for column in ("label", "prediction")), 1)
    return Classes([str(names[index]) for index in order], counts)
