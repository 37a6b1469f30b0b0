"""Wrong labels: as many as asked for, in training rows alone, and more of the same as their share grows."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from partial_lora import tasks
from partial_lora.errors import PartialLoraError
from partial_lora.tasks.splits import with_label_noise


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


def rows(labels: list[int], classes: int) -> datasets.Dataset:
    label = datasets.ClassLabel(num_classes=classes)
    features = datasets.Features({"row": datasets.Value("int64"), "label": label})
    return datasets.Dataset.from_dict({"row": list(range(len(labels))), "label": labels}, features=features)


def test_the_seed_decides_which() -> None:
    own = digits().train
    one, again, other = (with_label_noise(own, 0.3, seed, "digits")["label"] for seed in (0, 0, 1))
    assert list(one) == list(again) != list(other)


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.1, 20), (0.003, 1), (0.002, 0), (1.0, 200)])
def test_the_share_of_labels_is_to_the_nearest_row(share: float, wrong: int) -> None:
    own = [number % 5 for number in range(200)]
    found = with_label_noise(rows(own, 5), share, 0, "mine")["label"]
    assert sum(a != b for a, b in zip(own, found, strict=True)) == wrong


def test_every_other_class_is_reached_alike() -> None:
    counts = np.bincount(with_label_noise(rows([0] * 6000, 4), 1.0, 0, "mine")["label"], minlength=4)
    assert counts[0] == 0
    assert abs(counts[1:] - 2000).max() < 150  # four standard deviations


@pytest.mark.parametrize(
    ("feature", "labels", "has"),
    [
        (datasets.Value("float32"), [0.5, 1.5], "real numbers"),
        (datasets.ClassLabel(names=["only"]), [0, 0], "a single class"),
    ],
)
def test_labels_without_another_class_are_refused(feature: object, labels: list, has: str) -> None:
    own = datasets.Dataset.from_dict({"label": labels}, features=datasets.Features({"label": feature}))
    with pytest.raises(PartialLoraError, match=rf"^task\.label_noise=0\.5: mine has {has} as labels") as refusal:
        with_label_noise(own, 0.5, 0, "mine")
    assert "\n" not in str(refusal.value)


def test_more_than_all_labels_are_refused() -> None:
    with pytest.raises(PartialLoraError, match=r"^task\.label_noise=1\.5"):
        with_label_noise(rows([0, 1], 2), 1.5, 0, "mine")
