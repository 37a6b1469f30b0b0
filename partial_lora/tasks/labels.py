"""Labels: the classes, found over the training rows, or real numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.columns import stored

_FEW = 20  # labels that a message lists

Label = str | int | float | bool


def read(splits: dict[str, Dataset], name: str, regression: bool | None) -> tuple[tuple[str, ...], dict[str, Dataset]]:
    """The names of the classes, and the rows of every split with `label` as their number; no names for real labels.

    Labels that the source names stay as they are. Others become classes in their order, numbers as numbers, over the
    training rows; but where there are fractions they are real labels, and so are whole numbers, 1.0 as well as 1, where
    `regression` says so.

    Raises PartialLoraError that names the split, and the row or the label, for a row without one, for a label that no
    training row has, and for labels that cannot be what was asked for.
    """
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        if regression:
            raise PartialLoraError(f"task.regression=true: the labels of {name} are classes, expected numbers")
        return tuple(feature.names), {split: _marked(rows, feature, name, split) for split, rows in splits.items()}
    values = {split: _plain(rows, name, split) for split, rows in splits.items()}
    fractions = any(isinstance(label, float) and not label.is_integer() for label in values["train"])
    if fractions if regression is None else regression:
        return (), {split: _real(rows, values[split], name, split) for split, rows in splits.items()}
    return _found(splits, values, name)


def name_of(label: Label) -> str:
    """A label as the name of a class: 3.0 is the class 3."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _marked(rows: Dataset, feature: ClassLabel, name: str, split: str) -> Dataset:
    """Rows whose source names their labels, the same ones as in the training rows, and has one for each row."""
    if not isinstance(rows.features["label"], ClassLabel):
        names = {label: number for number, label in enumerate(feature.names)}
        return _numbered(rows, _plain(rows, name, split), names, name, split)
    found = rows.features["label"].names
    if found != feature.names:
        raise PartialLoraError(
            f"task={name}: the {split} split has the labels {found}, expected those of the training rows, "
            f"{feature.names}"
        )
    numbers = stored(rows, "label").to_numpy()
    unlabelled = np.flatnonzero(~(numbers >= 0))  # the hub's -1, or nothing at all
    if len(unlabelled):
        raise PartialLoraError(
            f"task={name}: {len(unlabelled)} rows of the {split} split have no label, the first is row "
            f"{unlabelled[0] + 1}; choose another split (task.test_split) or add labels"
        )
    return rows


def _plain(rows: Dataset, name: str, split: str) -> list[Label]:
    """Labels as they are written; none may be missing."""
    labels = stored(rows, "label").to_pylist()
    for row, label in enumerate(labels, 1):
        if label is None or (isinstance(label, float) and not math.isfinite(label)):
            raise PartialLoraError(f"task={name}: row {row} of the {split} split has no label, it is {label}")
    return labels


def _real(rows: Dataset, labels: Sequence[Label], name: str, split: str) -> Dataset:
    wrong = next(((row, label) for row, label in enumerate(labels, 1) if isinstance(label, str | bool)), None)
    if wrong is not None:
        raise PartialLoraError(
            f"task={name}: row {wrong[0]} of the {split} split has the label {wrong[1]!r}, expected a number, since "
            "this is regression (task.regression)"
        )
    return rows.cast_column("label", Value("float32"))


def _found(
    splits: dict[str, Dataset], values: dict[str, list[Label]], name: str
) -> tuple[tuple[str, ...], dict[str, Dataset]]:
    names = tuple(name_of(label) for label in sorted(set(values["train"])))
    numbers = {label: number for number, label in enumerate(names)}
    return names, {split: _numbered(rows, values[split], numbers, name, split) for split, rows in splits.items()}


def _numbered(rows: Dataset, labels: Sequence[Label], numbers: dict[str, int], name: str, split: str) -> Dataset:
    """The rows with the numbers of their labels' names."""
    found = []
    for row, label in enumerate(labels, 1):
        number = numbers.get(name_of(label))
        if number is None:
            listed = ", ".join(list(numbers)[:_FEW]) + (", …" if len(numbers) > _FEW else "")
            raise PartialLoraError(
                f"task={name}: row {row} of the {split} split has the label {name_of(label)}, which no training row "
                f"has; those there are: {listed}"
            )
        found.append(number)
    return rows.remove_columns("label").add_column("label", found, feature=ClassLabel(names=list(numbers)))
