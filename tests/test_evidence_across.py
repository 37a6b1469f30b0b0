"""Paired differences on several tasks: exact cases, and intervals beside a literal bootstrap."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from partial_lora.comparison import compared
from partial_lora.errors import PartialLoraError
from partial_lora.evidence.across import Pair, average, between
from partial_lora.evidence.recorded import Outcome


class Kept:
    """An outcome whose predictions are at hand."""

    def __init__(self, frame: pd.DataFrame | None, score: float | None = None) -> None:
        right = None if frame is None else float((frame["label"] == frame["prediction"]).mean())
        self.score, self.predictions = right if score is None else score, frame


def side(right: np.ndarray, first_seed: int = 0) -> dict[int, Kept]:
    """Runs that are right about these examples (seeds, examples)."""
    label = np.arange(right.shape[1]) % 2
    frames = [pd.DataFrame({"label": label, "prediction": np.where(row, label, 1 - label)}) for row in right]
    return {first_seed + seed: Kept(frame) for seed, frame in enumerate(frames)}


def drawn(seed: int, seeds: int, examples: int, chances: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return tuple(generator.uniform(size=(seeds, examples)) < chance for chance in chances)


def pair(first: np.ndarray, second: np.ndarray) -> Pair:
    return Pair(side(first), side(second), "accuracy")


def literally(tasks: list[np.ndarray], draws: int) -> np.ndarray:
    """The mean over tasks of the mean difference, in every draw of all seeds and each task's examples, one by one."""
    generator, found = np.random.default_rng(7), []
    every = max(map(len, tasks))
    while len(found) < draws:
        drawn_seeds = generator.integers(every, size=every)
        means = []
        for differences in tasks:
            seeds = [seed for seed in drawn_seeds if seed < len(differences)]
            examples = generator.integers(differences.shape[1], size=differences.shape[1])
            means.append([[differences[seed, example] for example in examples] for seed in seeds])
        if all(means):
            found.append(np.mean([np.mean(each) for each in means]))
    return np.array(found)


def test_on_one_task_it_is_what_the_comparison_says() -> None:
    one = pair(*drawn(0, 3, 80, (0.8, 0.7)))
    found = between([one])
    frames = [{seed: each.predictions for seed, each in runs.items()} for runs in (one.first, one.second)]
    expected = compared(*frames, "accuracy")
    assert (found.difference, found.low, found.high) == (expected.difference, expected.low, expected.high)
    assert (found.seeds, found.examples, found.verdict, found.over) == (3, 80, expected.verdict, "seeds and examples")


def test_the_average_is_that_of_a_literal_bootstrap_of_both_tasks() -> None:
    arrays = [drawn(1, 2, 30, (0.9, 0.6)), drawn(2, 4, 50, (0.7, 0.7))]
    found = average({str(place): [pair(*each)] for place, each in enumerate(arrays)})
    differences = [first.astype(float) - second for first, second in arrays]
    assert found.difference == pytest.approx(np.mean([each.mean() for each in differences]))
    spread = literally(differences, 2_000)
    low, high = np.quantile(spread, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.012)
    assert found.high == pytest.approx(high, abs=0.012)
    assert (found.seeds, found.examples) == (2, 80)


def test_examples_are_lucky_on_one_task_and_seeds_on_all() -> None:
    alike = [np.repeat(each[:1], 3, axis=0) for each in drawn(3, 1, 60, (0.8, 0.7))]  # all seeds say the same
    one = pair(*alike)
    single, double = between([one]), average({"a": [one], "b": [one]})
    assert double.difference == pytest.approx(single.difference)
    assert (double.high - double.low) == pytest.approx((single.high - single.low) / np.sqrt(2), rel=0.05)
    of_seeds = np.repeat([[True], [False], [True], [True]], 60, axis=1)  # all examples say the same
    one = pair(of_seeds, np.zeros_like(of_seeds))
    single, double = between([one]), average({"a": [one], "b": [one]})
    assert (double.low, double.high) == (single.low, single.high)
    assert double.low < double.high


def test_several_pairs_on_a_task_share_its_examples() -> None:
    base = drawn(4, 2, 40, (0.9, 0.5))
    twice = between([pair(*base), pair(*base)])
    assert twice == between([pair(*base)])  # as wide: the same examples tell nothing new
    turned = between([pair(*base), pair(*base[::-1])])
    assert (turned.difference, turned.low, turned.high) == (0, 0, 0)


def test_without_predictions_the_interval_is_students() -> None:
    first = {0: Kept(None, 0.9), 1: Kept(None, 0.8), 2: Kept(None, 0.85), 9: Kept(None, 0.1)}
    second = {0: Kept(None, 0.85), 1: Kept(None, 0.81), 2: Kept(None, 0.8)}
    found = between([Pair(first, second, "accuracy")])
    values = np.array([0.05, -0.01, 0.05])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (found.difference, found.seeds, found.over) == (pytest.approx(0.03), 3, "seeds")
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert found.verdict == "undecided"


def test_of_one_seed_nothing_is_decided() -> None:
    first, second = drawn(5, 1, 200, (0.99, 0.3))
    found = between([pair(first, second)])
    assert (found.verdict, found.over, found.seeds) == ("undecided", "examples", 1)
    assert found.low > 0
    alone = between([Pair({0: Kept(None, 0.9)}, {0: Kept(None, 0.5)}, "accuracy")])
    assert (alone.difference, alone.verdict, alone.over) == (0.4, "undecided", "–")
    assert np.isnan([alone.low, alone.high]).all()
    with_others = average({"a": [pair(*drawn(6, 3, 50, (0.9, 0.1)))], "b": [pair(first, second)]})
    assert (with_others.verdict, with_others.seeds, with_others.over) == (
        "undecided",
        1,
        "examples; seeds and examples",
    )


def test_what_cannot_be_paired() -> None:
    runs = side(drawn(7, 1, 10, (0.5, 0.5))[0])
    with pytest.raises(PartialLoraError, match="no seed in common"):
        between([Pair(runs, {3: runs[0]}, "accuracy")])
    with pytest.raises(PartialLoraError, match="perplexity: no average over tasks"):
        average({"a": [Pair({0: Kept(None, 9.0)}, {0: Kept(None, 8.0)}, "perplexity")]})
    longer = side(drawn(8, 1, 12, (0.5, 0.5))[0])
    assert between([Pair(runs, longer, "accuracy")]).over == "–"  # other examples: scores alone


def test_where_less_is_better_the_verdict_is_turned() -> None:
    first = {seed: Kept(None, 3.0 + 0.01 * seed) for seed in range(4)}
    second = {seed: Kept(None, 5.0 + 0.02 * seed) for seed in range(4)}
    found = between([Pair(first, second, "perplexity")])
    assert found.difference < 0
    assert found.verdict == "better"


def test_a_metric_of_all_examples_together_has_the_comparisons_interval() -> None:
    first, second = drawn(9, 2, 60, (0.95, 0.6))
    one = Pair(side(first), side(second), "matthews")
    frames = [{seed: each.predictions for seed, each in runs.items()} for runs in (one.first, one.second)]
    expected, found = compared(*frames, "matthews", draws=1_000), between([one])
    assert found.difference == pytest.approx(expected.difference)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.01)
    assert found.verdict == "better"


def test_a_run_whose_predictions_are_broken_has_none(tmp_path) -> None:
    assert Outcome(0.5, tmp_path).predictions is None
    (tmp_path / "predictions.parquet").write_bytes(b"no parquet")
    assert Outcome(0.5, tmp_path).predictions is None
