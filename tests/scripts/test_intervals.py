"""Coverage of intervals by draws of known truth, power against simulation, and steps of literal histories."""

from __future__ import annotations

import json

import intervals
import numpy as np
import pandas as pd
import pytest
from checkout import RESULTS, needs_results
from intervals import fitted
from recorded_runs import leave

from partial_lora.launching.directory import PREDICTIONS
from partial_lora.launching.packs import RUNS_TABLE
from partial_lora.report.statistics import estimate

VARIANCES = (0.02**2, 0.1**2, 0.3**2)


def test_experiments_have_the_truth_and_the_components_that_they_say() -> None:
    generator, population = np.random.default_rng(0), np.random.default_rng(1).normal(1.0, 1.0, size=(4, 6))
    drawn = np.mean([intervals.resampled(population)(generator, 3) for _ in range(4000)])
    assert drawn == pytest.approx(0, abs=0.05)
    assert set(np.round(intervals.resampled(population)(generator, 2) + population.mean(), 9).ravel()) <= set(
        np.round(population, 9).ravel()
    )
    for heavy in (False, True):
        draw = intervals.fitted((0.04, 0.25, 1.0), 400, heavy=heavy)
        found = np.mean([intervals.components(draw(generator, 40)) for _ in range(40)], axis=0)
        assert found == pytest.approx([0.04, 0.25, 1.0], rel=0.35 if heavy else 0.15)
    means = [intervals.fitted((0.0, 0.0, 0.0), 5, between=0.3)(generator, 2).mean() for _ in range(500)]
    assert np.std(means) == pytest.approx(0.3, rel=0.1)


def test_of_sets_that_differ_random_effects_hold_the_truth_and_a_bootstrap_of_those_at_hand_does_not() -> None:
    sets = [intervals.fitted((0.0, 0.0, 1e-6), 50, between=0.03)] * 5
    found = intervals.of_all_sets(sets, 3, 100)
    (components, wide), (bootstrap, narrow) = (found[name] for name in ("components", "bootstrap"))
    assert components == pytest.approx(0.95, abs=0.04)
    assert bootstrap < 0.1
    assert narrow < 0.001 < wide


def test_the_table_has_both_intervals_for_each_number_of_seeds(tmp_path) -> None:
    for seed in range(8):
        leave(tmp_path / "cpu", "lora", seed=seed, wrong=20 + seed)
        leave(tmp_path / "cpu", "partial", seed=seed, wrong=30 + 2 * seed, budget=0.13)
    places = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert intervals.main(["coverage", *places, "--repetitions", "2"]) == 0
    numbers = pd.read_csv(tmp_path / "out" / "coverage.csv")
    assert len(numbers) == (3 + 3) * 4 * 2  # kinds of one set, and of five; seeds; intervals
    assert numbers["coverage"].between(0, 1).all()
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".md", ".csv", ".svg"}


@pytest.mark.parametrize("what", ["coverage", "power"])
def test_records_without_predictions_are_named_in_a_line(what: str, tmp_path, capsys) -> None:
    for seed in range(3):
        for method in ("lora", "partial"):
            (leave(tmp_path / "cpu", method, seed=seed, budget=0.13) / PREDICTIONS).unlink()
    assert intervals.main([what, "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "cpu") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_power_is_how_often_simulated_intervals_lie_above_the_margin() -> None:
    draw, generator = fitted(VARIANCES, 300), np.random.default_rng(0)
    found = [estimate(draw(generator, 6)) for _ in range(600)]
    above = np.mean([one.interval()[0] > -0.03 for one in found])
    assert intervals.power(VARIANCES, 300, 6, 0.03, 0.05) == pytest.approx(above, abs=0.07)
    expected, _ = intervals.error(VARIANCES, 300, 6)
    assert expected == pytest.approx(np.std([one.difference for one in found]), rel=0.1)


def test_the_seeds_needed_are_the_fewest_with_enough_power() -> None:
    few, more = (intervals.needed(VARIANCES, 300, margin, 0.05) for margin in (0.04, 0.02))
    assert few < more
    assert (
        intervals.power(VARIANCES, 300, few, 0.04, 0.05) >= 0.8 > intervals.power(VARIANCES, 300, few - 1, 0.04, 0.05)
    )
    assert intervals.needed(VARIANCES, 300, 0.04, 0.05 / 12) > few
    assert intervals.needed((0.5**2, 0.1, 0.1), 300, 0.01, 0.05) is None


def test_a_set_has_stopped_where_the_last_quarter_of_its_longest_runs_gained_less_than_a_point(tmp_path) -> None:
    for name, steps, last in (("cpu", 8, 0.9), ("longer", 16, 0.805)):
        folder = leave(tmp_path / name, "lora", wrong=20)
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        points = {steps // 2: 0.7, 3 * steps // 4: 0.8, steps: last}
        record["history"] = [{"step": step, "eval_accuracy": value} for step, value in points.items()]
        (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    (row,) = intervals.steps_by_set([tmp_path / "cpu", tmp_path / "longer"]).to_dict("records")
    assert (row["steps"], row["gain"], row["stopped"]) == (16, pytest.approx(0.005), True)


def test_where_one_source_varies_the_degrees_of_freedom_are_its_own() -> None:
    assert intervals.error((1.0, 0.0, 1e-9), 300, 6)[1] == pytest.approx(5, rel=1e-3)
    assert intervals.error((0.0, 1.0, 1e-9), 300, 6)[1] == pytest.approx(299, rel=1e-3)


@needs_results
@pytest.mark.parametrize("task", ["digits", "gtsrb", "sst2", "trec"])
def test_the_test_rows_that_are_counted_with_are_those_of_the_runs(task: str) -> None:
    runs = pd.read_parquet(RESULTS / "decided" / RUNS_TABLE, columns=["task", "examples"])
    assert set(runs[runs["task"] == task]["examples"]) == {intervals.TEST_ROWS[task]}
