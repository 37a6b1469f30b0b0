"""Splits and subsets of labelled rows, the same share of every class, always the same rows for a seed."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset
from sklearn.model_selection import train_test_split

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.hub import first_line
from partial_lora.tasks.strata import in_turn, shuffled

_FEW = 10  # classes that a message lists


def cut(rows: Dataset, share: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Cut `share` of the rows off: what is left, and what was cut off.

    Raises PartialLoraError for a class too small to have rows on both sides.
    """
    classes = _classes(rows)
    labels = np.asarray(rows["label"]) if classes else None
    try:
        kept, off = train_test_split(np.arange(len(rows)), test_size=share, random_state=seed, stratify=labels)
    except ValueError as error:
        per_class = " per class" if classes else ""
        reason = _single(labels, classes) or first_line(error)
        raise PartialLoraError(
            f"task={name}: cannot set {share:.0%} of {len(rows)} rows aside{per_class}: {reason}"
        ) from error
    return rows.select(np.sort(kept)), rows.select(np.sort(off))


def sample(rows: Dataset, count: int | None, seed: int, key: str) -> Dataset:
    """At most `count` of the rows; None is all of them. Raises PartialLoraError for less than one row a class."""
    if count is None or count >= len(rows):
        return rows
    classes = _classes(rows)
    if count < len(classes):
        raise PartialLoraError(f"task.{key}={count}: expected at least one row for each of {len(classes)} classes")
    labels = np.asarray(rows["label"]) if classes else np.zeros(len(rows), dtype=np.int64)
    return rows.select(np.sort(in_turn(shuffled(labels, np.random.default_rng(seed)))[:count]))


def _classes(rows: Dataset) -> list[str]:
    feature = rows.features.get("label")  # a text that is to be written has none
    return feature.names if isinstance(feature, ClassLabel) else []


def _single(labels: np.ndarray | None, classes: list[str]) -> str:
    """Names the classes that have one row, where there are any."""
    if not classes:
        return ""
    single = [classes[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 1)]
    if not single:
        return ""
    listed = ", ".join(single[:_FEW]) + (f" and {len(single) - _FEW} more" if len(single) > _FEW else "")
    return f"class {listed} has a single example; add some, leave it out, or give a file for every split"
