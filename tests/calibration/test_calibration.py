from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scored_models import TARGETS, Counted, Named, full_accuracy, scored_draw, tiny_vit, with_zeroed
from torch import nn

from partial_lora import calibrate
from partial_lora.calibration.budget import kept_parameters
from partial_lora.calibration.search import bisect, passes, scan, sparsity_levels

BLOCKS = "vit.blocks"
LEVELS = [round(0.05 * number, 2) for number in range(1, 20)]


# The literal twin: every level of every module and axis by a full pass over a copy of the model.


@pytest.fixture(scope="module")
def twin():
    model = Named(tiny_vit())
    batches = scored_draw(model)
    names = [f"vit.blocks.{block}.{target}" for block in range(3) for target in TARGETS]
    curves = {
        (name, axis): [full_accuracy(with_zeroed(model, [(name, axis, level)]), batches) for level in LEVELS]
        for name in names
        for axis in ("rows", "columns")
    }
    return full_accuracy(model, batches), curves


def scanned(curve, needed):
    sparsity = 0.0
    for level, value in zip(LEVELS, curve, strict=True):
        if value < needed - 1e-9:
            return sparsity
        sparsity = level
    return sparsity


def bisected(curve, needed):
    alive, dead = -1, len(LEVELS)
    while dead - alive > 1:
        middle = (alive + dead) // 2
        alive, dead = (middle, dead) if curve[middle] >= needed - 1e-9 else (alive, middle)
    return LEVELS[alive] if alive >= 0 else 0.0


@pytest.mark.parametrize("search", ["scan", "bisect"])
@pytest.mark.parametrize("threshold", [0.9, 0.6])
@pytest.mark.parametrize("bounded", [True, False])
def test_calibration_against_the_literal_twin(model, batches, score, twin, search, threshold, bounded):
    baseline, curves = twin
    found = calibrate(
        model,
        score if bounded else Counted(batches),
        target_modules=TARGETS,
        threshold=threshold,
        search=search,
    )
    read = scanned if search == "scan" else bisected
    expected: dict = {}
    for (name, axis), curve in curves.items():
        expected.setdefault(name, {})[axis] = read(curve, threshold * baseline)
    assert found.sparsity == expected
    assert list(found.sparsity) == list(expected)
    assert found.baseline == baseline
    cuts = [(name, axis, level) for name, axes in expected.items() for axis, level in axes.items()]
    assert found.joint == full_accuracy(with_zeroed(model, cuts), batches)
    for name, axes in found.modules.items():
        for axis, entry in axes.items():
            for level, value in entry["curve"]:
                low, high = value if isinstance(value, list) else (value, value)
                assert low <= curves[name, axis][LEVELS.index(level)] <= high
    assert (found.threshold, found.search, found.cached) == (threshold, search, False)


def test_the_searches_differ_where_a_curve_is_not_monotone(twin):
    baseline, curves = twin
    differing = [scanned(curve, 0.9 * baseline) != bisected(curve, 0.9 * baseline) for curve in curves.values()]
    assert any(differing)  # so that the twin can tell one search from the other
    survivors = {0.1, 0.2, 0.4, 0.5}
    assert scan(survivors.__contains__, [0.1, 0.2, 0.3, 0.4, 0.5]) == 0.2
    assert bisect({0.1, 0.2, 0.3, 0.4}.__contains__, [0.1, 0.2, 0.3, 0.4, 0.5]) == 0.4
    for search in (scan, bisect):
        assert search(lambda level: False, [0.1, 0.2]) == 0
        assert search(lambda level: True, [0.1, 0.2]) == 0.2
        assert search(lambda level: True, []) == 0


def test_what_passes():
    assert passes(0.18, baseline=0.2, threshold=0.9)  # 0.9 * 0.2 > 0.18 in floating point
    assert not passes(0.18 - 1e-8, baseline=0.2, threshold=0.9)
    assert passes(-0.5, baseline=-0.45, threshold=0.9)  # a loss may grow by a tenth of the new one
    assert not passes(-0.51, baseline=-0.45, threshold=0.9)
    assert not passes(-0.4, baseline=0.3, threshold=0.9)


