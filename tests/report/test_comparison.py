"""Two methods compared example by example: exact small cases, intervals that hold the truth, and verdicts."""

from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pandas as pd
import pytest

from partial_lora.errors import PartialLoraError
from partial_lora.report import statistics
from partial_lora.report.statistics import compared, per_example, resampled, verdict


def frame(label, prediction, **columns) -> pd.DataFrame:
    return pd.DataFrame({"index": range(len(label)), "label": label, "prediction": prediction} | columns)


def every_draw(differences: np.ndarray) -> dict[float, float]:
    """The bootstrap's distribution, literally: the mean of every way to draw seeds and examples again."""
    seeds, examples = differences.shape
    found: dict[float, float] = {}
    for runs in product(range(seeds), repeat=seeds):
        for rows in product(range(examples), repeat=examples):
            mean = round(float(np.mean([[differences[run, row] for row in rows] for run in runs])), 9)
            found[mean] = found.get(mean, 0) + seeds**-seeds * examples**-examples
    return found


@pytest.mark.parametrize(
    "differences",
    [
        [[1.0, 0.0, -1.0, 0.0]],
        [[1.0, 0.0, 0.0], [1.0, -1.0, 0.0]],
        [[0.5, 0.25, 0.0], [0.5, -1.0, 0.0], [0.0, 0.0, 1.0]],
    ],
)
def test_draws_come_up_as_often_as_in_the_literal_bootstrap(differences) -> None:
    differences = np.array(differences)
    expected, draws = every_draw(differences), 40_000
    found = resampled(differences, np.random.default_rng(0), draws)
    values, counts = np.unique(np.round(found, 9), return_counts=True)
    assert set(values) <= set(expected)
    for value, chance in expected.items():
        share = counts[values == value].sum() / draws
        assert share == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / draws) + 1e-9)


@pytest.mark.parametrize("at_once", [1, 7, 50])
def test_draws_in_parts_are_those_made_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    differences = np.random.default_rng(0).normal(size=(3, 40))
    whole = resampled(differences, np.random.default_rng(1), 50)
    monkeypatch.setattr(statistics, "_COUNTS_AT_ONCE", at_once * 40)
    assert resampled(differences, np.random.default_rng(1), 50) == pytest.approx(whole, rel=1e-12)


def test_memory_does_not_grow_with_draws_of_different_examples() -> None:
    differences = np.random.default_rng(0).normal(size=(2, 20_000))
    tracemalloc.start()
    resampled(differences, np.random.default_rng(1), 600)  # 12 million counts, 192 MB in one piece
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 80 * 2**20


def test_the_difference_is_that_of_the_metrics_over_the_seeds_both_have() -> None:
    label = [0, 1, 2, 1]
    first = {0: frame(label, [0, 1, 2, 1]), 1: frame(label, [0, 1, 2, 0]), 5: frame(label, [2, 2, 0, 0])}
    second = {0: frame(label, [0, 1, 0, 0]), 1: frame(label, [0, 1, 2, 0]), 7: frame(label, label)}
    found = compared(first, second, "accuracy")
    assert found.difference == pytest.approx((1 + 3 / 4) / 2 - (2 / 4 + 3 / 4) / 2)
    assert (found.seeds, found.examples, found.left_out, found.reason) == (2, 4, (5, 7), None)
    assert found == compared(first, second, "accuracy")
    turned = compared(second, first, "accuracy")
    assert turned.difference == -found.difference
    same = compared(first, first, "accuracy")
    assert (same.difference, same.low, same.high, same.verdict) == (0, 0, 0, "matches")


def experiment(drawn: np.random.Generator, truth: float, seeds: int, examples: int, moved: float) -> tuple[dict, dict]:
    """Predictions of two methods of which the first is right more often by the truth; seeds move both apart."""
    label = drawn.integers(2, size=examples)
    hard = drawn.uniform(0.3, 0.9, size=examples)
    pair = ({}, {})
    for number in range(seeds):
        luck = drawn.normal(0, moved, size=2)
        common = drawn.uniform(size=examples)
        for which, shift in enumerate((truth / 2, -truth / 2)):
            own = np.where(drawn.uniform(size=examples) < 0.5, common, drawn.uniform(size=examples))
            right = own < hard + shift + luck[which]
            pair[which][number] = frame(label, np.where(right, label, 1 - label))
    return pair


