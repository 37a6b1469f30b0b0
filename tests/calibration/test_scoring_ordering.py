"""The order in which examples are seen: all of them, once, and few where they turn wrong from the least sure on."""

from __future__ import annotations

import pytest
import torch
from scored_models import scored_draw

from partial_lora.calibration.score import Correctness, FewShotScore, Tally, arranged, batch_sizes, enough, next_batch


def undecided_at(needed, size):
    """The question whether `needed` of `size` are right."""
    return lambda low, high: round(low * size) < needed <= round(high * size)


def walked(sizes, right, needed):
    """The batches that are seen until it is decided whether `needed` are right; right: those of each batch that are."""
    tally, size = Tally(), sum(sizes)
    while tally.total < needed <= tally.total + size - tally.units:
        index = next_batch(sizes, tally, needed)
        assert index not in tally.seen
        tally.add(index, torch.tensor([1.0] * right[index] + [0.0] * (sizes[index] - right[index])), keep=False)
    return tally.seen


def test_what_passes_is_decided_by_the_surest_and_what_fails_by_the_least_sure():
    sizes, needed = [10] * 7, 45
    assert walked(sizes, [10, 10, 9, 9, 8, 0, 0], needed) == [4, 3, 2, 0, 1]  # none of the last two is needed
    assert walked(sizes, [10, 10, 5, 4, 2, 2, 0], needed) == [4, 3, 2, 6]  # 29 wrong are too many already
    assert walked(sizes, [10, 10, 9, 6, 3, 4, 3], needed) == [4, 3, 2, 6, 5, 1, 0]  # as close as can be
    assert walked(sizes, [0, 0, 9, 9, 9, 9, 9], needed) == [4, 3, 2, 0, 1, 5, 6]  # not in their order
    assert walked([7], [7], 7) == [0]
    assert walked([4, 3], [4, 3], 8) == []


def test_no_order_sees_a_batch_twice_or_stops_undecided():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(1, 6, (5,), generator=generator).tolist()
        right = [int(torch.randint(0, size + 1, (1,), generator=generator)) for size in sizes]
        needed = int(torch.randint(0, sum(sizes) + 2, (1,), generator=generator))
        seen = walked(sizes, right, needed)
        known = sum(right[index] for index in seen)
        possible = known + sum(size for index, size in enumerate(sizes) if index not in seen)
        assert (known >= needed) != (possible < needed)


@pytest.mark.parametrize("needed", [0, 1, 7, 20])
def test_how_many_have_to_be_right(needed):
    assert enough(undecided_at(needed, 20), 20) == needed
    assert enough(lambda low, high: True, 20) == 21


def test_units_stay_what_they_were():
    batches = [
        {"x": torch.arange(4.0), "labels": torch.arange(4)},
        {"x": torch.arange(4.0, 7), "labels": torch.arange(3)},
    ]
    sureness = [torch.tensor([0.0, 3, 1, 2]), torch.tensor([5.0, -1, 3])]
    first, second = arranged(batches, sureness, Correctness())
    assert first["x"].tolist() == [4, 1, 6, 3]
    assert first["labels"].tolist() == [0, 1, 2, 3]
    assert second["x"].tolist() == [2, 0, 5]


@pytest.mark.parametrize(
    ("sizes", "smaller"),
    [
        ([32] * 5, [24] * 4 + [16] * 2 + [8] * 4),
        ([64, 40], [24] * 3 + [16] + [8] * 2),
        ([10, 7], [10, 7]),
        ([300, 200], [75] * 4 + [50] * 2 + [25] * 4),
        ([8] * 60, [8] * 60),
        ([20], [20]),
        ([1], [1]),
    ],
)
def test_batches_get_smaller_where_most_is_decided(sizes, smaller):
    assert batch_sizes(sizes) == smaller
    batches = [{"labels": torch.arange(size)} for size in sizes]
    parts = arranged(batches, [torch.arange(float(size)) for size in sizes], Correctness())
    assert [len(part["labels"]) for part in parts] == smaller


def test_what_two_points_have_in_common_is_not_taken_for_the_same(model, monkeypatch):
    """Equal bounds after other batches: nobody can know which to go on with."""
    score = FewShotScore(model, scored_draw(model, sizes=(3, 3, 3)), "accuracy")
    right = {"first": [2, 3, 1], "second": [0, 3, 2]}  # of each batch, with one or another level zeroed

    def bounds(point, undecided, known=None):
        def see(model, index, module, tally):
            tally.add(index, torch.tensor([1.0] * right[point][index] + [0.0] * (3 - right[point][index])), keep=False)
            return True

        monkeypatch.setattr(score, "_see", see)
        return score.bounds(model, "vit.head", undecided, known)

    def from_the_end(low, high):
        return high - low > 0.7 or (low > 0.3 and high == 1)

    known = bounds("first", lambda low, high: high - low > 0.7)
    assert known == (2 / 9, 8 / 9)
    assert bounds("first", lambda low, high: low < high, known) == (6 / 9, 6 / 9)
    assert bounds("second", from_the_end) == known
    for point in right:
        exact = sum(right[point]) / 9
        assert bounds(point, lambda low, high: low < high, known) == (exact, exact)
