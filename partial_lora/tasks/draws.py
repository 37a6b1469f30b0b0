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

    `fit` is what heads and gradients are fitted on, `scored` is what decides which sparsity passes. `warnings` says in
    words which classes are too small for what was asked.
    """

    fit: np.ndarray
    scored: np.ndarray
    warnings: tuple[str, ...] = ()


def few_shot_draws(labels: Sequence[int], *, shots: int, seed: int, max_samples: int | None = None) -> Draws:
    """Draw `shots` examples a class for each of the two sets, the same ones for a seed.

    A class with fewer than 2 * shots examples is used whole, half in each set and an odd one in `scored`, with a
    warning; a single example goes to `fit`, since a head has to know the class. `max_samples` bounds each set, by going
    round the classes until it is full. Raises PartialLoraError where one of the sets would be empty, or could not hold
    one example of each class.
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    if max_samples is not None and max_samples < len(classes):
        raise PartialLoraError(
            f"calibration.max_samples={max_samples}: expected at least one for each of {len(classes)} classes"
        )
    generator = np.random.default_rng(seed)
    fit, scored, small, single = [], [], [], []
    for label in classes:
        rows = generator.permutation(np.flatnonzero(labels == label))
        count = min(shots, (len(rows) + 1) // 2) if len(rows) > 1 else 0
        scored.append(rows[:count])
        fit.append(rows[count : count + shots])
        if len(rows) < 2 * shots:
            (small if count else single).append(str(label))
    if not any(map(len, scored)):
        raise PartialLoraError(
            f"calibration.shots={shots}: no class has 2 training examples, one to fit and one to score; add rows"
        )
    warnings = []
    if small:
        warnings.append(
            f"calibration.shots={shots}: used whole, half to fit and half to score, since smaller: class {_few(small)}"
        )
    if single:
        warnings.append(
            f"calibration.shots={shots}: a single training example, fitted on and never scored: class {_few(single)}"
        )
    for warning in warnings:
        logger.warning("%s", warning)
    return Draws(_round_robin(fit, max_samples), _round_robin(scored, max_samples), tuple(warnings))


def _few(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _round_robin(classes: list[np.ndarray], limit: int | None) -> np.ndarray:
    """At most `limit` rows, one of each class in turn."""
    turns = [rows[turn] for turn in range(max(map(len, classes))) for rows in classes if turn < len(rows)]
    return np.sort(np.asarray(turns[:limit], dtype=np.int64))
