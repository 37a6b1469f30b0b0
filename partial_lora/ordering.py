"""The order of examples that decides soonest whether a score has survived."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from partial_lora.rubric import Batch, Rubric, Tally


def arranged(batches: Sequence[Batch], sureness: Sequence[Tensor], rubric: Rubric) -> list[Batch]:
    """The same units in batches of as many, those with the largest `sureness` (units,) of each batch first.

    Where inputs are of several lengths, padded together as the caller put them, whole batches change places.
    """
    parts = {name: [batch[name] for batch in batches] for name in batches[0]}
    if any(len({part.shape[1:] for part in of_name}) > 1 for of_name in parts.values()):
        order = torch.stack([part.float().mean() for part in sureness]).argsort(descending=True, stable=True)
        return [batches[index] for index in order]
    sizes = [len(part) for part in sureness]
    firsts = [0, *accumulate(sizes)]
    unit = torch.cat([rubric.units(batch) + first for batch, first in zip(batches, firsts, strict=False)])
    by_unit = unit.argsort(stable=True).split(torch.bincount(unit).tolist())  # the rows of each unit
    whole = {name: torch.cat(of_name) for name, of_name in parts.items()}
    chosen = torch.cat(list(sureness)).float().argsort(descending=True, stable=True).split(sizes)
    rows = [torch.cat([by_unit[index] for index in some]) for some in chosen]
    return [{name: value[some] for name, value in whole.items()} for some in rows]


def enough(undecided: Callable[[float, float], bool], size: int) -> int:
    """How many of `size` units have to be right to decide a question about their share; size + 1 if none are enough."""
    return bisect_left(range(size + 1), True, key=lambda right: not undecided(right / size, 1.0))


def next_batch(sizes: Sequence[int], tally: Tally, needed: int) -> int:
    """The batch to see next, of batches arranged by sureness, where `needed` units have to be right.

    First comes the one in which this is decided if examples turn wrong in their order. Where it lets expect a pass, the
    surest of the others follow, most of which will be right; else the least sure, most of which are wrong anyway.
    """
    unseen = [index for index in range(len(sizes)) if index not in tally.seen]
    hinge = min(sum(end < needed for end in accumulate(sizes)), len(sizes) - 1)
    if hinge in unseen:
        return hinge
    expected = tally.total + sum(sizes[index] for index in unseen if index < hinge)
    return unseen[0] if expected >= needed else unseen[-1]
