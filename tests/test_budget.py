from __future__ import annotations

import random

import pytest

from partial_lora.budget import dense_parameters, kept_parameters, largest, meet, parameter_count, scaled, shrunk
from partial_lora.errors import PartialLoraError
from partial_lora.masks import kept_count

VIT = {
    f"blocks.{block}.{name}": shape
    for block in range(12)
    for name, shape in {
        "attn.qkv": (1152, 384),
        "attn.proj": (384, 384),
        "mlp.fc1": (1536, 384),
        "mlp.fc2": (384, 1536),
    }.items()
}
SMALL = {"a": (12, 8), "b": (30, 7), "c": (5, 5)}


def some_sparsity(shapes, seed):
    drawn = random.Random(seed)
    return {module: {axis: drawn.randrange(20) / 20 for axis in ("rows", "columns")} for module in shapes}


def densities(shapes, sparsity):
    return [1 - sparsity[module][axis] for module in shapes for axis in ("rows", "columns")]


def test_parameters_are_counted_by_hand():
    assert dense_parameters(SMALL, 4) == 4 * (20 + 37 + 10)
    sparsity = {
        "a": {"rows": 0.5, "columns": 0.9},  # 6 + 1
        "b": {"rows": 0.95, "columns": 0.0},  # 2 (1.5 rounds up) + 7
        "c": {"rows": 0.99, "columns": 0.5},  # 1 + 3 (2.5 rounds up)
    }
    assert kept_parameters(SMALL, 4, sparsity) == 4 * (6 + 1 + 2 + 7 + 1 + 3)
    assert kept_parameters(SMALL, 4, 0.0) == dense_parameters(SMALL, 4)
    assert kept_parameters(SMALL, 4, 0.5) == 4 * (6 + 4 + 15 + 4 + 3 + 3)


def test_a_budget_is_a_share_or_a_count():
    assert parameter_count(0.5, SMALL, 4) == 134
    assert parameter_count(1, SMALL, 4) == parameter_count(268, SMALL, 4) == 268
    assert parameter_count(0.13, VIT, 16) == int(0.13 * dense_parameters(VIT, 16))
    assert parameter_count(24, SMALL, 4) == 24
    for budget in (23, 0.05, 269):
        with pytest.raises(PartialLoraError, match=r"calibration.budget="):
            parameter_count(budget, SMALL, 4)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shapes", [VIT, SMALL])
def test_scaled_densities_spend_the_count_and_stay_in_proportion(shapes, seed):
    sparsity = some_sparsity(shapes, seed)
    rank = 4
    share = random.Random(seed).uniform(0.1, 1)
    count = int(share * dense_parameters(shapes, rank))
    found = scaled(sparsity, shapes, rank, count)
    assert count - rank < kept_parameters(shapes, rank, found) <= count

    sizes = [size for shape in shapes.values() for size in shape]
    before, after = densities(shapes, sparsity), densities(shapes, found)
    free = [i for i in range(len(sizes)) if after[i] * sizes[i] > 1.5 and after[i] < 1]
    factors = [((after[i] * sizes[i] - 1.01) / sizes[i], (after[i] * sizes[i] + 1.01) / sizes[i]) for i in free]
    low = max((bounds[0] / before[i] for i, bounds in zip(free, factors, strict=True)), default=0)
    high = min((bounds[1] / before[i] for i, bounds in zip(free, factors, strict=True)), default=1)
    assert low <= high  # one factor explains every density that is neither 1 nor a single row


def test_scaling_fills_up_to_the_dense_adapter():
    sparsity = some_sparsity(SMALL, 0)
    found = scaled(sparsity, SMALL, 4, dense_parameters(SMALL, 4))
    assert all(value == 0 for axes in found.values() for value in axes.values())


def test_scaled_sparsities_are_those_that_masks_measure():
    found = scaled(some_sparsity(VIT, 1), VIT, 16, 200_000)
    for module, shape in VIT.items():
        for axis, size in zip(("rows", "columns"), shape, strict=True):
            assert 1 - kept_count(size, found[module][axis]) / size == found[module][axis]


