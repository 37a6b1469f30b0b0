"""Splits and subsets of labelled rows, the same share of every class, always the same rows for a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset
from sklearn.model_selection import train_test_split

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.hub import first_line
from partial_lora.tasks.strata import in_turn, shuffled

_FEW = 10  # classes that a message lists


def cut(
    rows: Dataset,
    share: float,
    seed: int,
    name: str,
    *,
    least: int,
    whole: Dataset | None = None,
    taken: Sequence[str] = (),
) -> tuple[Dataset, Dataset]:
    """Cut `share` of the rows off: what is left, and what was cut off.

    least: rows of a class that are enough for every cut that is made, for messages.
    whole, taken: what there was before, and what was done with it to leave these rows, in words; for messages.

    Raises PartialLoraError for a class too small to have rows on both sides.
    """
    classes = _classes(rows)
    labels = np.asarray(rows["label"]) if classes else None
    try:
        kept, off = train_test_split(np.arange(len(rows)), test_size=share, random_state=seed, stratify=labels)
    except ValueError as error:
        per_class = " per class" if classes else ""
        reason = _single(rows, whole if taken else rows, least, taken) or first_line(error)
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


def _single(rows: Dataset, whole: Dataset, least: int, taken: Sequence[str]) -> str:
    """Names the classes that have one row, where there are any, and how many these had before."""
    classes = _classes(rows)
    if not classes:
        return ""
    counts, before = (np.bincount(part["label"], minlength=len(classes)) for part in (rows, whole))
    single = np.flatnonzero(counts == 1)
    if not len(single):
        return ""
    listed = ", ".join(classes[label] + (f" (of {before[label]})" if taken else "") for label in single[:_FEW])
    listed += f" and {len(single) - _FEW} more" if len(single) > _FEW else ""
    having = f"has a single row left after {' and '.join(taken)}" if taken else "has a single example"
    cuts = "two cuts, test and validation, need" if least > 2 else "a cut needs"
    mend = "add some, leave it out, or give a file for every split"
    return f"class {listed} {having}; {cuts} at least {least} rows of a class: {mend}"
