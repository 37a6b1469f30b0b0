"""Differences that are more than chance: exact small cases, intervals that hold the truth, verdicts, marks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from refusals import refusal
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.multitest import multipletests

from partial_lora.report.pairs import Difference, Outcome, Pair, between
from partial_lora.report.statistics import (
    Estimate,
    by_example,
    by_sides,
    estimate,
    holm,
    judge,
    over_examples,
    over_sets,
    per_example,
)


def frame(label, prediction, **columns) -> pd.DataFrame:
    return pd.DataFrame({"label": label, "prediction": prediction} | columns)


def right_or_wrong(label: np.ndarray, right: np.ndarray) -> dict[int, pd.DataFrame]:
    """Predictions of two classes by seed, right where `right` (seeds, examples) is."""
    return {seed: frame(label, np.where(row, label, 1 - label)) for seed, row in enumerate(right)}


def compare(first: dict, second: dict, metric: str) -> Difference:
    """The difference of two methods' predictions {seed: one row an example}."""

    def side(frames: dict) -> dict[int, Outcome]:
        outcomes = {seed: Outcome(0.0, metric, "", seed, None) for seed in frames}
        for seed, outcome in outcomes.items():
            outcome.__dict__["predictions"] = frames[seed]
        return outcomes

    return between(Pair(side(first), side(second), metric))


def literal_components(d: np.ndarray) -> float:
    """Variance of a mean over seeds and examples, entry by entry."""
    seeds, examples = d.shape
    mean = sum(d[s, j] for s in range(seeds) for j in range(examples)) / (seeds * examples)
    of_seed = [sum(d[s, j] for j in range(examples)) / examples for s in range(seeds)]
    of_example = [sum(d[s, j] for s in range(seeds)) / seeds for j in range(examples)]
    rest = sum((d[s, j] - of_seed[s] - of_example[j] + mean) ** 2 for s in range(seeds) for j in range(examples)) / (
        (seeds - 1) * (examples - 1)
    )
    by_seed = examples * sum((each - mean) ** 2 for each in of_seed) / (seeds - 1)
    by_example = seeds * sum((each - mean) ** 2 for each in of_example) / (examples - 1)
    of = {"seed": max(by_seed - rest, 0) / examples, "example": max(by_example - rest, 0) / seeds, "rest": rest}
    return of["seed"] / seeds + of["example"] / examples + of["rest"] / (seeds * examples)


@pytest.mark.parametrize(
    ("by_seed", "by_example"),
    [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)],
    ids=["both", "examples", "seeds", "none"],
)
def test_the_error_is_that_of_the_components_entry_by_entry(by_seed: float, by_example: float) -> None:
    drawn = np.random.default_rng(3)
    d = by_seed * drawn.normal(size=(4, 1)) + by_example * drawn.normal(size=(1, 9)) + 0.3 * drawn.normal(size=(4, 9))
    if not by_seed:
        d -= d.mean(axis=1, keepdims=True)  # no component is taken for less than zero
    if not by_example:
        d -= d.mean(axis=0, keepdims=True)
    found, variance = estimate(d), literal_components(d)
    assert (found.error**2, found.freedom) == pytest.approx((variance, 3))
    assert found.interval() == pytest.approx(stats.t.interval(0.95, 3, d.mean(), np.sqrt(variance)))


def test_seeds_that_agree_are_not_taken_for_seeds_that_do_not_differ() -> None:
    d = np.random.default_rng(3).normal(size=(3, 400))
    d -= d.mean(axis=1, keepdims=True)  # seeds agree
    two, three = estimate(d[:2]), estimate(d)
    assert (two.freedom, three.freedom) == (1, 2)
    assert two.interval()[1] > 2 * three.interval()[1] > 4 / np.sqrt(1200)


def test_of_parts_seeds_are_lucky_on_all_and_examples_on_one() -> None:
    drawn = np.random.default_rng(4)
    luck = drawn.normal(size=(5, 1))
    alone = estimate(np.repeat(luck, 30, axis=1))  # all examples alike
    both = estimate(np.repeat(luck, 30, axis=1), np.repeat(luck, 8, axis=1))
    assert (both.difference, both.error, both.freedom) == pytest.approx((alone.difference, alone.error, 4))
    assert alone.error == pytest.approx(stats.sem(luck[:, 0]))
    easy = np.repeat(drawn.normal(size=(1, 40)), 5, axis=0)  # all seeds alike
    assert estimate(easy, -easy).error == pytest.approx(estimate(easy).error / np.sqrt(2))
    one_seed = estimate(easy[:1])
    assert (one_seed.error, one_seed.freedom) == pytest.approx((stats.sem(easy[0]), 39))
    assert np.isnan(estimate(np.zeros((1, 1))).interval()).all()