@pytest.mark.parametrize("limit", [0.0, 0.123, 0.5, 0.9999])
def test_the_largest_threshold_is_found(limit):
    asked = []

    def fits(threshold):
        asked.append(threshold)
        return threshold <= limit

    assert largest(fits, 0.0) == pytest.approx(limit, abs=1e-6)
    assert largest(fits, 0.0) <= limit
    assert len(asked) < 60
    assert largest(lambda threshold: True, 0.3) == 1
    assert largest(lambda threshold: False, 0.3) == 0.3


def chosen_at(threshold):
    """The higher the threshold the denser, in steps."""
    return {module: dict.fromkeys(("rows", "columns"), min(0.95, 0.05 * int(20 * (1 - threshold)))) for module in VIT}


@pytest.mark.parametrize("share", [0.07, 0.13, 0.5, 0.62, 0.9, 1.0])
@pytest.mark.parametrize("lowest", [0.0, 0.1, 0.8, 1.3])
def test_a_budget_is_met_from_below_to_within_a_hundredth(share, lowest):
    dense = dense_parameters(VIT, 16)
    count = int(share * dense)
    threshold, found = meet(count, VIT, 16, chosen_at, lowest)
    assert min(lowest, 1) <= threshold <= 1
    assert 0.99 * count <= kept_parameters(VIT, 16, found) <= count
    if kept_parameters(VIT, 16, chosen_at(min(lowest, 1))) <= count:
        above = chosen_at(min(1.0, threshold + 2e-6))
        assert threshold == 1 or kept_parameters(VIT, 16, above) > count
    else:
        assert threshold == min(lowest, 1)


def test_a_threshold_that_spends_the_budget_is_taken_as_it_is():
    count = kept_parameters(VIT, 16, chosen_at(0.62))
    _, found = meet(count, VIT, 16, chosen_at)
    assert found == chosen_at(0.62)


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_shrunk_densities_are_geometric_means_with_one_density_at_the_same_size(shrink):
    sparsity = {
        module: {axis: drawn.choice((0.5, 0.75, 0.9, 0.95)) for axis in ("rows", "columns")}
        for drawn in (random.Random(0),)
        for module in VIT
    }
    found, count = shrunk(sparsity, VIT, 16, shrink), kept_parameters(VIT, 16, sparsity)
    assert count - 16 < kept_parameters(VIT, 16, found) <= count
    whole = {(m, axis): size for m, shape in VIT.items() for axis, size in zip(("rows", "columns"), shape, strict=True)}

    def literally(even: float) -> dict:
        return {(m, axis): (1 - sparsity[m][axis]) * (even / (1 - sparsity[m][axis])) ** shrink for m, axis in whole}

    low, high = 0.0, 1.0  # the one density that spends the budget
    for _ in range(60):
        even = (low + high) / 2
        spent = 16 * sum(whole[place] * density for place, density in literally(even).items())
        low, high = (even, high) if spent < count and shrink else (low, even)
    for (module, axis), density in literally(even).items():
        assert 1 - found[module][axis] == pytest.approx(density, abs=2 / whole[module, axis] + 0.02 * density)


def test_shrinking_past_the_middle_turns_the_order_round_and_keeps_ties():
    sparsity = {"a": {"rows": 0.5, "columns": 0.95}, "b": {"rows": 0.95, "columns": 0.75}}
    shapes = {"a": (4000, 4000), "b": (4000, 4000)}
    found = shrunk(sparsity, shapes, 1, 2.0)
    (a_rows, a_columns), (b_rows, b_columns) = ((1 - axes["rows"], 1 - axes["columns"]) for axes in found.values())
    assert a_columns == pytest.approx(b_rows, abs=1e-3)
    assert (a_columns / a_rows, b_rows / b_columns) == pytest.approx((0.5 / 0.05, 0.25 / 0.05), rel=0.02)
