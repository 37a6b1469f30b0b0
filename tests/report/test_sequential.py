"""Looks at a comparison: what is decided, what is asked for next, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm, t

from partial_lora.report import sequential
from partial_lora.report.sequential import AS_GOOD, LEADS, OPEN, WORSE, decide


def study(truths: dict[str, float], seeds: int = 8, rows: int = 50, noise: float = 0.01, seed: int = 0):
    """Scores of each test row by method and seed."""
    draw = np.random.default_rng(seed).normal
    return {
        name: {number: truth + noise * draw() + noise * draw(size=rows) for number in range(seeds)}
        for name, truth in truths.items()
    }


def test_a_method_far_behind_is_dropped_at_the_first_look_and_asks_for_no_seed() -> None:
    outputs = study({"a": 0.8, "b": 0.8, "c": 0.2}, seeds=2)
    found = decide(outputs, 0.01)
    assert (found.by_method["c"].verdict, found.by_method["c"].seeds) == (WORSE, 2)
    assert found.next_seeds == {"a": 3, "b": 3}
    found = decide(study({"a": 0.8, "b": 0.8, "c": 0.2}), 0.01)  # later seeds change nothing about it
    assert (found.by_method["c"].verdict, found.by_method["c"].seeds) == (WORSE, 2)


def test_methods_that_differ_by_less_than_the_margin_are_as_good() -> None:
    found = decide(study({"a": 0.8, "b": 0.8}), margin=0.05)
    assert sorted(decision.verdict for decision in found.by_method.values()) == [AS_GOOD, LEADS]
    assert found.next_seeds == {}


def test_what_no_seed_would_decide_gets_no_further_one_and_says_so() -> None:
    """Test rows move the difference by far more than seeds do."""
    draw = np.random.default_rng(1).normal
    shared = {name: draw(size=20) for name in "ab"}
    outputs = {name: {seed: shared[name] + 1e-3 * draw(size=20) for seed in range(2)} for name in "ab"}
    found = decide(outputs, margin=1e-3)
    (other,) = (decision for decision in found.by_method.values() if decision.verdict != LEADS)
    assert (other.verdict, other.wants, found.next_seeds) == (OPEN, None, {})


def test_seeds_that_are_missing_are_asked_for_and_equal_scores_decide_nothing() -> None:
    assert decide(study({"a": 0.8, "b": 0.7}, seeds=1), 0.01).next_seeds == {"a": 2, "b": 2}
    same = {"a": {0: np.array([0.8]), 1: np.array([0.8])}, "b": {0: np.array([0.7]), 1: np.array([0.7])}}
    assert decide(same, 0.01, (2,)).by_method["b"].verdict == OPEN


def test_one_seed_decides_nothing() -> None:
    found = decide(study({"a": 0.9, "b": 0.1}, seeds=1), 0.01, (1,))
    assert (found.leader, found.by_method["b"].verdict, found.next_seeds) == ("a", OPEN, {})


def test_a_smaller_gap_shows_with_more_seeds_more_rows_and_fewer_methods() -> None:
    """And it is where the interval begins at zero, of runs that spread as those of the records."""
    gaps = [sequential.shows(3, 120, seeds) for seeds in sequential.LOOKS]
    assert gaps == sorted(gaps, reverse=True)
    assert sequential.shows(3, 1000, 8) < gaps[-1] < sequential.shows(6, 120, 8)
    alone = sequential.shows(2, 120, 8, (8,))
    of_seed = sequential._SEED**2 + sequential._ROW_OF_SEED**2 / 120
    usual = sequential.Spread(alone, of_seed, sequential._ROW**2 / 120, 120)
    assert usual.estimate(8, 7).interval()[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("error", [0.05, 0.01])
def test_the_looks_err_together_as_often_as_they_may(error: float) -> None:
    """By scipy's own integral of the normal whose parts are what each look sees."""
    levels = np.array(sequential.levels_of(sequential.LOOKS, error))
    assert (np.diff(levels) > 0).all()
    bounds, seeds = norm.isf(levels / 2), np.array(sequential.LOOKS)
    together = multivariate_normal(cov=np.sqrt(np.minimum.outer(seeds, seeds) / np.maximum.outer(seeds, seeds)))
    assert 1 - together.cdf(bounds, lower_limit=-bounds) == pytest.approx(error, rel=0.01)
    assert sequential.levels_of((8,), error) == pytest.approx((error,))


