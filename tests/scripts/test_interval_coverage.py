"""Coverage of intervals: draws of known truth, components of known arrays, and the files."""

from __future__ import annotations

import interval_coverage
import numpy as np
import pandas as pd
import power
import pytest
from recorded_runs import leave

from partial_lora.launching.directory import PREDICTIONS


def test_experiments_have_the_truth_and_the_components_that_they_say() -> None:
    generator, population = np.random.default_rng(0), np.random.default_rng(1).normal(1.0, 1.0, size=(4, 6))
    drawn = np.mean([interval_coverage.resampled(population)(generator, 3) for _ in range(4000)])
    assert drawn == pytest.approx(0, abs=0.05)
    assert set(np.round(interval_coverage.resampled(population)(generator, 2) + population.mean(), 9).ravel()) <= set(
        np.round(population, 9).ravel()
    )
    for heavy in (False, True):
        draw = interval_coverage.fitted((0.04, 0.25, 1.0), 400, heavy=heavy)
        found = np.mean([interval_coverage.components(draw(generator, 40)) for _ in range(40)], axis=0)
        assert found == pytest.approx([0.04, 0.25, 1.0], rel=0.35 if heavy else 0.15)
    means = [interval_coverage.fitted((0.0, 0.0, 0.0), 5, between=0.3)(generator, 2).mean() for _ in range(500)]
    assert np.std(means) == pytest.approx(0.3, rel=0.1)


def test_of_sets_that_differ_random_effects_hold_the_truth_and_a_bootstrap_of_those_at_hand_does_not() -> None:
    sets = [interval_coverage.fitted((0.0, 0.0, 1e-6), 50, between=0.03)] * 5
    found = interval_coverage.of_all_sets(sets, 3, 100)
    (components, wide), (bootstrap, narrow) = (found[name] for name in ("components", "bootstrap"))
    assert components == pytest.approx(0.95, abs=0.04)
    assert bootstrap < 0.1
    assert narrow < 0.001 < wide


def test_the_table_has_both_intervals_for_each_number_of_seeds(tmp_path) -> None:
    for seed in range(8):
        leave(tmp_path / "cpu", "lora", seed=seed, wrong=20 + seed)
        leave(tmp_path / "cpu", "partial", seed=seed, wrong=30 + 2 * seed, budget=0.13)
    settings = ["--results", str(tmp_path / "cpu"), "--out", str(tmp_path / "out"), "--repetitions", "2"]
    assert interval_coverage.main(settings) == 0
    numbers = pd.read_csv(tmp_path / "out" / "coverage.csv")
    assert len(numbers) == (3 + 3) * 4 * 2  # kinds of one set, and of five; seeds; intervals
    assert numbers["coverage"].between(0, 1).all()
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".md", ".csv", ".svg"}


@pytest.mark.parametrize("script", [interval_coverage, power])
def test_records_without_predictions_are_named_in_a_line(script, tmp_path, capsys) -> None:
    for seed in range(3):
        for method in ("lora", "partial"):
            (leave(tmp_path / "cpu", method, seed=seed, budget=0.13) / PREDICTIONS).unlink()
    results = tmp_path / "cpu" if script is interval_coverage else tmp_path
    assert script.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "cpu") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
