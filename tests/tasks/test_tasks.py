"""Splits that never overlap, columns found or named, draws that never meet."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from partial_lora import tasks
from partial_lora.errors import PartialLoraError

LABELS = ("cat", "dog", "horse")


def rows(count: int, labels: tuple[str, ...] = LABELS, **columns: list) -> datasets.Dataset:
    generator = np.random.default_rng(count)
    images = list(generator.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8))
    features = datasets.Features({"photo": datasets.Image(), "animal": datasets.ClassLabel(names=list(labels))})
    data = {"photo": images, "animal": [index % len(labels) for index in range(count)]}
    for name, values in columns.items():
        features[name], data[name] = datasets.ClassLabel(names=["a", "b"]), values
    return datasets.Dataset.from_dict(data, features=features)


def files(folder: Path, **splits: datasets.Dataset) -> dict[str, str]:
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in splits}


def load(data_files: dict[str, str], **named: object) -> tasks.Task:
    return tasks.load(name="animals", path="none/animals", data_files=data_files, **named)


def pictures(split: datasets.Dataset) -> set[bytes]:
    return {image.tobytes() for image in split["image"]}


def test_digits_come_in_three_fixed_disjoint_stratified_splits() -> None:
    first = tasks.load(name="digits", path="bundled:digits")
    again = tasks.load(name="digits", path="bundled:digits")
    other = tasks.load(name="digits", path="bundled:digits", split_seed=1)
    splits = (first.train, first.validation, first.test)
    assert [len(split) for split in splits] == [1293, 144, 360]
    assert first.labels == tuple("0123456789")
    training, validation, test = (pictures(split) for split in splits)
    assert not (training | validation) & test
    assert not training & validation
    counts = [Counter(split["label"]) for split in splits]
    for label in range(10):
        whole = sum(count[label] for count in counts)
        assert abs(counts[2][label] - 0.2 * whole) < 1
        assert abs(counts[1][label] - 0.1 * 0.8 * whole) < 1
    assert first.test["label"] == again.test["label"]
    assert pictures(first.test) == pictures(again.test) != pictures(other.test)


def test_a_digit_keeps_its_pixels() -> None:
    from sklearn.datasets import load_digits

    task = tasks.load(name="digits", path="bundled:digits")
    darkest_to_brightest = {tuple(np.round(image * 255 / 16).astype(int).ravel()) for image in load_digits().images}
    assert all(tuple(np.asarray(image).astype(int).ravel()) in darkest_to_brightest for image in task.test["image"])


def test_real_cifar10_rows_load_from_local_files(cifar10_files: dict[str, str]) -> None:
    task = tasks.load(name="cifar10", path="uoft-cs/cifar10", data_files=cifar10_files)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [4500, 500, 2000]
    assert task.labels[:3] == ("airplane", "automobile", "bird")
    assert Counter(task.validation["label"]) == dict.fromkeys(range(10), 50)
    assert task.test[0]["image"].size == (32, 32)


def test_local_files_stand_in_for_the_hub_whatever_their_columns_are_called(tmp_path: Path) -> None:
    task = load(files(tmp_path, train=rows(60), test=rows(30)), validation_share=0.2)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [48, 12, 30]
    assert task.labels == LABELS
    assert task.train.column_names == ["image", "label"]


def test_a_validation_file_is_used_whole(tmp_path: Path) -> None:
    task = load(files(tmp_path, train=rows(60), validation=rows(9), test=rows(30)))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [60, 9, 30]


def test_one_of_two_label_columns_has_to_be_named(tmp_path: Path) -> None:
    train = rows(20, labels=("cat", "dog"), coarse=[index % 2 for index in range(20)])
    paths = files(tmp_path, train=train, test=train)
    with pytest.raises(PartialLoraError, match=r"task\.label_column: .* animals \(.*\) has 2 columns of labels"):
        load(paths)
    assert load(paths, label_column="coarse").labels == ("a", "b")


@pytest.mark.parametrize(("key", "column"), [("image_column", "img"), ("label_column", "photo")])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, key: str, column: str) -> None:
    with pytest.raises(PartialLoraError, match=rf"task\.{key}={column}.*'photo': 'Image', 'animal': 'ClassLabel'"):
        load(files(tmp_path, train=rows(20), test=rows(20)), **{key: column})


class Hub:
    """A folder laid out as a data set of the hub is."""

    def __init__(self, folder: Path, **splits: datasets.Dataset) -> None:
        self._path = str(folder)
        files(folder, **splits)

    def load(self, test_split: str) -> tasks.Task:
        return tasks.load(name="animals", path=self._path, test_split=test_split)


@pytest.mark.parametrize("split", ["tset", "train"])
def test_a_test_split_that_is_not_there_or_is_trained_on_is_refused(tmp_path: Path, split: str) -> None:
    hub = Hub(tmp_path, train=rows(60), validation=rows(21), test=rows(30))
    with pytest.raises(PartialLoraError, match=rf"task\.test_split={split}: expected one of test, validation"):
        hub.load(split)


def test_a_validation_split_that_reports_does_not_select(tmp_path: Path) -> None:
    task = Hub(tmp_path, train=rows(60), validation=rows(21), test=rows(30)).load("validation")
    assert [len(split) for split in (task.train, task.validation, task.test)] == [54, 6, 21]
    assert not pictures(task.validation) & pictures(task.test)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    paths = files(tmp_path, train=rows(20), test=rows(20))
    Path(paths["test"]).write_text("no parquet")
    with pytest.raises(
        PartialLoraError, match=r"task\.data_files\.test=.*test\.parquet: expected a parquet"
    ) as refusal:
        load(paths)
    assert "\n" not in str(refusal.value)


def test_test_rows_with_other_labels_are_refused(tmp_path: Path) -> None:
    paths = files(tmp_path, train=rows(30), test=rows(30, labels=("dog", "cat", "horse")))
    with pytest.raises(PartialLoraError, match="the test split has the labels"):
        load(paths)


def test_a_class_of_one_cannot_be_split(tmp_path: Path) -> None:
    train = datasets.concatenate_datasets([rows(30), rows(30)]).filter(lambda row: row["animal"] != 2)
    train = datasets.concatenate_datasets([train, rows(3).filter(lambda row: row["animal"] == 2)])
    with pytest.raises(PartialLoraError, match="task=animals: cannot set 10% of 41 rows aside per class"):
        load(files(tmp_path, train=train, test=rows(30)))


def test_pixels_are_resized_cropped_and_normalised() -> None:
    transform = tasks.ImageTransform(image_size=4, mean=[0.5] * 3, std=[0.25] * 3, interpolation="bilinear")
    grey = Image.new("L", (16, 8), color=255)
    batch = transform({"image": [grey], "labels": [1], "label": [1]})
    assert batch["labels"] == [1]
    assert torch.equal(batch["pixel_values"][0], torch.full((3, 4, 4), 2.0))


def test_batches_hold_every_row_in_order() -> None:
    task = tasks.load(name="digits", path="bundled:digits")
    transform = tasks.ImageTransform(image_size=8, mean=[0.0] * 3, std=[1.0] * 3, interpolation="nearest")
    batches = transform.batches(task.validation, 50)
    assert [len(batch["labels"]) for batch in batches] == [50, 50, 44]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == task.validation["label"]


def test_draws_are_balanced_disjoint_and_fixed_by_their_seed() -> None:
    labels = np.repeat(np.arange(5), 40)
    draws = tasks.few_shot_draws(labels, shots=16, seed=0)
    assert Counter(labels[draws.fit]) == Counter(labels[draws.scored]) == dict.fromkeys(range(5), 16)
    assert not set(draws.fit) & set(draws.scored)
    same, other = (tasks.few_shot_draws(labels, shots=16, seed=seed) for seed in (0, 1))
    assert np.array_equal(draws.scored, same.scored)
    assert not np.array_equal(draws.scored, other.scored)


@pytest.mark.parametrize(
    ("size", "scored", "fitted"),
    [(2, 1, 1), (3, 2, 1), (7, 4, 3), (20, 10, 10), (31, 16, 15), (32, 16, 16), (33, 16, 16)],
)
def test_a_class_smaller_than_two_draws_is_used_whole_and_named(size: int, scored: int, fitted: int) -> None:
    labels = np.array([0] * 40 + [1] * size)
    draws = tasks.few_shot_draws(labels, shots=16, seed=0)
    assert ((labels[draws.scored] == 1).sum(), (labels[draws.fit] == 1).sum()) == (scored, fitted)
    assert not set(draws.fit) & set(draws.scored)
    assert [("class 1" in warning, "used whole" in warning) for warning in draws.warnings] == [(True, True)] * (
        size < 32
    )


def test_a_class_of_one_is_known_to_the_head_and_never_scored(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.array([0, 0, 0, 1])
    draws = tasks.few_shot_draws(labels, shots=2, seed=0)
    assert (Counter(labels[draws.fit]), Counter(labels[draws.scored])) == ({0: 1, 1: 1}, {0: 2})
    assert "never scored: class 1" in draws.warnings[-1]
    assert all(warning in caplog.text for warning in draws.warnings)


def test_without_two_examples_of_any_class_nothing_can_be_scored() -> None:
    with pytest.raises(PartialLoraError, match=r"calibration\.shots=2: no class has 2 training examples"):
        tasks.few_shot_draws([0, 1, 2], shots=2, seed=0)


def test_many_small_classes_are_counted() -> None:
    (warning,) = tasks.few_shot_draws(np.repeat(np.arange(30), 2), shots=2, seed=0).warnings
    assert warning.endswith("class 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more")


def test_a_bound_below_one_example_a_class_is_refused() -> None:
    with pytest.raises(PartialLoraError, match=r"calibration\.max_samples=3: expected at least one for each of 4"):
        tasks.few_shot_draws(np.repeat(np.arange(4), 20), shots=8, seed=0, max_samples=3)


def test_max_samples_bounds_each_draw_and_keeps_classes_even() -> None:
    labels = np.repeat(np.arange(4), 20)
    draws = tasks.few_shot_draws(labels, shots=8, seed=0, max_samples=10)
    assert len(draws.fit) == len(draws.scored) == 10
    assert sorted(Counter(labels[draws.scored]).values()) == [2, 2, 3, 3]


def test_a_share_of_the_rows_has_every_class_in_proportion() -> None:
    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    draws = tasks.few_shot_draws(labels, seed=0, share=0.05)
    assert len(draws.fit) == len(draws.scored) == 500
    assert not set(draws.fit) & set(draws.scored)
    for rows in (draws.fit, draws.scored):
        assert np.abs(np.bincount(labels[rows]) - [300, 150, 50]).max() <= 1
        assert list(rows) == sorted(rows)
    same, other = (tasks.few_shot_draws(labels, seed=seed, share=0.05) for seed in (0, 1))
    assert np.array_equal(draws.fit, same.fit)
    assert len(set(draws.fit) & set(other.fit)) < 100
    assert draws.warnings == ()


def test_a_share_is_at_least_128_rows_and_at_most_half_of_them() -> None:
    labels = np.arange(4000) % 4
    assert [len(rows) for rows in vars(tasks.few_shot_draws(labels, seed=0, share=0.02)).values()][:2] == [128, 128]
    few = tasks.few_shot_draws(labels[:200], seed=0, share=0.02)
    assert (len(few.fit), len(few.scored)) == (100, 100)
    assert few.warnings == (
        "calibration.share=0.02: 100 rows for each draw, half of the training rows, in place of 128",
    )
    bounded = tasks.few_shot_draws(labels, seed=0, share=0.1, max_samples=60)
    assert (len(bounded.fit), len(bounded.scored), bounded.warnings) == (60, 60, ())
    with pytest.raises(
        PartialLoraError, match=r"calibration\.share=0\.1: 3 rows .* at least one for each of 4 classes"
    ):
        tasks.few_shot_draws(labels, seed=0, share=0.1, max_samples=3)


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [(4000, {"share": 0.1, "max_samples": 3}, "raise calibration.max_samples"),
     (4000, {"share": 0.01}, "raise calibration.share"),
     (300, {"share": 0.1}, "add rows")],
)  # fmt: skip
def test_what_would_make_room_for_every_class_is_said(rows: int, given: dict, said: str) -> None:
    with pytest.raises(PartialLoraError, match=rf"for each of 200 classes; {said}$"):
        tasks.few_shot_draws(np.arange(rows) % 200, seed=0, **given)


def test_a_share_knows_every_class_and_says_which_one_it_cannot_score() -> None:
    labels = np.array([0] * 900 + [1] * 95 + [2] * 2 + [3])
    draws = tasks.few_shot_draws(labels, seed=0, share=0.03)
    assert set(labels[draws.fit]) == {0, 1, 2, 3}
    assert set(labels[draws.scored]) == {0, 1, 2}
    assert "never scored: class 3" in draws.warnings[-1]


def test_real_labels_are_drawn_from_all_rows_alike() -> None:
    labels = np.random.default_rng(0).normal(size=4000)
    draws = tasks.few_shot_draws(labels, seed=0, share=0.1)
    assert len(draws.fit) == len(draws.scored) == 400
    assert not set(draws.fit) & set(draws.scored)
    assert abs(draws.fit.mean() - 2000) < 200
    assert len(tasks.few_shot_draws(labels, shots=16, seed=0).scored) == 128


@pytest.mark.parametrize(("shots", "count"), [(1, 128), (128, 128), (300, 300)])
def test_shots_of_real_labels_are_rows_of_one_class_and_128_at_least(shots: int, count: int, caplog) -> None:
    labels = np.random.default_rng(0).normal(size=1000)
    with caplog.at_level(logging.INFO):
        draws = tasks.few_shot_draws(labels, shots=shots, seed=0)
    assert (len(draws.fit), len(draws.scored), draws.warnings) == (count, count, ())
    assert f"{count} rows for each draw" in caplog.text
    shared = tasks.few_shot_draws(labels, share=count / 1000, seed=0)
    assert np.array_equal(draws.fit, shared.fit)
    assert np.array_equal(draws.scored, shared.scored)


def test_too_few_real_labels_are_said_by_the_key_that_was_set() -> None:
    labels = np.linspace(0, 1, 50)
    least = r"\(at least 128 rows where labels are real numbers\)"
    for given, key, asked in (
        ({"shots": 2}, rf"calibration.shots=2 {least}", 128),
        ({"shots": 200}, "calibration.shots=200", 200),
        ({"share": 0.1}, rf"calibration.share=0.1 {least}", 128),
    ):
        (warning,) = tasks.few_shot_draws(labels, seed=0, **given).warnings
        assert re.fullmatch(rf"{key}: 25 rows for each draw, half of the training rows, in place of {asked}", warning)
    assert tasks.few_shot_draws(labels, shots=2, seed=0, max_samples=20).warnings == ()
    with pytest.raises(PartialLoraError, match=r"calibration\.shots=2 .*: 1 training rows, expected"):
        tasks.few_shot_draws(labels[:1], shots=2, seed=0)
