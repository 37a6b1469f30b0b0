"""Pairs of methods: what their differences are over, and which is better than every other."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from refusals import refusal
from scipy import stats

from partial_lora.report.pairs import Outcome, Pair, average, between, is_best, over_tasks
from partial_lora.report.statistics import by_example, estimate, over_sets


def outcomes(right) -> dict[int, Outcome]:
    """Outcomes by seed: right about these examples (seeds, examples), or of these scores without predictions."""
    of_seeds = {}
    for seed, row in enumerate(right):
        label = np.arange(np.size(row)) % 2
        of_seeds[seed] = Outcome(float(np.mean(row)), "accuracy", "", seed, None)
        if np.ndim(row):
            frame = pd.DataFrame({"label": label, "prediction": np.where(row, label, 1 - label)})
            of_seeds[seed].__dict__["predictions"] = frame
    return of_seeds


def pair(first, second, metric: str = "accuracy") -> Pair:
    return Pair(outcomes(first), outcomes(second), metric)


def drawn(seed: int, seeds: int, examples: int, *chances: float) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.uniform(size=(seeds, examples)) < chance for chance in chances]


def test_on_one_task_it_is_the_estimate_of_differences_by_example() -> None:
    one = pair(*drawn(0, 3, 80, 0.8, 0.7))
    d = by_example(*([each.predictions for each in side.values()] for side in (one.first, one.second)), "accuracy")
    found, expected = between(one), estimate(d)
    assert (found.estimate, (found.low, found.high)) == (expected, expected.interval())
    assert (found.seeds, found.examples, found.over) == (3, 80, "seeds and examples")


def test_members_of_a_mixture_have_the_average_of_their_common_seeds_and_sets_that_of_all_sets() -> None:
    arrays = [drawn(1, 3, 30, 0.9, 0.6), drawn(2, 4, 50, 0.7, 0.7), drawn(3, 3, 40, 0.8, 0.5)]
    tasks = {str(place): pair(*each) for place, each in enumerate(arrays)}
    differences = [first.astype(float) - second for first, second in arrays]
    members = average(tasks)
    assert members.estimate == estimate(*(each[:3] for each in differences))
    assert (members.seeds, members.examples, members.over) == (3, 120, "seeds and examples")
    sets = over_tasks(tasks)
    assert sets.estimate == over_sets([estimate(each) for each in differences])
    means = [each.mean() for each in differences]
    assert (sets.up, sets.down) == (sum(mean > 0 for mean in means), sum(mean < 0 for mean in means))
    assert (sets.seeds, sets.examples, sets.over) == (3, 120, "sets")


def test_without_predictions_the_interval_is_students() -> None:
    interval = between(pair([0.9, 0.8, 0.85, 0.1], [0.85, 0.81, 0.8]))
    values = np.array([0.05, -0.01, 0.05])
    expected = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert (interval.difference, interval.seeds, interval.over, interval.verdict) == (
        pytest.approx(0.03),
        3,
        "seeds",
        "undecided",
    )
    falling = between(pair([3.0, 3.01, 3.02], [5.0, 5.02, 5.04], "perplexity"))
    assert (falling.difference < 0, falling.verdict) == (True, "better")  # less is better
    other = between(pair(*drawn(7, 1, 10, 0.5), *drawn(8, 1, 12, 0.5)))
    assert other.over == "–"  # other examples: scores alone


def test_of_one_seed_nothing_is_decided_and_of_none_nothing_made() -> None:
    one = pair(*drawn(5, 1, 200, 0.99, 0.3))
    interval = between(one)
    assert (interval.verdict, interval.over, interval.seeds, interval.low > 0) == ("undecided", "examples", 1, True)
    alone = between(pair([0.9], [0.5]))
    assert (alone.difference, alone.verdict, alone.over) == (0.4, "undecided", "–")
    assert np.isnan([alone.low, alone.high]).all()
    both = {"a": pair(*drawn(6, 3, 50, 0.9, 0.1)), "b": one}
    assert (average(both).verdict, average(both).seeds, average(both).over) == ("undecided", 1, "examples")
    assert (over_tasks(both).verdict, over_tasks(both).seeds) == ("undecided", 1)
    with refusal("", "seed"):
        between(Pair(outcomes([0.5]), {3: outcomes([0.5])[0]}, "accuracy"))


def test_the_best_is_better_than_each_other_and_one_that_stands_alone_is_not() -> None:
    good, alike, poor = (outcomes(right) for right in drawn(9, 3, 200, 0.95, 0.94, 0.3))
    assert is_best(good, [poor], "accuracy")
    assert not is_best(good, [poor, alike], "accuracy")
    assert not is_best(good, [], "accuracy")
    assert not is_best({0: good[0]}, [poor], "accuracy")  # of one seed nothing is decided
