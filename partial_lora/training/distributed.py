"""The device a run computes on and the processes that share it."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed

from partial_lora.errors import PartialLoraError, one_of

EXPECTED = "PARTIAL_LORA_WORLD"  # the number of processes that the parent starts
_PATIENCE = timedelta(days=1)  # one process may calibrate alone while the others wait


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: str
    size: int = 1
    rank: int = 0

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of their ranks, once all have called it (`peers.Peers`).

        Values are pickled: plain data and tensors on the CPU.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def peak_memory_bytes(self) -> int:
        """Return the most memory this process has held: on its accelerator if it has one, else resident."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024  # Linux counts in KiB


def device_of(requested: str, key: str) -> str:
    """Return "cuda" or "cpu" for auto, cuda or cpu; raise PartialLoraError, naming the key, for cuda without one."""
    one_of(key, requested, "auto", "cpu", "cuda")
    cuda = torch.cuda.is_available()
    if requested == "cuda" and not cuda:
        raise PartialLoraError(f"{key}=cuda: torch finds no CUDA device; use {key}=cpu")
    return "cuda" if cuda and requested != "cpu" else "cpu"


def join(requested_device: str) -> World:
    """Take this process's place in its run.

    Raises PartialLoraError for a device that is not there, or where the launcher started another number of processes
    than the parent expects (accelerate is known to start one, silently, where it should start two).
    """
    device = device_of(requested_device, "trainer.device")
    expected, size = int(os.environ.get(EXPECTED, "1")), int(os.environ.get("WORLD_SIZE", "1"))
    if size != expected:
        raise PartialLoraError(f"trainer.num_processes={expected}: the launcher started {size} processes instead")
    if device == "cpu" and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise PartialLoraError(
            "trainer.accelerate_config: distributed_type=DEEPSPEED: expected FSDP or MULTI_CPU on CPUs"
        )
    if size == 1:
        return World(device)
    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return World(device, state.num_processes, state.process_index)
