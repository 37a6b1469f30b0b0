"""What moves between calibrations."""

from __future__ import annotations

import pytest
from test_reliability import pearson, sparsities

from partial_lora.calibration.reliability import deviation_of, difference, every_two, mean_difference, mean_of


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
