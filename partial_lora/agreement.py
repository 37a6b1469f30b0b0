"""How far two measures of importance choose the same rows and columns, against what chance alone would give."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from statistics import fmean

import numpy as np
from scipy.stats import hypergeom
from torch import Tensor

from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

AXES = ("rows", "columns")

Scores = Mapping[str, tuple[Tensor, Tensor]]


def jaccard(first: Mask, second: Mask) -> float:
    """The share of what either mask keeps that both keep: 1 for equal masks, 0 for masks that never meet."""
    if first.size != second.size:
        raise PartialLoraError(f"agreement: masks over {first.size} and {second.size} entries cannot be compared")
    both = len(np.intersect1d(first.kept, second.kept, assume_unique=True))
    return both / (len(first.kept) + len(second.kept) - both)


def jaccard_by_chance(size: int, first: int, second: int) -> float:
    """The mean of `jaccard` over independent random masks that keep `first` and `second` of `size` entries.

    Exact: how many entries both keep is hypergeometric, and the mean is taken of the ratio itself. The ratio of the
    means would be too small.
    """
    if not (1 <= first <= size and 1 <= second <= size):
        raise PartialLoraError(
            f"agreement: expected from 1 to {size} kept entries of {size}, found {first} and {second}"
        )
    both = np.arange(max(0, first + second - size), min(first, second) + 1)
    return float(np.sum(hypergeom.pmf(both, size, first, second) * both / (first + second - both)))


def compared(scores: Mapping[str, Scores], sparsity: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """Every two measures, module by module and axis by axis, each keeping its most important ones.

    scores: {measure: {module: (row scores, column scores)}}. sparsity: the one that all measures share, {module:
    {"rows", "columns"}}. Gives {first, second, module, axis, size, kept, jaccard, chance} for each comparison.
    """
    chosen = {
        measure: {
            (module, axis): Mask.top(np.asarray(values), axes[axis])
            for module, axes in sparsity.items()
            for axis, values in zip(AXES, of_measure[module], strict=True)
        }
        for measure, of_measure in scores.items()
    }
    found = []
    for first, second in combinations(chosen, 2):
        for (module, axis), mask in chosen[first].items():
            size, kept = mask.size, len(mask.kept)
            found.append(
                {
                    "first": first,
                    "second": second,
                    "module": module,
                    "axis": axis,
                    "size": size,
                    "kept": kept,
                    "jaccard": jaccard(mask, chosen[second][module, axis]),
                    "chance": jaccard_by_chance(size, kept, kept),
                }
            )
    return found


def summary(comparisons: list[dict]) -> list[dict]:
    """One line for every two measures: {first, second, n, whole, jaccard, chance, beyond_chance}, means over n.

    Where everything is kept all measures agree, and nothing is learned: these, `whole` in number, are left out.
    beyond_chance: 1 for equal choices, 0 for what chance gives, below it for choices that shun each other: the mean
    agreement above chance, as a share of the room there is above chance. None where nothing is left to compare.
    """
    lines = []
    for first, second in dict.fromkeys((line["first"], line["second"]) for line in comparisons):
        pair = [line for line in comparisons if (line["first"], line["second"]) == (first, second)]
        told = [line for line in pair if line["kept"] < line["size"]]
        found = fmean(line["jaccard"] for line in told) if told else None
        chance = fmean(line["chance"] for line in told) if told else None
        lines.append(
            {
                "first": first,
                "second": second,
                "n": len(told),
                "whole": len(pair) - len(told),
                "jaccard": found,
                "chance": chance,
                "beyond_chance": (found - chance) / (1 - chance) if told else None,
            }
        )
    return lines
