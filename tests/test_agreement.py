"""Agreement of subnetworks: Jaccard by sets, chance by every pair of subsets there is."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
import torch

from partial_lora import agreement
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask


def by_sets(first, second) -> float:
    return len(set(first) & set(second)) / len(set(first) | set(second))


def mask(size: int, kept) -> Mask:
    return Mask(size, np.asarray(sorted(kept)))


@pytest.mark.parametrize(
    ("first", "second"), [((0, 1), (1, 2)), ((0,), (4,)), ((0, 3, 4), (0, 3, 4)), ((2,), range(5))]
)
def test_jaccard_is_that_of_the_sets(first, second) -> None:
    found = agreement.jaccard(mask(5, first), mask(5, second))
    assert found == by_sets(first, second)
    assert found == agreement.jaccard(mask(5, second), mask(5, first))


def test_masks_of_different_sizes_are_refused() -> None:
    with pytest.raises(PartialLoraError, match="over 5 and 6 entries"):
        agreement.jaccard(mask(5, [0]), mask(6, [0]))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_chance_is_the_mean_over_every_pair_of_subsets(size) -> None:
    for first in range(1, size + 1):
        for second in range(1, size + 1):
            pairs = [
                by_sets(one, other)
                for one in combinations(range(size), first)
                for other in combinations(range(size), second)
            ]
            assert agreement.jaccard_by_chance(size, first, second) == pytest.approx(fmean(pairs), abs=1e-12)


def test_chance_of_large_masks_is_what_random_masks_have() -> None:
    size, first, second = 1536, 400, 900
    generator = np.random.default_rng(0)
    drawn = [by_sets(generator.permutation(size)[:first], generator.permutation(size)[:second]) for _ in range(400)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert agreement.jaccard_by_chance(size, first, second) == pytest.approx(fmean(drawn), abs=4 * error)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 5), (-1, 2)])
def test_impossible_sizes_are_refused(first, second) -> None:
    with pytest.raises(PartialLoraError, match="expected from 1 to 4 kept"):
        agreement.jaccard_by_chance(4, first, second)


def scores(*pairs) -> dict:
    return {f"m{index}": tuple(torch.tensor(values) for values in pair) for index, pair in enumerate(pairs)}


UP, DOWN = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]


def test_every_two_measures_are_compared_at_the_common_sparsity() -> None:
    measures = {"up": scores((UP, UP)), "down": scores((DOWN, UP)), "again": scores((UP, DOWN))}
    found = agreement.compared(measures, {"m0": {"rows": 0.5, "columns": 0.25}})
    assert [(line["first"], line["second"], line["axis"]) for line in found] == [
        (*pair, axis) for pair in (("up", "down"), ("up", "again"), ("down", "again")) for axis in ("rows", "columns")
    ]
    # Of 4 rows 2 are kept, of 4 columns 3: opposite orders share none of two, and two of three.
    assert [line["jaccard"] for line in found] == [0.0, 1.0, 1.0, 0.5, 0.0, 0.5]
    assert [line["kept"] for line in found] == [2, 3] * 3
    assert found[0]["chance"] == pytest.approx((1 + 4 / 3) / 6)  # 1 of 6 pairs equal, 4 share one of three


def test_what_is_kept_whole_does_not_enter_the_summary() -> None:
    measures = {"up": scores((UP, UP)), "down": scores((DOWN, DOWN))}
    comparisons = agreement.compared(measures, {"m0": {"rows": 0.5, "columns": 0.0}})
    (line,) = agreement.summary(comparisons)
    chance = agreement.jaccard_by_chance(4, 2, 2)
    assert (line["n"], line["whole"], line["jaccard"]) == (1, 1, 0.0)
    assert line["chance"] == pytest.approx(chance)
    assert line["beyond_chance"] == pytest.approx(-chance / (1 - chance))
    (nothing,) = agreement.summary(agreement.compared(measures, {"m0": {"rows": 0.0, "columns": 0.0}}))
    assert (nothing["n"], nothing["jaccard"], nothing["beyond_chance"]) == (0, None, None)


def test_beyond_chance_is_one_for_equal_and_about_zero_for_random_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {f"m{index}": (torch.rand(64, generator=generator), torch.rand(96, generator=generator)) for index in range(60)}
        for _ in range(2)
    )
    sparsity = {module: {"rows": 0.5, "columns": 0.75} for module in first}
    same, other = (
        agreement.summary(agreement.compared({"a": first, "b": second}, sparsity))[0]["beyond_chance"]
        for second in (first, second)
    )
    assert same == 1.0
    assert abs(other) < 0.02
