"""Wrong labels in the asked number, and what moves between calibrations."""

from __future__ import annotations

import numpy as np
import pytest
from test_reliability import pearson, sparsities

from partial_lora.errors import PartialLoraError
from partial_lora.stability import deviation_of, difference, every_two, mean_difference, mean_of, noisy_labels

LABELS = np.arange(200) % 5


@pytest.mark.parametrize(("share", "wrong"), [(0.0, 0), (0.1, 20), (0.2, 40), (0.003, 1), (0.002, 0), (1.0, 200)])
def test_the_share_of_labels_is_wrong(share, wrong) -> None:
    found = noisy_labels(LABELS, share, classes=5, seed=0)
    assert (found != LABELS).sum() == wrong
    assert set(found) <= set(range(5))


def test_labels_given_are_left_alone_and_seeds_differ() -> None:
    own = LABELS.copy()
    one, again, other = (noisy_labels(own, 0.2, classes=5, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(own, LABELS)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_more_noise_is_more_of_the_same() -> None:
    less, more = (noisy_labels(LABELS, share, classes=5, seed=2) for share in (0.1, 0.2))
    changed = less != LABELS
    assert np.array_equal(less[changed], more[changed])


def test_every_other_class_is_reached_alike() -> None:
    found = noisy_labels(np.zeros(6000, dtype=int), 1.0, classes=4, seed=0)
    counts = np.bincount(found, minlength=4)
    assert counts[0] == 0
    assert abs(counts[1:] - 2000).max() < 150  # four standard deviations


def test_two_classes_are_exchanged_and_one_cannot_be() -> None:
    assert noisy_labels([0, 1, 1], 1.0, classes=2, seed=0).tolist() == [1, 0, 0]
    with pytest.raises(PartialLoraError, match="at least 2 classes, found 1"):
        noisy_labels([0, 0], 0.5, classes=1, seed=0)
    with pytest.raises(PartialLoraError, match=r"analysis\.noise=1\.5"):
        noisy_labels(LABELS, 1.5, classes=5, seed=0)


def test_a_difference_sees_a_shift_that_a_correlation_does_not() -> None:
    first, second = (0.1, 0.3, 0.2, 0.6), (0.2, 0.4, 0.3, 0.7)
    found = difference(sparsities(*first), sparsities(*second))
    assert found["pearson"] == pytest.approx(1)
    assert found["mean_absolute"] == pytest.approx(0.1)
    other = difference(sparsities(*first), sparsities(0.1, 0.2, 0.6, 0.3))
    assert other["pearson"] == pytest.approx(pearson(first, (0.1, 0.2, 0.6, 0.3)))
    assert other["mean_absolute"] == pytest.approx((0 + 0.1 + 0.4 + 0.3) / 4)


def test_means_are_over_every_pair_that_has_a_number() -> None:
    calibrations = [sparsities(0.1, 0.3, 0.2, 0.6), sparsities(0.2, 0.3, 0.2, 0.5), sparsities(0.5, 0.5, 0.5, 0.5)]
    pairs = every_two(calibrations)
    assert [(calibrations.index(a), calibrations.index(b)) for a, b in pairs] == [(0, 1), (0, 2), (1, 2)]
    found = mean_difference(pairs)
    each = [difference(*pair) for pair in pairs]
    assert found["pearson"] == each[0]["pearson"]  # the third has no correlation with either
    assert found["mean_absolute"] == pytest.approx(sum(one["mean_absolute"] for one in each) / 3)
    assert found["pairs"] == 3
    assert found["said"].startswith("2 of 3 pairs without a correlation: all sparsities of the second")


def test_means_and_deviations_of_what_there_is() -> None:
    assert mean_of([1.0, None, 3.0]) == 2.0
    assert deviation_of([1.0, None, 3.0]) == pytest.approx(2**0.5)
    assert (mean_of([None]), deviation_of([1.0, None])) == (None, None)
