"""Coverage of intervals by draws of known truth."""

from __future__ import annotations

import intervals
import numpy as np
import pandas as pd
import pytest
from recorded_runs import leave

from partial_lora.launching.directory import PREDICTIONS


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


def test_of_sets_that_differ_random_effects_hold_the_truth() -> None:
    sets = [intervals.fitted((0.0, 0.0, 1e-6), 50, between=0.03)] * 5
    ((held, _),) = intervals.of_all_sets(sets, 3, 100).values()
    assert held == pytest.approx(0.95, abs=0.04)


def test_pairs_are_of_forms_at_one_size_and_condition_each_at_its_best_rate(tmp_path) -> None:
    for seed in range(3):
        leave(tmp_path, "dense", seed=seed, wrong=20)
        leave(tmp_path, "dense", seed=seed, wrong=60, trainer__learning_rate=0.1)
        leave(tmp_path, "partial", seed=seed, wrong=30 + seed, budget=0.13)
        leave(tmp_path, "lora", seed=seed, wrong=40, budget=0.13) if seed < 2 else None
        for id, other in {"y": {"task__label_noise": 0.4}, "z": {"importance__name": "snip"}}.items():
            leave(tmp_path, "partial", seed=seed, wrong=50, budget=0.13, id=id, **other)
        leave(tmp_path, "uniform", seed=seed, wrong=50)
        leave(tmp_path, seed=seed, members={"digits": 3, "gtsrb": 4}, budget=0.13)
    found = intervals.differences(tmp_path)
    assert list(found) == ["digits"]
    (d,) = found["digits"]
    assert d.shape == (3, 200)
    assert sorted(np.abs(d.mean(axis=1))) == pytest.approx([0.05, 0.055, 0.06])


def test_the_five_sets_are_named_whatever_other_sets_there_are() -> None:
    generator = np.random.default_rng(4)
    own, other = ([generator.normal(size=(3, 20))] for _ in range(2))
    alone, beside = (
        intervals.simulate(every, 2)[0].query("set == @intervals.FIVE").reset_index(drop=True)
        for every in ({"trec": own}, {"cifar10": other, "trec": own})
    )
    assert len(alone) == 3 * 7
    pd.testing.assert_frame_equal(alone, beside)


def test_the_table_has_every_interval_for_each_number_of_seeds(tmp_path) -> None:
    for seed in range(8):
        leave(tmp_path, "dense", seed=seed, wrong=20 + seed)
        leave(tmp_path, "partial", seed=seed, wrong=30 + 2 * seed, budget=0.13)
    places = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert intervals.main([*places, "--repetitions", "2"]) == 0
    numbers = pd.read_csv(tmp_path / "out" / "coverage.csv")
    assert len(numbers) == (3 * 2 + 3) * 7  # intervals of kinds of one set, and of five; seeds
    assert numbers["coverage"].between(0, 1).all()
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".md", ".csv"}


def test_records_without_predictions_are_named_in_a_line(tmp_path, capsys) -> None:
    for seed in range(3):
        for method in ("dense", "partial"):
            (leave(tmp_path, method, seed=seed, budget=0.13) / PREDICTIONS).unlink()
    assert intervals.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
