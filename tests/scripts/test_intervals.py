"""Coverage of intervals by draws of known truth."""

from __future__ import annotations

import intervals
import numpy as np
import pandas as pd
import pytest
from recorded_runs import leave

from partial_lora.launching.directory import PREDICTIONS
from partial_lora.report.statistics import estimate, mean_squares

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


def test_of_sets_that_differ_random_effects_hold_the_truth() -> None:
    sets = [intervals.fitted((0.0, 0.0, 1e-6), 50, between=0.03)] * 5
    ((held, _),) = intervals.of_all_sets(sets, 3, 100).values()
    assert held == pytest.approx(0.95, abs=0.04)


def test_races_are_those_whose_every_prediction_is_drawn(monkeypatch) -> None:
    """Means, mean squares and their spread over races, with a reference that all forms share, literally."""
    monkeypatch.setattr(intervals, "RACES", 3000)
    generator, (of_seeds, of_examples, left) = np.random.default_rng(1), np.sqrt(np.array(VARIANCES) / 2)
    drawn = []
    for _ in range(300):
        luck, shared = of_seeds * generator.normal(size=(13, 3, 1)), of_examples * generator.normal(size=(13, 1, 40))
        scores = luck + shared + left * generator.normal(size=(13, 3, 40))
        drawn.append([estimate(d) for d in scores[1:] - scores[0]])
    means, *squares = intervals.race(VARIANCES, 40, 3, 0, heavy=False, generator=generator)
    difference, error, _ = intervals.estimates(means, *squares, 40)
    for literal, found in (
        ([[one.difference for one in race] for race in drawn], difference),
        ([[one.error for one in race] for race in drawn], error),
    ):
        literal = np.array(literal)
        assert found.mean() == pytest.approx(literal.mean(), abs=5e-3)
        assert found.std() == pytest.approx(literal.std(), rel=0.1)
        together = [np.corrcoef(each.T)[np.triu_indices(12, 1)].mean() for each in (found, literal)]
        assert together[0] == pytest.approx(together[1], abs=0.1)


def test_an_estimate_of_a_race_is_that_of_its_predictions() -> None:
    d = np.random.default_rng(2).normal(size=(4, 30))
    _, by_example, rest = mean_squares(d)
    squares = (np.array([[each]]) for each in (by_example, rest))
    difference, error, _ = intervals.estimates(d.mean(axis=1)[None, :, None], *squares, 30)
    assert (difference.item(), error.item()) == pytest.approx((estimate(d).difference, estimate(d).error))


def test_forms_that_differ_count_as_nothing_decided_falsely(monkeypatch) -> None:
    monkeypatch.setattr(intervals, "RACES", 200)
    generator = np.random.default_rng(0)
    found = intervals.falsely_decided((1e-12, 1e-12, 1e-12), 40, 8, 12, heavy=False, generator=generator)
    assert set(found.values()) == {0}
    equal = intervals.falsely_decided(VARIANCES, 300, 8, 0, heavy=False, generator=generator)
    assert equal["components, Holm"] < 0.1 < equal["components, uncorrected"]


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


def test_the_table_has_every_interval_for_each_number_of_seeds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(intervals, "RACES", 3)
    for seed in range(8):
        leave(tmp_path, "dense", seed=seed, wrong=20 + seed)
        leave(tmp_path, "partial", seed=seed, wrong=30 + 2 * seed, budget=0.13)
    places = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert intervals.main([*places, "--repetitions", "2"]) == 0
    numbers = pd.read_csv(tmp_path / "out" / "coverage.csv")
    assert len(numbers) == (3 * 2 + 3) * 7  # intervals of kinds of one set, and of five; seeds
    assert numbers["coverage"].between(0, 1).all()
    races = pd.read_csv(tmp_path / "out" / "races.csv")
    assert len(races) == 2 * 2 * 6 * len(intervals.RULES)  # tails, forms that differ, seeds
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".md", ".csv", ".svg"}


def test_records_without_predictions_are_named_in_a_line(tmp_path, capsys) -> None:
    for seed in range(3):
        for method in ("dense", "partial"):
            (leave(tmp_path, method, seed=seed, budget=0.13) / PREDICTIONS).unlink()
    assert intervals.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
