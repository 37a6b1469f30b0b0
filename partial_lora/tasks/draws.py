"""The few-shot draws that calibration sees."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.strata import in_turn, shuffled

LEAST = 128  # rows of a set that is a share of all

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


def drawn_from(rows: Dataset) -> np.ndarray:
    """What draws of a task's rows are stratified by: their labels, or nothing where they have none (real zeros)."""
    return np.asarray(rows["label"]) if "label" in rows.column_names else np.zeros(len(rows))


def few_shot_draws(
    labels: Sequence[int] | Sequence[float],
    *,
    seed: int,
    shots: int | None = None,
    max_samples: int | None = None,
    share: float | None = None,
) -> Draws:
    """Draw rows for each of the two sets, the same ones for a seed.

    With `share`, each set is that share of the rows, at least 128 of them and at most half, which a warning says; every
    class has its part of it. Labels that are real numbers have no classes: rows are drawn from all of them alike, 128
    where no share says more.

    With `shots` each set has that many examples a class. A class with fewer than 2 * shots examples is used whole, half
    in each set and an odd one in `scored`, with a warning; a single example goes to `fit`, since a head has to know the
    class. `max_samples` bounds each set, by going round the classes until it is full.

    Raises PartialLoraError where one of the sets would be empty, or could not hold one example of each class.
    """
    labels = np.asarray(labels)
    real = np.issubdtype(labels.dtype, np.floating)
    if share is not None or real:
        return _shares(np.zeros(len(labels), dtype=np.int64) if real else labels, seed, share or 0.0, max_samples)
    return _shots(labels, seed, shots, max_samples)


def _shares(labels: np.ndarray, seed: int, share: float, max_samples: int | None) -> Draws:
    """Two sets of equal size, whose rows of a class are every other one of it: they never meet, and are alike."""
    asked = max(LEAST, round(share * len(labels)))
    asked = asked if max_samples is None else min(asked, max_samples)
    count = min(asked, len(labels) // 2)
    classes = shuffled(labels, np.random.default_rng(seed))
    if count < len(classes):
        raise PartialLoraError(
            f"calibration.share={share}: {count} rows for each of the two draws, expected at least one for each of "
            f"{len(classes)} classes; raise calibration.max_samples or add rows"
        )
    fit, scored = in_turn([rows[::2] for rows in classes]), in_turn([rows[1::2] for rows in classes])
    warnings = []
    if count < asked:
        warnings.append(
            f"calibration.share={share}: {count} rows for each draw, half of the training rows, in place of {asked}"
        )
    single = [str(labels[rows[0]]) for rows in classes if len(rows) == 1]
    if single:
        warnings.append(
            f"calibration.share={share}: a single training example, fitted on and never scored: class {_few(single)}"
        )
    for warning in warnings:
        logger.warning("%s", warning)
    return Draws(np.sort(fit[:count]), np.sort(scored[:count]), tuple(warnings))


def _shots(labels: np.ndarray, seed: int, shots: int, max_samples: int | None) -> Draws:
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
