"""What counts as a good answer: how a few-shot score is made of what a model says about each example.

A rubric turns the logits of a batch into one value for each unit (an example, or an item with its options), and says
what is known of the score while units are still to be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from partial_lora.errors import PartialLoraError

Bounds = tuple[float, float]
Batch = Mapping[str, Tensor]


@dataclass
class Tally:
    """What has been seen so far: batches by position, units, the sum of their values, and the values where asked."""

    seen: list[int] = field(default_factory=list)
    units: int = 0
    total: float = 0.0
    values: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> Tally:
        """One that can be added to while this one stays."""
        return Tally(list(self.seen), self.units, self.total, dict(self.values))

    def add(self, batch: int, values: Tensor, keep: bool) -> None:
        self.seen.append(batch)
        self.units += len(values)
        self.total += float(values.sum())
        if keep:
            self.values[batch] = values


class Rubric(Protocol):
    """How answers are valued. `lowest`, `highest`: what a unit adds at least and at most; None of a WholeRubric."""

    lowest: float | None
    highest: float | None

    def check(self, batch: Batch) -> None:
        """Raise PartialLoraError, in one line, for labels of the wrong kind."""

    def units(self, batch: Batch) -> Tensor:
        """Which unit each row belongs to, counted from 0 (rows,)."""

    def weight(self, batch: Batch) -> float:
        """What a batch adds to the number that the sum of all values is divided by."""

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        """One number for each unit (units,), float64; not finite where what the model says is no number."""

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """The units that decide soonest have the largest (units,)."""

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """What guessing scores; None where that means nothing."""


@runtime_checkable
class WholeRubric(Rubric, Protocol):
    """A rubric whose score is no mean of units, so that it takes them all."""

    def whole(self, values: Tensor, labels: Tensor) -> float:
        """The score of all units."""


class Rows:
    """Every row is a unit of weight 1."""

    def units(self, batch: Batch) -> Tensor:
        return torch.arange(len(batch["labels"]))

    def weight(self, batch: Batch) -> float:
        return len(batch["labels"])

    def check(self, batch: Batch) -> None:
        labels = batch["labels"]
        if labels.ndim != 1 or labels.is_floating_point():
            raise PartialLoraError(
                f"labels: expected whole numbers (batch,), found {labels.dtype} {list(labels.shape)}"
            )


class Correctness(Rows):
    """1 for an example whose label has the largest logit, 0 for another; guessing always says the majority class."""

    lowest, highest = 0.0, 1.0

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        right = (logits.argmax(-1) == batch["labels"]).double()
        return torch.where(logits.isfinite().all(-1), right, math.nan)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        """The margin: of the examples that are right, those come first that stay right longest."""
        labels = batch["labels"][:, None]
        best_other = logits.scatter(1, labels, -math.inf).max(1).values
        return logits.gather(1, labels).squeeze(1) - best_other

    def chance(self, batches: Sequence[Batch]) -> float:
        return float(shares(batches).max())


def shares(batches: Sequence[Batch]) -> np.ndarray:
    """The share of every class that occurs (classes,)."""
    _, counts = torch.cat([batch["labels"] for batch in batches]).unique(return_counts=True)
    return (counts.double() / counts.sum()).cpu().numpy()


def as_labels(logits: Tensor, labels: Tensor) -> Tensor:
    outputs = logits.squeeze(-1) if logits.ndim == labels.ndim + 1 and logits.shape[-1] == 1 else logits
    if outputs.shape != labels.shape:
        raise PartialLoraError(
            f"labels: real numbers {list(labels.shape)} need outputs of that shape, found {list(logits.shape)}"
        )
    return outputs
