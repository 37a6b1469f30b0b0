"""Heads of several tasks side by side in one linear layer: an example sees the outputs of its own task alone.

A label says whose an example is: labels count on over the tasks, as the outputs do. `sizes` is how many outputs each
task has, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partial_lora.calibration.rubric import Batch, Rubric


def starts(sizes: Sequence[int]) -> list[int]:
    """The first output of each task."""
    return [sum(sizes[:number]) for number in range(len(sizes))]


def owners(sizes: Sequence[int]) -> Tensor:
    """Whose each output is (outputs,)."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(list(sizes)))


def within(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits (N, outputs), in float32, of which a row's other tasks' are so small that softmax makes them 0.

    They stay finite: what is not is a model that broke down. labels: (N,).
    """
    of, labels = owners(sizes).to(logits.device), labels.to(logits.device)
    logits = logits.float()
    return logits.masked_fill(of != of[labels][:, None], torch.finfo(logits.dtype).min)


def mean_loss_within(sizes: Sequence[int]) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The mean cross entropy of a batch, each row's over its own task's outputs (`importance.data_scores`)."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return F.cross_entropy(within(logits, batch["labels"], sizes), batch["labels"])

    return loss


class Within:
    """A rubric that sees of every example the outputs of its own task alone."""

    def __init__(self, rubric: Rubric, sizes: Sequence[int]) -> None:
        self._rubric, self._sizes = rubric, sizes
        self.lowest, self.highest = rubric.lowest, rubric.highest

    def check(self, batch: Batch) -> None:
        self._rubric.check(batch)

    def units(self, batch: Batch) -> Tensor:
        return self._rubric.units(batch)

    def weight(self, batch: Batch) -> float:
        return self._rubric.weight(batch)

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._rubric.values(within(logits, batch["labels"], self._sizes), batch)

    def sureness(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._rubric.sureness(within(logits, batch["labels"], self._sizes), batch)

    def chance(self, batches: Sequence[Batch]) -> float | None:
        """What guessing scores within each task, weighed by its examples."""
        labels = torch.cat([batch["labels"] for batch in batches])
        of = owners(self._sizes).to(labels.device)[labels]
        parts = [labels[of == number] for number in of.unique()]
        found = [self._rubric.chance([{"labels": part}]) for part in parts]
        if None in found:
            return None
        return sum(chance * len(part) for chance, part in zip(found, parts, strict=True)) / len(labels)
