"""Where on the curve of accuracy against size an adapter is put, in words: "threshold 0.9", "budget 0.13", or "–"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

NO_POINT = "–"  # of a method that is not calibrated


def said(calibration: Mapping) -> str:
    """The point of {"threshold", "budget"}: the budget's where there is one, a share or a count of parameters."""
    key = "threshold" if calibration.get("budget") is None else "budget"
    value = calibration[key]
    return f"{key} {value:g}" if value <= 1 else f"{key} {value:,.0f}"


def nearest(point: str, others: Iterable[str]) -> str | None:
    """The nearest of other points of the same kind; of two as near the one that keeps more. None where there is none.

    Thresholds are as far apart as their difference, budgets as their ratio. A threshold, a share and a count of
    parameters say nothing of each other before calibration.
    """
    kind, value = _parted(point)
    alike = [(other, found) for other in others if (found := _parted(other))[0] == kind]

    def distance(other: tuple[str, tuple[str, float]]) -> tuple[float, float]:
        found = other[1][1]
        apart = abs(found - value) if kind == "threshold" else abs(math.log(found / value))
        return round(apart, 9), -found  # 0.7 and 0.9 are as far from 0.8, but not in binary

    return min(alike, key=distance)[0] if alike else None


def _parted(point: str) -> tuple[str, float]:
    """Its kind (threshold, share or count) and value."""
    name, _, number = point.partition(" ")
    value = float(number.replace(",", "") or "nan")
    return ("count" if value > 1 else "share") if name == "budget" else name, value
