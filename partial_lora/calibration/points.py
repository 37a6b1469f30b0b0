"""Points of calibration curves as plain data: what is known of a score at each level of sparsity.

A point is (low, high), the bounds of the score; equal bounds are the score, and bounds that are no numbers are a score
that is none. In JSON: [level, score], [level, [low, high]] with null for a bound at infinity, or [level, null].
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping

AXES = ("rows", "columns")
BOTH = "joint"  # one level zeroes that share of the rows and of the columns
CURVE_AXES = {"separate": AXES, "joint": (BOTH,)}  # calibration.axes: the curves of a module

Bounds = tuple[float, float]
Curve = dict[float, Bounds]
Sparsity = dict[str, dict[str, float]]  # {module: {"rows": s, "columns": s}}
Levels = dict[str, dict[str, float]]  # {module: {axis of a curve: level}}

UNKNOWN: Bounds = (-math.inf, math.inf)
NOT_A_NUMBER: Bounds = (math.nan, math.nan)


def bounds_of(low: float, high: float) -> Bounds:
    """What a score said, as a point: a score that is not finite is no number, a bound may well be infinite."""
    if math.isnan(low) or math.isnan(high) or (low == high and math.isinf(low)):
        return NOT_A_NUMBER
    return float(low), float(high)


def listed(curve: Mapping[float, Bounds]) -> list[list]:
    """A curve by rising level, as JSON has it."""
    return [[level, _plain(*bounds)] for level, bounds in sorted(curve.items())]


def curve_of(points: Iterable[Iterable]) -> Curve:
    """The curve that `listed` has written."""
    return {level: _bounds(value) for level, value in points}


def both_axes(levels: Mapping[str, Mapping[str, float]]) -> Sparsity:
    """The sparsity of rows and of columns that the levels of a module's curves mean."""
    return {module: {axis: of.get(axis, of.get(BOTH)) for axis in AXES} for module, of in levels.items()}


def digest_of(cuts: Mapping[str, Mapping[str, float]]) -> str:
    """Names what is zeroed elsewhere while a curve is measured; "" where that is nothing.

    cuts: levels by module and axis; in which order they were made does not matter, and level 0 is no cut.
    """
    made = sorted(
        (module, axis, level) for module, of in both_axes(cuts).items() for axis, level in of.items() if level
    )
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] if made else ""


def _plain(low: float, high: float) -> float | list | None:
    if math.isnan(low):
        return None
    return low if low == high else [None if math.isinf(bound) else bound for bound in (low, high)]


def _bounds(value: float | list | None) -> Bounds:
    if value is None:
        return NOT_A_NUMBER
    if not isinstance(value, list):
        return value, value
    low, high = (unknown if bound is None else bound for bound, unknown in zip(value, UNKNOWN, strict=True))
    return low, high
