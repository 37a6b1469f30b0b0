"""The processes that load data for a training."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import get_worker_info

_MOST_WORKERS = 8  # for one accelerator


def loading_processes(requested: int | None, device: str, world_size: int) -> int:
    """How many processes load data for this one: none on a CPU, which they would only compete for."""
    if requested is not None:
        return requested
    return 0 if device == "cpu" else min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) // world_size - 1))


@dataclass
class Undisturbed:
    """Makes batches as `collate` does; in a process of its own, whatever asks the run to stop.

    Schedulers that end a job signal every process of it. One that loads data would die of that, and its training with
    it, before that has made its checkpoint; once that has ended it ends, too.
    """

    collate: Callable[[Sequence], dict[str, Tensor]]

    def __call__(self, rows: Sequence) -> dict[str, Tensor]:
        if get_worker_info() is not None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        return self.collate(rows)
