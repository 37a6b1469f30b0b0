"""Agreement of calibrations of one model: the correlation of their sparsities over modules and axes.

Sparsities from a handful of examples carry noise. Two halves of the scored draw know nothing of each other: what their
sparsities share is the model's, what they do not share is chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from partial_lora.errors import PartialLoraError
from partial_lora.masks import Sparsity

WEAK = 0.5  # below it sparsities are more chance than model
_FEWEST = 3  # through two points there is always a line


def split_half(labels: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two disjoint halves of a draw, as ascending indices, the same ones for a seed.

    Every class is halved at random. A class with an odd number of examples gives its last to the smaller half, so
    neither the halves nor their classes differ by more than one; real labels count as one class. Raises
    PartialLoraError for fewer than two examples.
    """
    labels = np.asarray(labels)
    if np.issubdtype(labels.dtype, np.floating):
        labels = np.zeros(len(labels), dtype=np.int64)
    if len(labels) < 2:
        raise PartialLoraError(f"split-half: expected at least 2 scored examples, found {len(labels)}")
    generator = np.random.default_rng(seed)
    halves: tuple[list[int], list[int]] = [], []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label)).tolist()
        less = int(len(halves[1]) < len(halves[0]))
        halves[less].extend(rows[0::2])
        halves[1 - less].extend(rows[1::2])
    return np.sort(np.asarray(halves[0])), np.sort(np.asarray(halves[1]))


def reliability(first: Sparsity, second: Sparsity) -> dict:
    """Return the agreement of the sparsities of two halves: {pearson, spearman, spearman_brown, n, said}.

    spearman_brown: the correlation that two calibrations of the whole draw are expected to have, 2r / (1 + r) of the
    Pearson correlation r of the halves (Spearman 1910, Brown 1910). An r below zero stays as it is: there is nothing
    in common that more examples would bring out. `said` is the reason, in words, for a number that is None, else empty.
    """
    agreement = correlation(first, second)
    r = agreement["pearson"]
    return agreement | {"spearman_brown": None if r is None else 2 * r / (1 + r) if r > 0 else r}


def verdict(corrected: float | None) -> str:
    """Return the doubt that a corrected correlation casts on the sparsities, in words; empty if there is none."""
    if corrected is None:
        return "no reliability: there is nothing to correlate"
    if corrected < WEAK:
        todo = "use more examples (calibration.shots) or method=targeted"
        return f"inconsistent: split-half reliability {corrected:.2f}; {todo}"
    return ""


def correlation(first: Sparsity, second: Sparsity) -> dict:
    """Return Pearson's and Spearman's correlation over (module, axis): {pearson, spearman, n, said}.

    Where all sparsities of one side are equal, or there are fewer than three, both correlations are None and `said` is
    the reason. Raises PartialLoraError, naming the first module, for calibrations of different modules.
    """
    from scipy.stats import pearsonr, spearmanr  # half a second to import, and few runs need it

    pairs = paired(first, second)
    reason = ""
    if len(pairs) < _FEWEST:
        reason = f"{len(pairs)} sparsities: at least {_FEWEST} are needed for a correlation"
    for ordinal, values in zip(("first", "second"), pairs.T, strict=True):
        if not reason and np.ptp(values) == 0:
            reason = f"all sparsities of the {ordinal} calibration are {values[0]:g}: there is nothing to correlate"
    if reason:
        return {"pearson": None, "spearman": None, "n": len(pairs), "said": reason}
    return {
        "pearson": float(pearsonr(*pairs.T).statistic),
        "spearman": float(spearmanr(*pairs.T).statistic),
        "n": len(pairs),
        "said": "",
    }


def paired(first: Sparsity, second: Sparsity) -> np.ndarray:
    """Return the two sparsities of each (module, axis), in the first one's order (n, 2)."""
    if single := sorted(first.keys() ^ second.keys()):
        raise PartialLoraError(
            f"calibrations of different modules cannot be compared: {single[0]} is in one of them only"
        )
    values = [[axes[axis], second[module][axis]] for module, axes in first.items() for axis in axes]
    return np.asarray(values, dtype=np.float64).reshape(-1, 2)


def difference(first: Sparsity, second: Sparsity) -> dict:
    """Return how far two calibrations lie apart: {pearson, spearman, mean_absolute, n, said}.

    mean_absolute is the mean absolute difference of the sparsities over (module, axis). It shows where all of them are
    larger, which a correlation does not.
    """
    pairs = paired(first, second)
    distance = float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else None
    return correlation(first, second) | {"mean_absolute": distance}


def mean_difference(pairs: Iterable[tuple[Sparsity, Sparsity]]) -> dict:
    """Return the means of `difference` over pairs of calibrations: {pearson, spearman, mean_absolute, pairs, said}.

    A pair without a correlation does not enter that mean, and `said` counts it; None where no pair has one.
    """
    differences = [difference(*pair) for pair in pairs]
    none = [entry["said"] for entry in differences if entry["said"]]
    reason = f"{len(none)} of {len(differences)} pairs without a correlation: {none[0]}" if none else ""
    return {key: mean_of([entry[key] for entry in differences]) for key in ("pearson", "spearman", "mean_absolute")} | {
        "pairs": len(differences),
        "said": reason,
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None where all are."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