def test_one_method_that_spreads_lends_its_seeds_to_no_other() -> None:
    """What is pooled of twelve counts as that of three; a pair that moves far more keeps its own freedom."""
    outputs = study(dict.fromkeys("abcdefghijkl", 0.5), seeds=3, rows=1)
    pooled = sequential.Seeds.of(outputs)
    apart = np.stack([outputs["a"][seed] - outputs["b"][seed] for seed in range(3)])
    assert [pooled.pair(sequential.Spread.of(times * apart), 3)[1] for times in (1, 100)] == [6, 2]


def test_seeds_move_a_difference_by_what_methods_and_seeds_leave_unexplained() -> None:
    """Beside a literal two-way analysis, of a full table; and of one with gaps its degrees of freedom."""
    table = np.random.default_rng(0).normal(size=(3, 5))
    outputs = {str(row): {seed: np.array([value]) for seed, value in enumerate(own)} for row, own in enumerate(table)}
    left = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
    found = sequential.Seeds.of(outputs)
    assert (found.moved, found.freedom) == pytest.approx((2 * (left**2).sum() / 8, 8))
    del outputs["2"][4]
    assert sequential.Seeds.of(outputs).freedom == 7


@pytest.mark.parametrize(("seed", "margin"), [(0, 0.004), (1, 0.002), (2, 0.012), (3, 0.03), (4, 0.0005), (5, 0.02)])
def test_the_seeds_that_would_decide_are_the_first_whose_interval_does(seed, margin) -> None:
    """One number of seeds after the other, by Student's t with Satterthwaite's freedom, written out."""
    difference, of_seed, of_rows = np.abs(np.random.default_rng(seed).normal(0, [0.01, 0.02, 0.001]))
    pair, freedom, level = sequential.Spread(difference, of_seed**2, of_rows**2, 80), 1.5, 0.99
    expected = None
    for seeds in range(64, 1, -1):
        parts = of_seed**2 / seeds, of_rows**2
        degrees = sum(parts) ** 2 / (parts[0] ** 2 / (freedom * (seeds - 1)) + parts[1] ** 2 / 79)
        half = t.ppf((1 + level) / 2, degrees) * sum(parts) ** 0.5
        if difference - half > 0 or difference + half < margin:
            expected = seeds
    assert sequential.seeds_wanted(pair, freedom, level, margin) == expected


def test_a_method_is_as_good_where_its_interval_ends_below_the_margin_and_nowhere_else() -> None:
    outputs = study({"a": 0.8, "b": 0.8}, seeds=2)
    (other,) = (name for name, by in decide(outputs, 1, (2,)).by_method.items() if by.verdict != LEADS)
    end = decide(outputs, 1, (2,)).by_method[other].high
    for margin, verdict in ((end * 1.001, AS_GOOD), (end * 0.999, OPEN)):
        assert decide(outputs, margin, (2,)).by_method[other].verdict == verdict


def test_a_run_far_below_the_others_of_its_method_is_named_and_no_other() -> None:
    outputs = study({"a": 0.8, "b": 0.7, "c": 0.9}, seeds=4)
    outputs["b"][2] = outputs["b"][2] - 0.3
    assert {run: pytest.approx(below, abs=0.05) for run, below in sequential.fallen(outputs).items()} == {("b", 2): 0.3}
    named = [sequential.fallen(study({"a": 0.8, "b": 0.7}, seeds=3, rows=1, seed=seed)) for seed in range(200)]
    assert sum(map(bool, named)) <= 0.03 * 200


def test_equal_methods_are_told_apart_in_few_studies() -> None:
    wrong = 0
    for seed in range(150):
        found = decide(study({"a": 0.5, "b": 0.5, "c": 0.5}, rows=5, noise=0.02, seed=seed), 0.001)
        wrong += any(decision.verdict == WORSE for decision in found.by_method.values())
    assert wrong <= 0.08 * 150
