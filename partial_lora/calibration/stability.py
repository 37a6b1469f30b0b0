"""How much sparsities move with the examples that calibration happens to see: which, how many, how labelled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import numpy as np

from partial_lora.calibration.reliability import Sparsity, correlation, paired


def difference(first: Sparsity, second: Sparsity) -> dict:
    """How far two calibrations lie apart: {pearson, spearman, mean_absolute, n, said}.

    mean_absolute is the mean absolute difference of the sparsities over (module, axis), which sees what a correlation
    does not: that all of them are larger.
    """
    pairs = paired(first, second)
    found = correlation(first, second)
    return found | {"mean_absolute": float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else None}


def mean_difference(pairs: Sequence[tuple[Sparsity, Sparsity]]) -> dict:
    """The means of `difference` over several pairs of calibrations: {pearson, spearman, mean_absolute, pairs, said}.

    A pair without a correlation does not enter its mean, and is counted in words; None where no pair has one.
    """
    each = [difference(*pair) for pair in pairs]
    none = [found["said"] for found in each if found["said"]]
    said = f"{len(none)} of {len(each)} pairs without a correlation: {none[0]}" if none else ""
    return {key: mean_of([found[key] for found in each]) for key in ("pearson", "spearman", "mean_absolute")} | {
        "pairs": len(each),
        "said": said,
    }


def every_two(calibrations: Sequence[Sparsity]) -> list[tuple[Sparsity, Sparsity]]:
    """All pairs of different calibrations."""
    return list(combinations(calibrations, 2))


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the numbers that there are; None where there is none."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def deviation_of(values: Sequence[float | None]) -> float | None:
    """The standard deviation (n - 1) of the numbers that there are; None where there are fewer than two."""
    there = [value for value in values if value is not None]
    return float(np.std(there, ddof=1)) if len(there) > 1 else None
