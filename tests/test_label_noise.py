"""Wrong labels: as many as asked for, in training rows alone, and more of the same as their share grows."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from partial_lora import tasks
from partial_lora.errors import PartialLoraError
from partial_lora.tasks.label_noise import mislabelled


def digits(**changes: float) -> tasks.Task:
    return tasks.load(name="digits", path="bundled:digits", train_samples=300, **changes)


def test_a_share_of_the_training_labels_is_another_class_and_nothing_else_moves() -> None:
    clean, half, more = (digits(label_noise=share) for share in (0.0, 0.2, 0.4))
    for split in ("validation", "test"):
        assert getattr(half, split).to_dict() == getattr(clean, split).to_dict()
    own, some, most = (np.asarray(task.train["label"]) for task in (clean, half, more))
    assert (own != some).sum() == round(0.2 * len(own))
    assert (own != most).sum() == round(0.4 * len(own))
    assert (most == some)[own != some].all()
    assert set(some) == set(range(10))
    assert half.train.remove_columns("label").to_dict() == clean.train.remove_columns("label").to_dict()
    assert half.train.features == clean.train.features
    assert half.train.split == clean.train.split


def test_the_split_seed_decides_which() -> None:
    rows = digits().train
    one, again, other = (mislabelled(rows, 0.3, seed, "digits")["label"] for seed in (0, 0, 1))
    assert list(one) == list(again) != list(other)


@pytest.mark.parametrize(
    ("feature", "labels", "has"),
    [
        (datasets.Value("float32"), [0.5, 1.5], "real numbers"),
        (datasets.ClassLabel(names=["only"]), [0, 0], "a single class"),
    ],
)
def test_labels_without_another_class_are_refused(feature: object, labels: list, has: str) -> None:
    rows = datasets.Dataset.from_dict({"label": labels}, features=datasets.Features({"label": feature}))
    with pytest.raises(PartialLoraError, match=rf"^task\.label_noise=0\.5: mine has {has} as labels") as refusal:
        mislabelled(rows, 0.5, 0, "mine")
    assert "\n" not in str(refusal.value)
