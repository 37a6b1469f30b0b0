"""What runs tell of how reliable their sparsities are."""

from __future__ import annotations

import math

import pytest

from partial_lora.report.statistics import reliability

SPARSITIES = (
    {"a": {"rows": 0.1, "columns": 0.5}, "b": {"rows": 0.9, "columns": 0.3}},
    {"a": {"rows": 0.2, "columns": 0.6}, "b": {"rows": 0.8, "columns": 0.2}},
    {"a": {"rows": 0.9, "columns": 0.1}, "b": {"rows": 0.4, "columns": 0.6}},
)


def record(seed: int, *, method: str = "partial", of_calibration: int | None = None, halves: float = 0) -> dict:
    own = {"spearman_brown": halves} if halves else None
    return {
        "seed": seed,
        "config": {"method": {"name": method}, "calibration": {"seed": of_calibration}},
        "calibration": {"reliability": own},
        "sparsity": SPARSITIES[seed],
    }


def pearson(first: dict, second: dict) -> float:
    xs = [share for axes in first.values() for share in axes.values()]
    ys = [share for axes in second.values() for share in axes.values()]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return above / math.sqrt(sum((a - x) ** 2 for a in xs) * sum((b - y) ** 2 for b in ys))


def test_of_seeds_that_calibrated_for_themselves_it_is_the_mean_over_pairs() -> None:
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(pearson(SPARSITIES[i], SPARSITIES[j]) for i, j in pairs) / 3
    assert reliability(record(seed) for seed in (2, 0, 1)) == pytest.approx(expected)


def test_halves_of_a_draw_go_before() -> None:
    assert reliability([record(0, halves=0.5), record(1, halves=0.7)]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "told_nothing",
    [
        [record(0)],
        [record(seed, of_calibration=0) for seed in (0, 1)],  # one calibration for both
        [record(seed, method="shuffled") for seed in (0, 1)],
        [record(seed) | {"calibration": None} for seed in (0, 1)],
    ],
    ids=["one seed", "a shared calibration", "a control", "no calibration"],
)
def test_what_runs_do_not_tell_is_not_a_number(told_nothing: list[dict]) -> None:
    assert math.isnan(reliability(told_nothing))
