"""Differences that are more than chance: exact small cases, intervals that hold the truth, verdicts, marks."""

from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pandas as pd
import pytest
from recorded_runs import LABEL, leave, rows_of
from refusals import refusal
from sklearn.metrics import matthews_corrcoef

from partial_lora.report import records, statistics, tables
from partial_lora.report.records import Predictions
from partial_lora.report.statistics import bootstrap, compare, per_example, reliability, verdict
from partial_lora.runs.directory import PREDICTIONS


def frame(label, prediction, **columns) -> pd.DataFrame:
    return pd.DataFrame({"label": label, "prediction": prediction} | columns)


def right_or_wrong(label: np.ndarray, right: np.ndarray) -> dict[int, pd.DataFrame]:
    """Predictions of two classes by seed, right where `right` (seeds, examples) is."""
    return {seed: frame(label, np.where(row, label, 1 - label)) for seed, row in enumerate(right)}


def every_draw(differences: np.ndarray) -> dict[float, float]:
    """The bootstrap's distribution, literally: the mean of every way to draw seeds and examples again."""
    seeds, examples = differences.shape
    chances: dict[float, float] = {}
    for runs in product(range(seeds), repeat=seeds):
        for rows in product(range(examples), repeat=examples):
            mean = round(float(np.mean([[differences[run, row] for row in rows] for run in runs])), 9)
            chances[mean] = chances.get(mean, 0) + seeds**-seeds * examples**-examples
    return chances


@pytest.mark.parametrize(
    "differences", [[[1.0, 0.0, -1.0, 0.0]], [[0.5, 0.25, 0.0], [0.5, -1.0, 0.0], [0.0, 0.0, 1.0]]]
)
def test_draws_come_up_as_often_as_in_the_literal_bootstrap(differences) -> None:
    differences = np.array(differences)
    expected, draws = every_draw(differences), 40_000
    values, counts = np.unique(np.round(bootstrap(differences, np.random.default_rng(0), draws), 9), return_counts=True)
    assert set(values) <= set(expected)
    for value, chance in expected.items():
        share = counts[values == value].sum() / draws
        assert share == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / draws) + 1e-9)


def test_draws_are_made_in_parts_that_change_nothing_and_need_little_memory(monkeypatch) -> None:
    differences = np.random.default_rng(0).normal(size=(3, 40))
    whole = bootstrap(differences, np.random.default_rng(1), 50)
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "_COUNTS_AT_ONCE", 7 * 40)
        assert bootstrap(differences, np.random.default_rng(1), 50) == pytest.approx(whole, rel=1e-12)
    differences = np.random.default_rng(0).normal(size=(2, 20_000))
    tracemalloc.start()
    bootstrap(differences, np.random.default_rng(1), 600)  # 12 million counts, 192 MB in one piece
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 80 * 2**20


def test_the_difference_is_that_of_the_metrics_over_the_seeds_both_have() -> None:
    label = [0, 1, 2, 1]
    first = {0: frame(label, [0, 1, 2, 1]), 1: frame(label, [0, 1, 2, 0]), 5: frame(label, [2, 2, 0, 0])}
    second = {0: frame(label, [0, 1, 0, 0]), 1: frame(label, [0, 1, 2, 0]), 7: frame(label, label)}
    comparison = compare(first, second, "accuracy")
    assert comparison.difference == pytest.approx((1 + 3 / 4) / 2 - (2 / 4 + 3 / 4) / 2)
    assert (comparison.seeds, comparison.examples, comparison.reason) == (2, 4, None)
    assert comparison == compare(first, second, "accuracy")
    assert compare(second, first, "accuracy").difference == -comparison.difference
    same = compare(first, first, "accuracy")
    assert (same.difference, same.low, same.high, same.verdict) == (0, 0, 0, "matches")


def experiment(drawn: np.random.Generator, truth: float, seeds: int, examples: int, moved: float) -> list[dict]:
    """Predictions of two methods of which the first is right more often by the truth; seeds move both apart."""
    label, hard = drawn.integers(2, size=examples), drawn.uniform(0.3, 0.9, size=examples)
    sides = [[], []]
    for _ in range(seeds):
        luck, common = drawn.normal(0, moved, size=2), drawn.uniform(size=examples)
        for which, shift in enumerate((truth / 2, -truth / 2)):
            own = np.where(drawn.uniform(size=examples) < 0.5, common, drawn.uniform(size=examples))
            sides[which].append(own < hard + shift + luck[which])
    return [right_or_wrong(label, np.array(side)) for side in sides]


