"""Operating points in words, and which are near each other."""

from __future__ import annotations

import pytest

from partial_lora.runs import rates


@pytest.mark.parametrize(
    ("point", "others", "expected"),
    [
        ("threshold 0.9", ["threshold 0.9", "threshold 0.91"], "threshold 0.9"),
        ("threshold 0.6", ["threshold 0.9", "threshold 0.7", "budget 0.6"], "threshold 0.7"),
        ("threshold 0.7", ["threshold 0.6", "threshold 0.8"], "threshold 0.8"),  # as near, though not in binary
        ("budget 0.05", ["budget 0.01", "budget 0.13"], "budget 0.13"),  # by ratio; by difference it were 0.01
        ("budget 20,000", ["budget 0.13", "budget 10,000", "budget 2,000,000"], "budget 10,000"),
        ("budget 0.13", ["threshold 0.9", "budget 10,000"], None),
    ],
)
def test_the_nearest_operating_point(point: str, others: list[str], expected: str | None) -> None:
    assert rates.nearest(point, others) == expected


def test_a_point_in_words() -> None:
    assert rates.said({"threshold": 0.9}) == "threshold 0.9"
    assert rates.said({"threshold": 0.42, "budget": 0.13}) == "budget 0.13"
    assert rates.said({"threshold": 0.9, "budget": 153344.0}) == "budget 153,344"  # to the last parameter
