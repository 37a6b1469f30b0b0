"""Split halves that share nothing, correlations as the textbook writes them, and distances of calibrations."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest

from partial_lora.calibration.reliability import (
    correlation,
    difference,
    mean_difference,
    mean_of,
    reliability,
    split_half,
    verdict,
)
from partial_lora.errors import PartialLoraError


def sparsities(*values: float) -> dict:
    """Modules of two axes each, in this order."""
    return {
        f"m{index // 2}": {"rows": values[index], "columns": values[index + 1]} for index in range(0, len(values), 2)
    }


def pearson(x, y) -> float:
    """By definition."""
    x, y = np.asarray(x) - np.mean(x), np.asarray(y) - np.mean(y)
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def ranks(values) -> list[float]:
    """From 1; equal values share the mean of their places."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


@pytest.mark.parametrize("counts", [(4, 4), (3, 5, 7), (1, 1, 1, 1), (1, 2), (16,) * 10, (2,)])
@pytest.mark.parametrize("seed", [0, 1])
def test_halves_are_disjoint_whole_and_stratified(counts, seed) -> None:
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(len(counts)), counts))
    first, second = split_half(labels, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert abs(len(first) - len(second)) <= 1
    for label in range(len(counts)):
        assert abs((labels[first] == label).sum() - (labels[second] == label).sum()) <= 1
    assert list(first) == sorted(first)
    assert list(second) == sorted(second)


def test_a_seed_gives_its_halves_again_and_another_seed_others() -> None:
    labels = np.arange(40) % 4
    same = [split_half(labels, 5) for _ in range(2)]
    assert all(np.array_equal(one, other) for one, other in zip(*same, strict=True))
    assert not np.array_equal(split_half(labels, 6)[0], same[0][0])


def test_one_example_has_no_halves() -> None:
    with pytest.raises(PartialLoraError, match=r"^split-half: "):
        split_half([3], 0)


def test_correlations_are_those_of_the_textbook() -> None:
    first, second = (0.1, 0.5, 0.5, 0.9, 0.3, 0.0), (0.2, 0.4, 0.55, 0.8, 0.4, 0.1)
    found = reliability(sparsities(*first), sparsities(*second))
    r = pearson(first, second)
    assert found["pearson"] == pytest.approx(r)
    assert found["spearman"] == pytest.approx(pearson(ranks(first), ranks(second)))
    assert found["spearman_brown"] == pytest.approx(2 * r / (1 + r))
    assert (found["n"], found["said"]) == (6, "")


def test_modules_are_matched_by_name_and_not_by_order() -> None:
    first = sparsities(0.1, 0.5, 0.5, 0.9)
    assert reliability(first, dict(reversed(first.items())))["pearson"] == pytest.approx(1)


def test_halves_that_contradict_each_other_are_not_corrected() -> None:
    found = reliability(sparsities(0.1, 0.2, 0.3, 0.4), sparsities(0.4, 0.3, 0.2, 0.1))
    assert found["pearson"] == pytest.approx(-1)
    assert found["spearman_brown"] == found["pearson"]


@pytest.mark.parametrize("turned", [False, True])
def test_equal_sparsities_have_no_correlation_and_say_so(turned) -> None:
    pair = [sparsities(0.1, 0.2, 0.3, 0.4), sparsities(0.95, 0.95, 0.95, 0.95)]
    found = reliability(*(reversed(pair) if turned else pair))
    assert [found[key] for key in ("pearson", "spearman", "spearman_brown")] == [None] * 3
    assert f"all sparsities of the {'first' if turned else 'second'} calibration are 0.95" in found["said"]


def test_two_sparsities_are_too_few() -> None:
    found = correlation(sparsities(0.1, 0.2), sparsities(0.3, 0.9))
    assert found["pearson"] is None
    assert "at least 3" in found["said"]


def test_calibrations_of_different_modules_are_refused_by_name() -> None:
    with pytest.raises(PartialLoraError, match="m1"):
        reliability(sparsities(0.1, 0.2, 0.3, 0.4), sparsities(0.1, 0.2))


@pytest.mark.parametrize(
    ("corrected", "words"),
    [(0.51, ""), (0.5, ""), (0.49, "inconsistent: .* 0.49; .*calibration.shots.*"), (None, "no reliability")],
)
def test_the_verdict_turns_at_one_half(corrected, words) -> None:
    assert re.match(words + ("$" if not words else ""), verdict(corrected))


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
    pairs = list(combinations(calibrations, 2))
    assert [(calibrations.index(a), calibrations.index(b)) for a, b in pairs] == [(0, 1), (0, 2), (1, 2)]
    found = mean_difference(pairs)
    each = [difference(*pair) for pair in pairs]
    assert found["pearson"] == each[0]["pearson"]  # the third has no correlation with either
    assert found["mean_absolute"] == pytest.approx(sum(one["mean_absolute"] for one in each) / 3)
    assert found["pairs"] == 3
    assert found["said"].startswith("2 of 3 pairs without a correlation: all sparsities of the second")


def test_means_of_what_there_is() -> None:
    assert mean_of([1.0, None, 3.0]) == 2.0
    assert mean_of([None]) is None
