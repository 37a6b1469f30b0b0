"""Training rows some of which say another class than their own, as carelessly labelled data do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from partial_lora.errors import PartialLoraError


def mislabelled(rows: Dataset, share: float, seed: int | Sequence[int], name: str) -> Dataset:
    """The rows with that share of their labels, to the nearest row, replaced by another class at random.

    The rows that a smaller share has wrong are among those of a larger one, with the same wrong labels. Raises
    PartialLoraError for a share outside [0, 1], for labels that are real numbers, and for a single class.
    """
    if share == 0:
        return rows
    label = rows.features["label"]
    classes = len(getattr(label, "names", ()))
    if not 0 < share <= 1:
        raise PartialLoraError(f"task.label_noise={share}: expected a share in [0, 1]")
    if classes < 2:
        have = "a single class" if classes else "real numbers"
        raise PartialLoraError(f"task.label_noise={share}: {name} has {have} as labels, expected two classes or more")
    labels = np.array(rows["label"], dtype=np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    steps = generator.integers(1, classes, len(labels))  # 1 to classes - 1 classes on: never the same one
    wrong = order[: int(share * len(labels) + 0.5)]
    labels[wrong] = (labels[wrong] + steps[wrong]) % classes
    return rows.remove_columns("label").add_column("label", labels.tolist(), feature=label)