def coverage(seeds: int, moved: float, truth: float = 0.05, repetitions: int = 150) -> float:
    """How often a 95 % interval holds the true difference."""
    drawn = np.random.default_rng(seeds)
    pairs = (experiment(drawn, truth, seeds, 200, moved) for _ in range(repetitions))
    intervals = [compare(*pair, "accuracy", seed=number, draws=1_000) for number, pair in enumerate(pairs)]
    return float(np.mean([each.low <= truth <= each.high for each in intervals]))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    assert coverage(3, moved=0.02) > 0.95
    assert 0.88 <= coverage(10, moved=0.05) <= 0.99
    assert coverage(3, moved=0.1) < 0.93  # too narrow, where few seeds differ much


def test_a_difference_on_the_same_examples_holds_that_would_not_on_others() -> None:
    drawn = np.random.default_rng(1)
    label, right = drawn.integers(2, size=400), drawn.uniform(size=(3, 400)) < 0.7
    better = right.copy()
    better[:, :20] = True
    comparison = compare(right_or_wrong(label, better), right_or_wrong(label, right), "accuracy")
    assert comparison.verdict == "better"
    spread = np.sqrt(2 * 0.7 * 0.3 / 400)  # of two independent accuracies
    assert comparison.high - comparison.low < 2 * 1.96 * spread / 2


def test_one_seed_decides_nothing() -> None:
    label = np.arange(500) % 2
    good, poor = (right_or_wrong(label, [np.arange(500) >= count] * 2) for count in (0, 100))
    alone = compare({0: good[0]}, poor, "accuracy")
    assert alone.low > 0.1
    assert (alone.verdict, alone.reason, alone.seeds) == ("undecided", "one seed", 1)
    two = compare(good, poor, "accuracy")
    assert (two.verdict, two.reason) == ("better", None)


def test_verdicts() -> None:
    assert verdict(0.001, 0.02) == "better"
    assert verdict(-0.0099, 0.002) == "matches"
    assert verdict(-0.0099, -0.002) == "matches"  # worse, but by less than a point
    assert verdict(-0.03, -0.011) == "worse"
    assert verdict(-0.03, 0.01) == "undecided"
    assert verdict(-0.001, 0.001, None) == "undecided"


def test_a_metric_of_all_examples_together_is_computed_in_every_draw_and_less_may_be_better() -> None:
    drawn = np.random.default_rng(0)
    label = drawn.integers(2, size=60)
    good, poor = (right_or_wrong(label, drawn.uniform(size=(2, 60)) < share) for share in (0.95, 0.6))
    comparison = compare(good, poor, "matthews", draws=200)
    means = [np.mean([matthews_corrcoef(label, each["prediction"]) for each in side.values()]) for side in (good, poor)]
    assert comparison.difference == pytest.approx(means[0] - means[1])
    assert comparison.low < comparison.difference < comparison.high
    assert comparison.verdict == "better"
    numbers = drawn.normal(size=60)
    near, far = (
        {seed: frame(numbers, numbers + drawn.normal(0, scale, size=60)) for seed in range(2)} for scale in (0.1, 2.0)
    )
    assert [compare(*pair, "mse").verdict for pair in ((near, far), (far, near))] == ["better", "worse"]
    assert compare(near, far, "mse").difference < 0


def test_examples_count_by_the_columns_that_a_metric_is_computed_from() -> None:
    predicted = frame([0, 1], [0, 0], prediction_norm=[0, 1], rouge_l=[0.5, 0.25])
    assert per_example(predicted, "accuracy").tolist() == [1, 0]
    assert per_example(predicted, "accuracy_norm").tolist() == [1, 1]
    assert per_example(predicted, "rouge_l").tolist() == [0.5, 0.25]
    for frames, metric, names in (
        ([predicted, predicted], "perplexity", "perplexity"),
        ([predicted.assign(member="a")] * 2, "accuracy", "--member"),
        ([predicted, predicted.iloc[::-1]], "accuracy", "different test examples"),
    ):
        with refusal("", names):
            compare({0: frames[0]}, {0: frames[1]}, metric)
    with refusal("", "[0] and [1]"):
        compare({0: predicted}, {1: predicted}, "accuracy")


