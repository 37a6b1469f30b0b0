"""What a calibration will cost at most, in words, before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from partial_lora.question import Question


def passes_at_most(modules: int, axes: int, levels: int, *, search: str, repair: bool = False) -> int:
    """Full passes that can be needed: every point that a search can ask for, and the joint score of the result.

    A repair relaxes at most every level of every curve, and asks for a joint score whenever it doubles or halves.
    """
    asked = math.ceil(math.log2(levels + 1)) if search == "bisect" else levels
    if not repair:
        return modules * axes * asked + 1
    steps = modules * axes * levels  # their order asks for the levels that a bisection has passed over
    return steps + 1 + 2 * math.ceil(math.log2(steps + 1))


def estimate(
    asked: Question, modules: int, levels: int, examples: int | None, seconds: float, processes: int = 1
) -> str:
    """The line that is shown before the curves start.

    examples: of a pass, where they are known. seconds: what one pass takes. processes: that could share the work.
    """
    together, independent = asked.axes == "joint", asked.scope == "independent"
    search = "scan" if asked.budget is not None and independent else asked.search  # thresholds ask for other points
    passes = passes_at_most(modules, 1 if together else 2, levels, search=search, repair=asked.repair)
    sharing = processes if independent else 1
    parts = [
        f"{modules} module{'s' * (modules != 1)}",
        "rows and columns together" if together else "2 axes",
        f"{levels} level{'s' * (levels != 1)}",
    ]
    words = f"calibration: {', '.join(parts)}: at most {passes:,} passes"
    words += f" over {examples:,} examples" if examples is not None else ""
    words += f" in {sharing} processes" if sharing > 1 else ""
    words += " for each threshold tried" if asked.budget is not None and not independent else ""
    at_most = duration(passes * seconds / sharing)
    return f"{words}, no more than about {at_most} by the time of the first"


def duration(seconds: float) -> str:
    """A time as one says it: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def timed_pass(score: Any, evaluate: Callable[[], float]) -> tuple[float, float]:
    """What `evaluate` gives, and the seconds of one pass: a score that counts its examples may have taken several."""
    before, began = _examples(score), time.perf_counter()
    value = evaluate()
    seconds, size = time.perf_counter() - began, getattr(score, "size", None)
    passes = (_examples(score) - before) / size if size else 0
    return value, seconds / max(1, passes)


def _examples(score: Any) -> int:
    return getattr(getattr(score, "evaluations", None), "examples", 0)
