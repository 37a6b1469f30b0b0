"""What a method costs beside its parameters: bytes on disk and in memory, and the time of a step."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from partial_lora.training.activations import kept_by_forward, storages, tensors_in, total

_TIMED = 1000  # steps, the last ones, that the median is of
_WARM = 2  # the step at which what lasts exists, and nothing is any more made for the first time

Moment = float | torch.cuda.Event  # seconds, or a place in the queue of a GPU


class Cost(TrainerCallback):
    """Watches training: how long its steps take, what its optimizer holds, what one forward pass keeps.

    Bytes of the first pass of the second step, or of the first where there is no other, in this process: no pass is
    made and no random number drawn for it. That step's time is left out, if it is not the only one. On a GPU times are
    its own, between two events in its queue: nothing waits for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._times: deque[tuple[Moment, Moment]] = deque(maxlen=_TIMED)
        self._began, self._steps = None, 0
        self._saved = self._optimizer = None
        self._watching = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        self._steps += 1
        if self._saved is None and self._steps == min(_WARM, state.max_steps - state.global_step + self._steps - 1):
            self._watch(args.device.type)
        self._began = _now(args.device)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        ended = _now(args.device)
        self._watching.close()
        if self._optimizer is None:
            self._optimizer = optimizer_bytes(optimizer)
        if self._steps != _WARM or not self._times:
            self._times.append((self._began, ended))

    def _watch(self, kind: str) -> None:
        """Count what the next forward pass keeps."""

        def begins(*_) -> None:
            before.remove()
            self._saved = self._watching.enter_context(kept_by_forward(kind))

        def ends(*_) -> None:
            after.remove()
            self._watching.close()

        before = self._model.register_forward_pre_hook(begins)
        after = self._model.register_forward_hook(ends, always_call=True)

    def measured(self) -> dict[str, float | int | None]:
        """For result.json: bytes, and the median of the steps' seconds; None for what no step has shown."""
        return {
            "optimizer_bytes": self._optimizer,
            "step_seconds": median(_between(*step) for step in self._times) if self._times else None,
            "saved_activation_bytes": self._saved and self._saved.bytes,
        }


def optimizer_bytes(optimizer: Optimizer) -> int:
    """The memory of all tensors in an optimizer's state, each piece once."""
    return total(storages(tensors_in(optimizer.state.values())), without={})


def file_bytes(folder: Path) -> int:
    """The bytes of the tensors' file in a saved adapter's folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _now(device: torch.device) -> Moment:
    """Where the device is once it has done what it was given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(began: Moment, ended: Moment) -> float:
    """Seconds."""
    if isinstance(ended, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1000