def coverage(seeds: int, moved: float, truth: float = 0.05, repetitions: int = 150) -> float:
    """How often a 95 % interval holds the true difference."""
    drawn = np.random.default_rng(seeds)
    pairs = (experiment(drawn, truth, seeds, 200, moved) for _ in range(repetitions))
    found = [compared(*pair, "accuracy", seed=number, draws=1_000) for number, pair in enumerate(pairs)]
    return float(np.mean([each.low <= truth <= each.high for each in found]))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    assert coverage(3, moved=0.02) > 0.95
    assert 0.88 <= coverage(10, moved=0.05) <= 0.99
    assert coverage(3, moved=0.1) < 0.93  # too narrow, where few seeds differ much


def test_pairs_are_told_apart_that_are_not_without_pairing() -> None:
    drawn = np.random.default_rng(1)
    label = drawn.integers(2, size=400)
    right = drawn.uniform(size=(3, 400)) < 0.7
    better = right.copy()
    better[:, :20] = True
    first, second = (
        {seed: frame(label, np.where(each[seed], label, 1 - label)) for seed in range(3)} for each in (better, right)
    )
    found = compared(first, second, "accuracy")
    assert found.verdict == "better"
    spread = np.sqrt(2 * 0.7 * 0.3 / 400)  # of two independent accuracies
    assert found.high - found.low < 2 * 1.96 * spread / 2


def test_one_seed_decides_nothing() -> None:
    label = np.arange(500) % 2
    good, poor = frame(label, label), frame(label, np.where(np.arange(500) < 100, 1 - label, label))
    alone = compared({0: good}, {0: poor, 1: poor}, "accuracy")
    assert alone.low > 0.1
    assert (alone.verdict, alone.reason, alone.seeds, alone.left_out) == ("undecided", "one seed", 1, (1,))
    assert compared({0: poor}, {0: good}, "accuracy").verdict == "undecided"
    two = compared({0: good, 1: good}, {0: poor, 1: poor}, "accuracy")
    assert (two.verdict, two.reason, two.left_out) == ("better", None, ())


def test_verdicts() -> None:
    assert verdict(0.001, 0.02) == "better"
    assert verdict(-0.0099, 0.002) == "matches"
    assert verdict(-0.0099, -0.002) == "matches"  # worse, but by less than a point
    assert verdict(-0.03, -0.011) == "worse"
    assert verdict(-0.03, 0.01) == "undecided"
    assert verdict(-0.001, 0.001, None) == "undecided"


def test_metrics_that_are_no_mean_are_computed_anew() -> None:
    drawn = np.random.default_rng(0)
    label = drawn.integers(2, size=60)
    good, poor = (
        {seed: frame(label, np.where(drawn.uniform(size=60) < share, label, 1 - label)) for seed in range(2)}
        for share in (0.95, 0.6)
    )
    found = compared(good, poor, "matthews", draws=200)
    from sklearn.metrics import matthews_corrcoef

    expected = [
        np.mean([matthews_corrcoef(label, each["prediction"]) for each in frames.values()]) for frames in (good, poor)
    ]
    assert found.difference == pytest.approx(expected[0] - expected[1])
    assert found.low < found.difference < found.high
    assert found.verdict == "better"
    numbers = drawn.normal(size=60)
    near, far = (
        {seed: frame(numbers, numbers + drawn.normal(0, scale, size=60)) for seed in range(2)} for scale in (0.1, 2.0)
    )
    assert compared(near, far, "mse").verdict == "better"  # less is better
    assert compared(far, near, "mse").verdict == "worse"
    assert compared(near, far, "mse").difference < 0


def test_columns_that_say_a_metric() -> None:
    told = frame([0, 1], [0, 0], prediction_norm=[0, 1], rouge_l=[0.5, 0.25])
    assert per_example(told, "accuracy").tolist() == [1, 0]
    assert per_example(told, "accuracy_norm").tolist() == [1, 1]
    assert per_example(told, "rouge_l").tolist() == [0.5, 0.25]
    with pytest.raises(PartialLoraError, match="the predictions do not say perplexity"):
        per_example(told, "perplexity")
    with pytest.raises(PartialLoraError, match="a mixture: compare its members one by one"):
        per_example(told.assign(member="a"), "accuracy")
    with pytest.raises(PartialLoraError, match="no seed that both have"):
        compared({0: told}, {1: told}, "accuracy")
    with pytest.raises(PartialLoraError, match="different test examples"):
        compared({0: told}, {0: told.iloc[::-1]}, "accuracy")
