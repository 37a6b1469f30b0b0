"""Searches, the score that is enough, and curves as plain data."""

from __future__ import annotations

import math

import pytest

from partial_lora.calibration.level_search import (
    bisect,
    digest_of,
    line,
    passes,
    passes_at_most,
    scan,
    sparsity_levels,
    threshold_of,
)


def test_scan_stops_at_the_first_failure_and_bisect_may_pass_over_it():
    assert scan({0.1, 0.2, 0.4, 0.5}.__contains__, [0.1, 0.2, 0.3, 0.4, 0.5]) == 0.2
    assert bisect({0.1, 0.3, 0.4}.__contains__, [0.1, 0.2, 0.3, 0.4, 0.5]) == 0.4
    for search in (scan, bisect):
        assert search(lambda level: False, [0.1, 0.2]) == 0
        assert search(lambda level: True, [0.1, 0.2]) == 0.2
        assert search(lambda level: True, []) == 0


def test_levels_are_multiples_of_the_step():
    assert sparsity_levels(0.05, 0.95) == [round(0.05 * number, 2) for number in range(1, 20)]
    assert sparsity_levels(0.1, 0.35) == [0.1, 0.2, 0.3]
    assert sparsity_levels(0.3, 0.9) == [0.3, 0.6, 0.9]
    assert sparsity_levels(0.2, 0.0) == []


def test_a_share_of_the_baseline_is_enough():
    assert line(baseline=0.8, threshold=0.9) == pytest.approx(0.72)
    assert passes(0.18, baseline=0.2, threshold=0.9)  # 0.9 * 0.2 > 0.18 in floating point
    assert not passes(0.18 - 1e-8, baseline=0.2, threshold=0.9)
    assert not passes(-0.4, baseline=0.3, threshold=0.9)


def test_a_loss_may_grow_by_a_tenth_of_the_new_one():
    assert line(baseline=-0.45, threshold=0.9) == pytest.approx(-0.5)
    assert passes(-0.5, baseline=-0.45, threshold=0.9)
    assert not passes(-0.51, baseline=-0.45, threshold=0.9)


def test_the_share_may_be_of_the_part_above_chance():
    assert line(baseline=0.8, threshold=0.9, chance=0.5) == pytest.approx(0.77)
    assert line(baseline=-0.4, threshold=0.75, chance=-2.4) == pytest.approx(-0.9)
    assert passes(0.77, baseline=0.8, threshold=0.9, chance=0.5)
    assert not passes(0.77 - 1e-8, baseline=0.8, threshold=0.9, chance=0.5)
    for threshold in (0.0, 0.5, 1.0):
        assert not passes(1.0, baseline=0.5, threshold=threshold, chance=0.5)  # nothing is above chance
        assert not passes(math.nan, baseline=-0.5, threshold=threshold)


@pytest.mark.parametrize(("baseline", "chance"), [(0.8, 0.2), (-0.4, -2.3)])
def test_the_threshold_of_a_score_has_its_line_there(baseline, chance):
    at = threshold_of(chance, baseline=baseline)
    assert line(baseline=baseline, threshold=at) == pytest.approx(chance)


def test_a_digest_names_what_is_zeroed_whatever_the_order():
    rows_then_columns = {"a": {"rows": 0.5, "columns": 0.5}, "b": {"rows": 0.2}}
    assert digest_of(rows_then_columns) == digest_of({"b": {"rows": 0.2, "columns": 0.0}, "a": {"joint": 0.5}})
    assert digest_of({}) == digest_of({"a": {"rows": 0.0}}) == ""
    others = [{"a": {"rows": 0.5}}, {"a": {"columns": 0.5}}, {"b": {"rows": 0.5}}, {"a": {"rows": 0.6}}]
    assert len({digest_of(cuts) for cuts in (rows_then_columns, *others)}) == 5


def test_passes_are_counted_by_hand():
    assert passes_at_most(48, 2, 19, search="scan") == 48 * 2 * 19 + 1
    assert passes_at_most(48, 1, 19, search="bisect") == 48 * 5 + 1
    assert [passes_at_most(1, 1, levels, search="bisect") - 1 for levels in (1, 3, 4, 7, 8)] == [1, 2, 3, 3, 4]