def test_an_interval_touches_a_bound_at_its_significance() -> None:
    found = Estimate(0.01, 0.02, 5.5)
    assert found.interval(1 - found.p(-0.01, -0.01))[0] == pytest.approx(-0.01)
    assert found.interval(1 - found.p(0.05, 0.03))[1] == pytest.approx(0.03)
    assert found.p(0.01, 0.01) == 1
    assert (Estimate(0.0, 0.0, 3).p(-0.01, -0.01), Estimate(0.0, 0.0, 3).p(0, 0)) == (0, 1)
    assert np.isnan(Estimate(0.0, np.nan, 0).p(0, 0))


def test_the_mean_of_sets_is_that_of_paule_and_mandel() -> None:
    differences, errors = np.array([0.5, -0.2, 1.4, 0.3]), np.array([0.2, 0.3, 0.25, 0.5])
    oracle = combine_effects(differences, errors**2, method_re="pm", use_t=True)
    found = over_sets([Estimate(d, e, 9) for d, e in zip(differences, errors, strict=True)])
    known = (oracle.mean_effect_re, oracle.sd_eff_w_re, oracle.df_resid)
    assert (found.difference, found.error, found.freedom) == pytest.approx(known, rel=1e-4)
    alike = over_sets([Estimate(0.1, e, 9) for e in errors])  # not narrower than the errors alone
    assert (alike.difference, alike.error) == pytest.approx((0.1, np.sqrt(1 / sum(1 / errors**2))))
    exact = over_sets([Estimate(d, 0.0, 2) for d in (0.0, 0.4)])
    assert exact.interval() == pytest.approx(stats.t.interval(0.95, 1, 0.2, stats.sem([0.0, 0.4])), rel=1e-4)
    assert np.isnan(over_sets([Estimate(0.1, 0.2, 3)]).interval()).all()


def test_holm_judges_as_statsmodels_does() -> None:
    drawn, counts = np.random.default_rng(5), set()
    for _ in range(60):
        p = drawn.uniform(size=6) ** 6
        p[3] = p[drawn.integers(6)]  # equal ones, too
        fallen = [bool(one <= level) for one, level in zip([*p, np.nan], holm([*p, np.nan]), strict=True)]
        assert fallen == [*multipletests(p, 0.05, "holm")[0], False]
        counts.add(sum(fallen))
    assert counts == {0, 1, 2, 3, 4, 5, 6}


def test_what_is_decided_on_one_side_leaves_no_level_to_the_other() -> None:
    """Thirteen methods that differ by nothing, surely by less than two points: hardly ever is one of them better."""
    drawn, wrong = np.random.default_rng(6), 0
    for _ in range(400):
        found = [Estimate(0.002 * t, 0.002, 30) for t in drawn.standard_t(30, size=13)]
        levels = by_sides(one.sides(0, 0.02) for one in found)
        assert sum(one.ends(level)[1] < 0.02 for one, level in zip(found, levels, strict=True)) >= 12
        wrong += any(one.ends(level)[0] > 0 for one, level in zip(found, levels, strict=True))
    assert wrong <= 0.05 * 400


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.02, "better"),
        (-0.0099, 0.002, "matches"),
        (-0.0099, -0.002, "matches"),  # worse, but by less than a point
        (-0.03, -0.011, "worse"),
        (-0.03, 0.01, "undecided"),
    ],
)
def test_verdicts(low: float, high: float, said: str) -> None:
    found = Estimate((low + high) / 2, (high - low) / 2 / stats.t.ppf(0.975, 6), 6)
    assert judge(found, "accuracy", 2) == said