# Which rows of a table are marked


@pytest.fixture
def results(tmp_path):
    for seed in (0, 1):
        for method, wrong in (("partial", 10), ("targeted", 70), ("lora", 10), ("probe", 11)):
            leave(tmp_path, method, wrong=wrong, seed=seed)
    return tmp_path


def marked(results_dir):
    table = records.group(rows_of(results_dir))
    return table.loc[sorted(statistics.best(table, Predictions(results_dir))), "method"].tolist()


def test_only_a_difference_that_holds_is_marked_and_in_all_files(results):
    assert marked(results) == ["partial"]  # lora is one example better than probe, which does not hold
    rows = rows_of(results)
    best = statistics.best(records.group(rows), Predictions(results))
    markdown, numbers, latex = tables.write(rows, results, command="x", marked=best)
    assert markdown.read_text(encoding="utf-8").count("**95.00 ± 0.00**") == 1
    assert r"\textbf{95.00 $\pm$ 0.00}" in latex.read_text(encoding="utf-8")
    assert pd.read_csv(numbers, comment="#")["best"].sum() == 1


def test_what_is_not_better_than_all_others_of_its_block_is_not_marked(results, tmp_path_factory):
    for seed in (0, 1):
        leave(results, "uniform", wrong=0, seed=seed, trainer__epochs=50.0)
    assert marked(results) == ["partial"]  # uniform is better, and has nothing beside it
    shown = tables.readable(records.group(rows_of(results))).set_index("method")["differs in"]
    assert shown[["uniform", "partial", "lora"]].tolist() == ["epochs=50", "–", "–"]
    for seed in (0, 1):
        leave(results, "flow", wrong=11, seed=seed)  # of partial's own block, and as good
    assert marked(results) == []
    one_seed = tmp_path_factory.mktemp("one_seed")
    for method, wrong in (("partial", 10), ("targeted", 70)):
        leave(one_seed, method, wrong=wrong)
    assert marked(one_seed) == []


def test_without_predictions_of_the_same_examples_none_is_marked(results):
    (folder,) = results.glob("runs/*/*/targeted*/seed1")
    pd.DataFrame({"label": LABEL[:100], "prediction": LABEL[:100]}).to_parquet(folder / PREDICTIONS)
    assert marked(results) == []
    (folder / PREDICTIONS).unlink()
    assert marked(results) == []


# How reliable sparsities are

SPARSITIES = (
    {"a": {"rows": 0.1, "columns": 0.5}, "b": {"rows": 0.9, "columns": 0.3}},
    {"a": {"rows": 0.2, "columns": 0.6}, "b": {"rows": 0.8, "columns": 0.2}},
    {"a": {"rows": 0.9, "columns": 0.1}, "b": {"rows": 0.4, "columns": 0.6}},
)


def calibrated(seed: int, *, method: str = "partial", of_calibration: int | None = None, halves: float = 0) -> dict:
    own = {"spearman_brown": halves} if halves else None
    return {
        "seed": seed,
        "config": {"method": {"name": method}, "calibration": {"seed": of_calibration}},
        "calibration": {"reliability": own},
        "sparsity": SPARSITIES[seed],
    }


def test_reliability_is_of_halves_or_else_the_mean_correlation_of_seeds_that_calibrated_for_themselves() -> None:
    first, second, third = (np.array([[*axes.values()] for axes in each.values()]).ravel() for each in SPARSITIES)
    expected = np.mean([np.corrcoef(*pair)[0, 1] for pair in ((first, second), (first, third), (second, third))])
    assert reliability(calibrated(seed) for seed in (2, 0, 1)) == pytest.approx(expected)
    assert reliability([calibrated(0, halves=0.5), calibrated(1, halves=0.7)]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "silent",
    [
        [calibrated(0)],
        [calibrated(seed, of_calibration=0) for seed in (0, 1)],  # one calibration for both
        [calibrated(seed, method="shuffled") for seed in (0, 1)],
        [calibrated(seed) | {"calibration": None} for seed in (0, 1)],
    ],
    ids=["one seed", "a shared calibration", "a control", "no calibration"],
)
def test_runs_that_tell_nothing_give_no_number(silent: list[dict]) -> None:
    assert np.isnan(reliability(silent))