def test_levels_are_multiples_of_the_step():
    assert sparsity_levels(0.05, 0.95) == LEVELS
    assert sparsity_levels(0.1, 0.35) == [0.1, 0.2, 0.3]
    assert sparsity_levels(0.3, 0.9) == [0.3, 0.6, 0.9]
    assert sparsity_levels(0.2, 0.0) == []


def test_negative_scores_are_losses(model, batches):
    def minus_loss(model):
        with torch.no_grad():
            return -sum(
                float(nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])) for batch in batches
            )

    baseline = minus_loss(model)
    found = calibrate(model, minus_loss, target_modules=["mlp.fc1"], threshold=0.8, levels=0.2, max_sparsity=0.8)
    kept = [sparsity for axes in found.sparsity.values() for sparsity in axes.values()]
    assert 0 < np.mean(kept) < 0.8
    for name, axes in found.sparsity.items():
        for axis, sparsity in axes.items():
            levels = [level for level in (0.2, 0.4, 0.6, 0.8) if level <= sparsity + 0.2]
            survives = [minus_loss(with_zeroed(model, [(name, axis, level)])) >= baseline / 0.8 for level in levels]
            assert survives == [level <= sparsity for level in levels]


def test_prefix_reuse_and_bounds_save_most_of_the_work(model, batches, score):
    plain = calibrate(model, Counted(batches), target_modules=TARGETS)
    found = calibrate(model, score, target_modules=TARGETS)
    assert found.evaluations == plain.evaluations == score.evaluations.passes
    full = plain.evaluations * len(model.vit.blocks) * len(batches)
    assert score.evaluations.blocks < 0.65 * full


# Budgets


def highest_threshold(twin, shapes, rank, count):
    """The literal twin: every threshold at which anything changes, from high to low."""
    baseline, curves = twin
    for needed in sorted({value for curve in curves.values() for value in curve} | {baseline}, reverse=True):
        sparsity: dict = {}
        for (name, axis), curve in curves.items():
            sparsity.setdefault(name, {})[axis] = scanned(curve, needed)
        if needed <= baseline and kept_parameters(shapes, rank, sparsity) <= count:
            return needed / baseline, sparsity
    raise AssertionError("none")


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_the_largest_threshold_that_meets_it(model, batches, score, twin, budget):
    found = calibrate(model, score, target_modules=TARGETS, budget=budget, rank=4, chance=0.0)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in found.sparsity}
    count = math.floor(budget * 4 * sum(map(sum, shapes.values())))
    threshold, sparsity = highest_threshold(twin, shapes, 4, count)
    assert found.threshold == pytest.approx(threshold, abs=2e-6)
    spent = kept_parameters(shapes, 4, found.sparsity)
    assert 0.99 * count <= spent <= count
    if kept_parameters(shapes, 4, sparsity) >= 0.99 * count:
        assert found.sparsity == sparsity
    assert found.scaled == (found.sparsity != sparsity)
    assert found.budget == budget
    assert score.evaluations.examples <= (found.evaluations + 60) * score.size
    cuts = [(name, axis, level) for name, axes in found.sparsity.items() for axis, level in axes.items()]
    assert found.joint == full_accuracy(with_zeroed(model, cuts), batches)


def test_a_budget_never_follows_scores_below_chance(model, batches, score, twin):
    baseline, curves = twin
    chance = 0.8 * baseline
    found = calibrate(model, score, target_modules=TARGETS, budget=0.2, chance=chance)
    assert found.threshold == pytest.approx(0.8)
    assert found.scaled
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in found.sparsity}
    densities, scaled = [], []
    for (name, axis), curve in curves.items():
        densities.append(1 - scanned(curve, chance))
        scaled.append(1 - found.sparsity[name][axis])
        size = shapes[name][axis == "columns"]
        scaled[-1] = (scaled[-1] * size - 1, scaled[-1] * size + 1)
        densities[-1] *= size
    factor = 0.2 * 16 * sum(map(sum, shapes.values())) / (16 * sum(densities))
    assert all(low <= factor * kept <= high for kept, (low, high) in zip(densities, scaled, strict=True))
    assert 0.99 * 0.2 <= kept_parameters(shapes, 1, found.sparsity) / sum(map(sum, shapes.values())) <= 0.2
