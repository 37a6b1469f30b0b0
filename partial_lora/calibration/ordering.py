"""The order of examples that decides soonest whether a score has survived."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from partial_lora.calibration.rubric import Batch, Rubric, Tally

# (Up to this share of the draw, batches of this share of it at most, of that many units at least): small ones where
# most questions are decided, but what is nearly always seen in as few as can be, since small batches take longer.
_BATCHES = ((0.6, 0.15, 24), (0.8, 0.1, 16), (1.0, 0.05, 8))
_LESS_SURE = 1 / 8  # of those less sure are right: by vit_s14 on digits, where 0.06 to 0.2 save as much


def arranged(batches: Sequence[Batch], sureness: Sequence[Tensor], rubric: Rubric) -> list[Batch]:
    """The same units, those with the largest `sureness` (units,) first, in batches that get smaller.

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
    chosen = torch.cat(list(sureness)).float().argsort(descending=True, stable=True).split(batch_sizes(sizes))
    rows = [torch.cat([by_unit[index] for index in some]) for some in chosen]
    return [{name: value[some] for name, value in whole.items()} for some in rows]


def batch_sizes(sizes: Sequence[int]) -> list[int]:
    """As many units in batches that get smaller, none larger than the largest there is."""
    size, found = sum(sizes), []
    for until, share, least in _BATCHES:
        most = min(max(least, math.ceil(share * size)), max(sizes))
        while sum(found) < until * size:
            found.append(min(most, size - sum(found)))
    return found


def enough(undecided: Callable[[float, float], bool], size: int) -> int:
    """How many of `size` units have to be right to decide a question about their share; size + 1 if none are enough."""
    return bisect_left(range(size + 1), True, key=lambda right: not undecided(right / size, 1.0))


def next_batch(sizes: Sequence[int], tally: Tally, needed: int) -> int:
    """The batch to see next, of batches arranged by sureness, where `needed` units have to be right.

    First come the one in which this is decided if examples turn wrong in their order, and two that are surer. Where
    they let expect a pass, the surest of the others follow, most of which will be right; else the least sure, most of
    which are wrong anyway. That is not thought over again: what follows looks better, or worse, than it is.
    """
    unseen = [index for index in range(len(sizes)) if index not in tally.seen]
    hinge = min(sum(end < needed for end in accumulate(sizes)), len(sizes) - 1)
    tried = range(hinge, max(-1, hinge - 3), -1)
    for index in tried:
        if index in unseen:
            return index
    followed = next((index for index in tally.seen if index not in tried), None)
    if followed is not None:
        return unseen[0] if followed < hinge else unseen[-1]
    surer, less = (sum(sizes[index] for index in unseen if (index < hinge) == before) for before in (True, False))
    return unseen[0] if tally.total + surer + _LESS_SURE * less >= needed else unseen[-1]
