"""Few-shot draws that are disjoint and balanced, and wrong labels: as many as the share, in training rows alone."""

from __future__ import annotations

import logging
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from refusals import refusal

from partial_lora import tasks
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.splits import Draws, few_shot_draws, shared_inputs, with_label_noise


def sizes(draws: Draws) -> tuple[int, int]:
    assert not set(draws.fit) & set(draws.scored)
    assert all(list(rows) == sorted(rows) for rows in (draws.fit, draws.scored))
    return len(draws.fit), len(draws.scored)


def test_shots_are_balanced_disjoint_and_fixed_by_their_seed() -> None:
    labels = np.repeat(np.arange(5), 40)
    draws, same, other = (few_shot_draws(labels, shots=16, seed=seed) for seed in (0, 0, 1))
    assert sizes(draws) == (80, 80)
    assert Counter(labels[draws.fit]) == Counter(labels[draws.scored]) == dict.fromkeys(range(5), 16)
    assert np.array_equal(draws.scored, same.scored)
    assert not np.array_equal(draws.scored, other.scored)
    bounded = few_shot_draws(labels[:160], shots=8, seed=0, max_samples=10)
    assert sizes(bounded) == (10, 10)
    assert sorted(Counter(labels[bounded.scored]).values()) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    "settings", [{"shots": 8, "max_samples": 64}, {"share": 0.1, "max_samples": 64}, {"share": 0.01}]
)
def test_more_classes_than_a_draw_may_have_rows_get_one_row_each(settings: dict) -> None:
    labels = np.arange(4000) % 200
    draws = few_shot_draws(labels, seed=0, **settings)
    assert sizes(draws) == (200, 200)
    assert len(set(labels[draws.fit])) == len(set(labels[draws.scored])) == 200


@pytest.mark.parametrize(("size", "scored", "fitted"), [(2, 1, 1), (3, 2, 1), (31, 16, 15), (32, 16, 16)])
def test_a_class_smaller_than_two_draws_is_used_whole_and_named(size: int, scored: int, fitted: int) -> None:
    draws = few_shot_draws(np.array([0] * 40 + [1] * size), shots=16, seed=0)
    assert sizes(draws) == (16 + fitted, 16 + scored)
    assert ["class 1" in warning for warning in draws.warnings] == [True] * (size < 32)


def test_a_class_of_one_is_known_to_the_head_and_never_scored(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.array([0, 0, 0, 1])
    draws = few_shot_draws(labels, shots=2, seed=0)
    assert (Counter(labels[draws.fit]), Counter(labels[draws.scored])) == ({0: 1, 1: 1}, {0: 2})
    assert draws.warnings[-1].endswith("class 1")
    assert all(warning in caplog.text for warning in draws.warnings)
    labels = np.array([0] * 900 + [1] * 95 + [2] * 2 + [3])
    draws = few_shot_draws(labels, seed=0, share=0.03)
    assert (set(labels[draws.fit]), set(labels[draws.scored])) == ({0, 1, 2, 3}, {0, 1, 2})
    assert draws.warnings[-1].endswith("class 3")


def test_a_share_of_the_rows_has_every_class_in_proportion_128_rows_at_least_and_half_of_them_at_most() -> None:
    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    draws, same, other = (few_shot_draws(labels, seed=seed, share=0.05) for seed in (0, 0, 1))
    assert (sizes(draws), draws.warnings) == ((500, 500), ())
    for rows in (draws.fit, draws.scored):
        assert np.abs(np.bincount(labels[rows]) - [300, 150, 50]).max() <= 1
    assert np.array_equal(draws.fit, same.fit)
    assert len(set(draws.fit) & set(other.fit)) < 100
    labels = np.arange(4000) % 4
    assert sizes(few_shot_draws(labels, seed=0, share=0.02)) == (128, 128)
    few = few_shot_draws(labels[:200], seed=0, share=0.02)
    assert sizes(few) == (100, 100)
    assert [warning.split(":")[0] for warning in few.warnings] == ["calibration.share=0.02"]
    bounded = few_shot_draws(labels, seed=0, share=0.1, max_samples=60)
    assert (sizes(bounded), bounded.warnings) == ((60, 60), ())


@pytest.mark.parametrize(("shots", "count"), [(1, 128), (300, 300)])
def test_real_labels_are_drawn_from_all_rows_alike_128_at_least(shots: int, count: int, caplog) -> None:
    labels = np.random.default_rng(0).normal(size=1000)
    with caplog.at_level(logging.INFO):
        draws = few_shot_draws(labels, shots=shots, seed=0)
    assert (sizes(draws), draws.warnings) == ((count, count), ())
    assert abs(draws.fit.mean() - 500) < 100
    assert f"calibration.shots={shots}" in caplog.text
    shared = few_shot_draws(labels, share=count / 1000, seed=0)
    assert np.array_equal(draws.fit, shared.fit)
    assert np.array_equal(draws.scored, shared.scored)


@pytest.mark.parametrize(
    ("settings", "key", "size"),
    [
        ({"shots": 2}, "calibration.shots=2 ", "128"),
        ({"shots": 200}, "calibration.shots=200:", "200"),
        ({"share": 0.1}, "calibration.share=0.1 ", "128"),
        ({"shots": 2, "max_samples": 20}, None, None),
    ],
)
def test_too_few_real_labels_are_named_by_the_key_that_was_set(settings: dict, key: str, size: str) -> None:
    warnings = few_shot_draws(np.linspace(0, 1, 50), seed=0, **settings).warnings
    assert [warning.startswith(key) and warning.endswith(size) for warning in warnings] == [True] * (key is not None)


@pytest.mark.parametrize(
    ("labels", "settings", "key"),
    [
        (np.arange(3), {"shots": 2}, r"calibration\.shots=2: "),
        (np.zeros(1), {"shots": 2}, r"calibration\.shots=2 .* 1 training rows"),
        (np.arange(300) % 200, {"share": 0.1}, r"calibration\.share=.* 200 .*rows$"),
    ],
)
def test_draws_without_a_row_of_every_class_are_refused_with_the_remedy(labels, settings: dict, key: str) -> None:
    with refusal(key):
        few_shot_draws(labels, seed=0, **settings)


# Label noise


def rows(labels: list[int], classes: int) -> datasets.Dataset:
    features = datasets.Features({"row": datasets.Value("int64"), "label": datasets.ClassLabel(num_classes=classes)})
    return datasets.Dataset.from_dict({"row": list(range(len(labels))), "label": labels}, features=features)


def test_a_share_of_the_training_labels_is_another_class_and_nothing_else_moves() -> None:
    clean, some, more = (
        tasks.load(TaskConfig(name="digits", path="bundled:digits", train_samples=300, label_noise=share))
        for share in (0, 0.2, 0.4)
    )
    for split in ("validation", "test"):
        assert getattr(some, split).to_dict() == getattr(clean, split).to_dict()
    own, noisy, noisier = (np.asarray(task.train["label"]) for task in (clean, some, more))
    assert (own != noisy).sum() == round(0.2 * len(own))
    assert (own != noisier).sum() == round(0.4 * len(own))
    assert (noisier == noisy)[own != noisy].all()
    assert some.train.remove_columns("label").to_dict() == clean.train.remove_columns("label").to_dict()
    assert (some.train.features, some.train.split) == (clean.train.features, clean.train.split)
    one, again, other = (with_label_noise(clean.train, 0.3, seed, "digits")["label"] for seed in (0, 0, 1))
    assert list(one) == list(again) != list(other)


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.1, 20), (0.003, 1), (0.002, 0), (1.0, 200)])
def test_the_share_of_labels_is_to_the_nearest_row(share: float, wrong: int) -> None:
    labels = [number % 5 for number in range(200)]
    noisy = with_label_noise(rows(labels, 5), share, 0, "mine")["label"]
    assert sum(a != b for a, b in zip(labels, noisy, strict=True)) == wrong


