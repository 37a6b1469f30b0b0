"""The order in which texts are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):
    """Batches of like length in an order that seed and epoch decide, so that a resumed run goes on in the same one.

    count: how many of the rows an epoch has; None stands for all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, count: int | None = None) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed, self._count = seed, len(lengths) if count is None else count
        self.set_epoch(0)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self._count)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)
