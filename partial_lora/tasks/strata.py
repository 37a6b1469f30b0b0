"""Orders of rows whose beginnings all have the classes in their proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shuffled(labels: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """The rows of every class, in an order drawn at random."""
    return [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def in_turn(classes: Sequence[np.ndarray]) -> np.ndarray:
    """All rows in an order of which the first n hold, for any n, every class in proportion.

    The j-th of a class of m rows has its turn at j / m, so every class is met at the start: none has a whole row more
    than its share of n, and none is left out unless there are more classes than n.
    """
    turns = np.concatenate([np.arange(len(rows)) / max(1, len(rows)) for rows in classes])
    return np.concatenate(classes)[np.argsort(turns, kind="stable")]