def test_every_other_class_is_as_likely() -> None:
    counts = np.bincount(with_label_noise(rows([0] * 6000, 4), 1.0, 0, "mine")["label"], minlength=4)
    assert counts[0] == 0
    assert abs(counts[1:] - 2000).max() < 150  # four standard deviations


@pytest.mark.parametrize(
    ("feature", "share"), [(datasets.Value("float32"), 0.5), (datasets.ClassLabel(names=["only"]), 0.5)]
)
def test_noise_without_another_class_is_refused(feature: object, share: float) -> None:
    own = datasets.Dataset.from_dict({"label": [0, 0]}, features=datasets.Features({"label": feature}))
    with refusal(f"task.label_noise={share}: "):
        with_label_noise(own, share, 0, "mine")


def test_rows_that_two_splits_share_are_those_of_the_same_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    paths = [str(tmp_path / f"{number}.bmp") for number in range(5)]  # files of one size
    for path, image in zip(paths, pixels, strict=True):
        PIL.Image.fromarray(image).save(path)
    shutil.copy(paths[3], tmp_path / "again.bmp")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

    def images(files: list) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"image": files, "label": list(range(len(files)))}, features=features)

    others = images(paths[2:])
    assert shared_inputs(images([*paths[:2], str(tmp_path / "again.bmp")]), others) == 1
    assert shared_inputs(images(paths[:2]), others) == 0
    stored = images([{"path": None, "bytes": (tmp_path / "again.bmp").read_bytes()}])  # as a table has them
    assert shared_inputs(stored, others) == 1
    big = [{"path": None, "bytes": number.to_bytes(1, "big") * 2**16} for number in range(200)]
    table, other = images(big), images(big[100:])
    tracemalloc.start()
    assert shared_inputs(table, other) == 100
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**16  # bytes: of less than half of the images
    tracemalloc.stop()
    pairs = [{"text": "a", "text_pair": "b", "label": 0}, {"text": "b", "text_pair": "a", "label": 1}]
    pairs = datasets.Dataset.from_list(pairs)
    assert shared_inputs(pairs, pairs.select([0])) == 1  # whatever the label
    prompts = datasets.Dataset.from_list([{"prompt": "p", "response": "q"}])
    assert shared_inputs(prompts, datasets.Dataset.from_list([{"prompt": "p", "response": "r"}])) == 1
