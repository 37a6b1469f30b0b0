"""Training rows some of which say another class than their own, as carelessly labelled data do."""

from __future__ import annotations

from datasets import Dataset

from partial_lora.errors import PartialLoraError
from partial_lora.stability import noisy_labels


def mislabelled(rows: Dataset, share: float, seed: int, name: str) -> Dataset:
    """The rows with that share of their labels, to the nearest row, replaced by another class at random.

    The rows that a smaller share has wrong are among those of a larger one, with the same wrong labels. Raises
    PartialLoraError for labels that are real numbers, and for a single class.
    """
    if share == 0:
        return rows
    label = rows.features["label"]
    classes = len(getattr(label, "names", ()))
    if classes < 2:
        have = "a single class" if classes else "real numbers"
        raise PartialLoraError(f"task.label_noise={share}: {name} has {have} as labels, expected two classes or more")
    wrong = noisy_labels(rows["label"], share, classes=classes, seed=seed)
    return rows.remove_columns("label").add_column("label", wrong.tolist(), feature=label)
