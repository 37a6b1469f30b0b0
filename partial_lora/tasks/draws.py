"""The few-shot draws that calibration sees."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partial_lora.errors import PartialLoraError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draws:
    """Two disjoint sets of training rows, as ascending indices.

    `fit` is what heads and gradients are fitted on, `scored` is what decides which sparsity passes.
    """

    fit: np.ndarray
    scored: np.ndarray


def few_shot_draws(labels: Sequence[int], *, shots: int, seed: int, max_samples: int | None = None) -> Draws:
    """Draw `shots` examples a class for each of the two sets, the same ones for a seed.

    A class with fewer than 2 * shots examples is used whole, half in each set, with a warning. `max_samples` bounds
    each set, by going round the classes until it is full.
    """
    labels = np.asarray(labels)
    classes = len(np.unique(labels))
    if max_samples is not None and max_samples < classes:
        raise PartialLoraError(
            f"calibration.max_samples={max_samples}: expected at least one for each of {classes} classes"
        )
    generator = np.random.default_rng(seed)
    fit, scored, small = [], [], []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) < 2:
            raise PartialLoraError(f"calibration.shots: class {label} has one training example, expected at least 2")
        count = min(shots, len(rows) // 2)
        if count < shots:
            small.append(str(label))
        scored.append(rows[:count])
        fit.append(rows[count : 2 * count])
    if small:
        logger.warning("calibration.shots=%d: used whole, since smaller: class %s", shots, ", ".join(small))
    return Draws(fit=_round_robin(fit, max_samples), scored=_round_robin(scored, max_samples))


def _round_robin(classes: list[np.ndarray], limit: int | None) -> np.ndarray:
    """At most `limit` rows, one of each class in turn."""
    turns = [rows[turn] for turn in range(max(map(len, classes))) for rows in classes if turn < len(rows)]
    return np.sort(np.asarray(turns[:limit], dtype=np.int64))
