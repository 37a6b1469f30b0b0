"""Searches for a learning rate: which trials they ask for, and what they end with."""

from __future__ import annotations

import math

import pytest
from recorded_runs import record

from partial_lora.compare import rate_search
from partial_lora.compare.rate_search import QUARTER, Trial


def searched(score, *, searching=None, centre=1.0, count=5, seeds=3, known=()):
    """The best rate, and the batches of trials of a search; score: of a run by its rate and seed."""
    searching, batches = searching or rate_search.full(centre, count, seeds, known), []
    trials = next(searching)
    while True:
        batches.append(trials)
        scores = {trial: score(trial.rate, trial.seed) for trial in trials}
        validation = {
            trial: value if value is None or isinstance(value, tuple) else (value, 0.0)
            for trial, value in scores.items()
        }
        try:
            trials = searching.send(validation)
        except StopIteration as end:
            return end.value, batches


def test_a_quick_search_drops_rates_at_a_quarter_and_trains_two_to_the_end() -> None:
    def loss(rate: float, seed: int) -> tuple[float, float]:
        return (-1 - abs(math.log2(rate / 4) - 0.1),) * 2

    best, batches = searched(loss, searching=rate_search.quick(1.0, 3))
    assert batches[:-1] == [
        [Trial(0.5, 0, QUARTER), Trial(1.0, 0, QUARTER), Trial(2.0, 0, QUARTER)],
        [Trial(4.0, 0, QUARTER)],
        [Trial(8.0, 0, QUARTER)],
    ]
    assert batches[-1] == [Trial(4.0, 0), Trial(8.0, 0)]
    assert best == 4.0


def test_where_no_rate_stands_out_at_a_quarter_a_quick_search_looks_no_further() -> None:
    _, batches = searched(lambda rate, seed: (-1 + rate * 1e-5,) * 2, searching=rate_search.quick(1.0, 3))
    assert [len(batch) for batch in batches] == [3, 2]


def test_the_end_decides_between_the_two_that_a_quarter_left() -> None:
    searching = rate_search.quick(1.0, 3)
    first = next(searching)
    last = searching.send({trial: (-abs(trial.rate - 1.1),) * 2 for trial in first})
    assert {trial.rate for trial in last} == {1.0, 0.5}
    with pytest.raises(StopIteration) as end:
        searching.send({Trial(1.0, 0): (0.5, -1.0), Trial(0.5, 0): (0.6, -1.0)})
    assert end.value.value == 0.5
    assert searched(lambda rate, seed: None, searching=rate_search.quick(1.0, 3))[0] is None


def test_the_better_half_of_the_rates_goes_on_to_the_next_seed() -> None:
    best, batches = searched(lambda rate, seed: -abs(math.log2(rate)))
    assert best == 1.0
    assert [[trial[:2] for trial in batch] for batch in batches] == [
        [(0.25, 0), (0.5, 0), (1.0, 0), (2.0, 0), (4.0, 0)],
        [(1.0, 1), (0.5, 1), (2.0, 1)],
        [(1.0, 2), (0.5, 2)],
    ]
    assert sum(map(len, batches)) == rate_search.runs_at_least(5, 3)


def test_a_best_at_an_edge_extends_the_range_until_it_is_inside() -> None:
    best, batches = searched(lambda rate, seed: -abs(math.log2(rate / 16)))
    assert best == 16.0
    assert [[trial.rate for trial in batch] for batch in batches[1:4]] == [[8.0], [16.0], [32.0]]
    _, batches = searched(lambda rate, seed: rate)  # ever better: it comes to an end
    assert len({trial.rate for batch in batches for trial in batch}) == 12


def test_a_search_goes_on_with_the_rates_that_were_tried_wherever_it_would_begin_now() -> None:
    _, earlier = searched(lambda rate, seed: -abs(math.log2(rate / 4)), count=3)
    tried = {trial.rate for batch in earlier for trial in batch if trial.seed == 0}
    best, again = searched(lambda rate, seed: -abs(math.log2(rate / 4)), centre=64.0, count=3, known=tried)
    assert best == 4.0
    assert {trial for batch in again for trial in batch} == {trial for batch in earlier for trial in batch}
    first = searched(lambda rate, seed: 0.0, count=3, known=[7.0, 9.0])[1][0]
    assert [trial.rate for trial in first] == [0.5, 1.0, 2.0]


def test_where_no_rate_has_learned_anything_the_loss_extends_the_range() -> None:
    lucky = {1.0: 0.1, 16.0: 1.0}  # a score by chance, in the middle of the first rates
    best, batches = searched(lambda rate, seed: (lucky.get(rate, 0.0), -abs(math.log2(rate / 16))))
    assert best == 16.0
    assert [batch[0].rate for batch in batches[1:4]] == [8.0, 16.0, 32.0]


def test_the_mean_over_seeds_decides() -> None:
    """A rate that leads with the first seed alone loses."""
    best, _ = searched(
        lambda rate, seed: {(1.0, 0): 1.0, (2.0, 0): 0.9}.get((rate, seed), rate / 10 if rate <= 2 else 0)
    )
    assert best == 2.0


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_run_whose_score_or_loss_is_no_number_is_worth_nothing(name) -> None:
    run = record()
    assert rate_search.validation_of(run) is not None
    run["metrics"]["validation"][name] = None  # as JSON has NaN
    assert rate_search.validation_of(run) is None


def test_before_the_end_a_run_is_worth_the_loss_of_the_first_validation_from_there_on() -> None:
    run = record()
    run["history"] = [{"step": 5, "loss": 9.0}] + [{"step": at, "eval_loss": 10.0 - at} for at in (1, 3, 6, 10)]
    run["training"] = {"steps": 10}
    assert rate_search.validation_of(run, QUARTER) == (-7.0, -7.0)
    assert rate_search.validation_of(run | {"status": "paused", "metrics": {}}, QUARTER) == (-7.0, -7.0)
    assert rate_search.validation_of(run | {"status": "paused", "metrics": {}}) is None
    assert rate_search.validation_of(run | {"history": run["history"][:3]}, 0.5) is None


def test_rates_that_fail_go_no_further_and_a_search_of_failures_has_no_best() -> None:
    best, batches = searched(lambda rate, seed: None if rate > 1 else rate)
    assert best == 1.0
    assert all(trial.rate <= 1 for batch in batches[2:] for trial in batch)
    assert searched(lambda rate, seed: None)[0] is None
    assert searched(lambda rate, seed: None if seed else rate / 4 if rate < 4 else 0)[0] is None