def test_a_metric_of_all_examples_together_counts_by_what_it_loses_without_each_and_less_may_be_better() -> None:
    drawn = np.random.default_rng(0)
    label = drawn.integers(2, size=60)
    good, poor = (right_or_wrong(label, drawn.uniform(size=(3, 60)) < share) for share in (0.95, 0.6))
    comparison = compare(good, poor, "matthews")
    means = [np.mean([matthews_corrcoef(label, each["prediction"]) for each in side.values()]) for side in (good, poor)]
    assert comparison.difference == pytest.approx(means[0] - means[1])
    assert comparison.low < comparison.difference < comparison.high
    assert comparison.verdict == "better"
    output = poor[0]["prediction"].to_numpy()
    without = [matthews_corrcoef(np.delete(label, j), np.delete(output, j)) for j in range(60)]
    pseudo = 60 * matthews_corrcoef(label, output) - 59 * np.array(without)
    own = per_example(poor[0], "matthews")
    assert own - own.mean() == pytest.approx(pseudo - pseudo.mean())
    assert own.mean() == pytest.approx(matthews_corrcoef(label, output))
    numbers = drawn.normal(size=60)
    output = numbers + drawn.normal(size=60)
    without = [np.corrcoef(np.delete(numbers, j), np.delete(output, j))[0, 1] for j in range(60)]
    pseudo = 60 * np.corrcoef(numbers, output)[0, 1] - 59 * np.array(without)
    own = per_example(frame(numbers, output), "pearson")
    assert own - own.mean() == pytest.approx(pseudo - pseudo.mean())
    assert own.mean() == pytest.approx(np.corrcoef(numbers, output)[0, 1])
    assert per_example(frame(numbers, np.zeros(60)), "pearson").tolist() == [0] * 60  # a constant says nothing
    near, far = (
        {seed: frame(numbers, numbers + drawn.normal(0, scale, size=60)) for seed in range(3)} for scale in (0.1, 2.0)
    )
    assert [compare(*pair, "mse").verdict for pair in ((near, far), (far, near))] == ["better", "worse"]
    assert compare(near, far, "mse").difference < 0


def test_examples_count_by_the_columns_that_a_metric_is_computed_from() -> None:
    predicted = frame([0, 1], [0, 0], prediction_norm=[0, 1], rouge_l=[0.5, 0.25])
    assert per_example(predicted, "accuracy").tolist() == [1, 0]
    assert per_example(predicted, "accuracy_norm").tolist() == [1, 1]
    assert per_example(predicted, "rouge_l").tolist() == [0.5, 0.25]
    responses = frame(["a", "b"], ["", ""], loss=[1.0, 3.0], tokens=[3.0, 1.0])
    assert per_example(responses, "loss").mean() == pytest.approx(6 / 4)  # over tokens, not responses
    assert per_example(responses, "perplexity").mean() == pytest.approx(math.exp(6 / 4))
    longer = frame(["a", "b"], ["", ""], loss=[1.0, 3.0 + 1e-6], tokens=[3.0, 1.0])
    slope = (math.exp(6.000001 / 4) - math.exp(6 / 4)) / 1e-6
    assert by_example([longer], [responses], "perplexity").mean() == pytest.approx(1e-6 * slope)
    for frames, metric, names in (
        ([predicted, predicted], "perplexity", "perplexity"),
        ([predicted.assign(member="a")] * 2, "accuracy", "--member"),
        ([predicted, predicted.iloc[::-1]], "accuracy", "different test examples"),
    ):
        with refusal("", names):
            by_example([frames[0]], [frames[1]], metric)
    with refusal("", "seed"):
        compare({0: predicted}, {1: predicted}, "accuracy")


def test_no_interval_is_wider_than_its_metric_or_a_difference_of_it() -> None:
    numbers = np.arange(6.0)
    low, high = over_examples(frame(numbers, np.array([0, 1, 2, 3, 4, 9.0])), "pearson")
    assert -1 <= low < high == 1
    right = {seed: frame([0, 1] * 5, [0, 1] * 5) for seed in range(2)}
    wrong = {seed: frame([0, 1] * 5, np.array([0, seed] * 5)) for seed in range(2)}
    found = compare(right, wrong, "accuracy")
    assert found.difference == 0.25
    assert (found.low, found.high) == (-1, 1)  # of two seeds: t is 12.7


def test_the_macro_f1_of_classes_that_do_not_all_occur_has_the_interval_of_the_macro_f1() -> None:
    logits = np.random.default_rng(0).normal(size=(60, 3)) * [1, 1, 0] - [0, 0, 9]
    predicted = frame(np.arange(60) % 2, logits.argmax(1), logits=list(logits))
    assert over_examples(pa.Table.from_pandas(predicted), "f1") == over_examples(predicted, "f1")
    assert over_examples(predicted.drop(columns="logits"), "f1") != over_examples(predicted, "f1")
    assert over_examples(None, "f1") is None
