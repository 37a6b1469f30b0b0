"""The order of examples that decides soonest whether a score survives, and what has been seen of them so far."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from partial_lora.calibration.answer_scores import Batch, Measure


@dataclass
class Tally:
    """Batches seen so far, by position; their units, the sum of the units' values, and the values where needed."""

    seen: list[int] = field(default_factory=list)
    units: int = 0
    total: float = 0.0
    values: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> Tally:
        """Return a copy that can be added to while this one stays."""
        return Tally(list(self.seen), self.units, self.total, dict(self.values))

    def add(self, batch: int, values: Tensor, keep: bool) -> None:
        self.seen.append(batch)
        self.units += len(values)
        self.total += float(values.sum())
        if keep:
            self.values[batch] = values


# (End of a part of the draw, largest batch in it, both as shares of the draw; units that such a batch may always have.)
# Batches are small where most questions are decided, and large where all is seen anyway: small ones take longer.
_BATCHES = ((0.6, 0.15, 24), (0.8, 0.1, 16), (1.0, 0.05, 8))
_OF_TEXTS = 16  # texts that a batch of them may always have
# Share of the less sure units that are right, as on vit_s14 and digits; any value from 0.06 to 0.2 saves as much.
_LESS_SURE = 1 / 8


def arranged(batches: Sequence[Batch], sureness: Sequence[Tensor], measure: Measure) -> list[Batch]:
    """Return the same units in other batches: those with the largest `sureness` (units,) first.

    Images are in batches that get smaller. Texts come in thirds, the surest first; in each third those of like length
    share a batch, padded to the longest of them. Inputs of several shapes that are no texts stay in the batches of the
    caller, and whole batches change places.
    """
    widened = _as_wide(batches)
    if widened is None:
        order = torch.stack([part.float().mean() for part in sureness]).argsort(descending=True, stable=True)
        return [batches[index] for index in order]
    sizes = [len(part) for part in sureness]
    firsts = [0, *accumulate(sizes)]
    unit = torch.cat([measure.units(batch) + first for batch, first in zip(batches, firsts, strict=False)])
    by_unit = unit.argsort(stable=True).split(torch.bincount(unit).tolist())  # the rows of each unit
    whole = {name: torch.cat([batch[name] for batch in widened]) for name in widened[0]}
    surest = torch.cat(list(sureness)).float().argsort(descending=True, stable=True)
    if _is_text(whole):
        lengths = whole["attention_mask"].sum(1).cpu()
        longest = torch.stack([lengths[of_unit].max() for of_unit in by_unit])
        thirds = [third[longest[third].argsort(stable=True)] for third in surest.chunk(3)]
        chosen = [units for third in thirds for units in third.split(min(max(_OF_TEXTS, len(third) // 4), max(sizes)))]
    else:
        chosen = surest.split(batch_sizes(sizes))
    rows = [torch.cat([by_unit[index] for index in units]) for units in chosen]
    return [_cut({name: value[places] for name, value in whole.items()}) for places in rows]


def _is_text(batch: Batch) -> bool:
    """Return whether an attention_mask (rows, length) says what is padding, of tensors (rows,) and (rows, length)."""
    mask = batch.get("attention_mask")
    return mask is not None and all(tensor.ndim == 1 or tensor.shape == mask.shape for tensor in batch.values())


def _as_wide(batches: Sequence[Batch]) -> list[Batch] | None:
    """Return batches of one width: texts are padded on the right to the longest batch, as others of them are padded.

    None for inputs of several shapes that are no texts, or of which none is padded.
    """
    if all(len({batch[name].shape[1:] for batch in batches}) == 1 for name in batches[0]):
        return list(batches)
    padded = [batch for batch in batches if _is_text(batch) and not batch["attention_mask"].all()]
    if not padded or not all(map(_is_text, batches)):
        return None
    row, place = (padded[0]["attention_mask"] == 0).nonzero()[0]
    filler = {name: tensor[row, place].item() for name, tensor in padded[0].items() if tensor.ndim == 2}
    width = max(batch["attention_mask"].shape[1] for batch in batches)

    def widened(name: str, tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, width - tensor.shape[1]), value=filler[name]) if name in filler else tensor

    return [{name: widened(name, tensor) for name, tensor in batch.items()} for batch in batches]


def _cut(batch: Batch) -> Batch:
    """Return a batch of texts without the last places that are padding in every row; others as they are."""
    if not _is_text(batch):
        return batch
    width = int(batch["attention_mask"].any(0).nonzero().max()) + 1
    return {name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in batch.items()}


def batch_sizes(sizes: Sequence[int]) -> list[int]:
    """Return sizes of batches that get smaller, for as many units in all, none larger than the largest of `sizes`."""
    size, smaller = sum(sizes), []
    for until, share, least in _BATCHES:
        most = min(max(least, math.ceil(share * size)), max(sizes))
        while sum(smaller) < until * size:
            smaller.append(min(most, size - sum(smaller)))
    return smaller


def enough(undecided: Callable[[float, float], bool], size: int) -> int:
    """Return how many of `size` units must be right to decide a question on their share; size + 1 if no number does."""
    return bisect_left(range(size + 1), True, key=lambda right: not undecided(right / size, 1.0))


def next_batch(sizes: Sequence[int], tally: Tally, needed: int) -> int:
    """Return the batch to see next, of batches arranged by sureness, where `needed` units have to be right.

    The batch of the `needed`-th unit comes first, which decides if examples turn wrong in their order; then the two
    surer ones. If these promise a pass, the surest of the others follow, most of which are right; if not, the least
    sure, most of which are wrong anyway. That choice stands: what follows it is no fair sample of the rest.
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
