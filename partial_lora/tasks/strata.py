"""An order of rows whose beginnings all have the classes in their proportions."""

from __future__ import annotations

import numpy as np


def spread(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """All rows (N,) in an order drawn at random, of which the first n hold, for any n, every class in proportion.

    A class of m rows has its j-th at j / m, so classes take turns by their size and every one is met at the start: none
    has a whole row more than its share of n, and none is left out unless there are more classes than n.
    """
    rows, turns = [], []
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        rows.append(own)
        turns.append(np.arange(len(own)) / len(own))
    return np.concatenate(rows)[np.argsort(np.concatenate(turns), kind="stable")]
